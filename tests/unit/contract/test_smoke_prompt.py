"""The smoke prompt against a server that answers as vLLM and `transformers serve` do, and as broken ones do."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys

import pytest

from finetune_contract import smoke_prompt
from finetune_contract.reports import ExitReport
from tests.support.web_server import running

TOKENS = ("Good", " ", "day", ".")
STREAM = "".join(
    f"data: {json.dumps({'choices': [{'delta': {'content': token}, 'finish_reason': None}]})}\n\n" for token in TOKENS
)
END = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'


def make_server(*answers, key=""):
    """Return a handler that gives these answers (status, text) in turn, the last for ever, and what it was asked."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            return

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, json.loads(body), self.headers.get("Authorization")))
            status, text = answers[min(len(asked), len(answers)) - 1]
            if key and self.headers.get("Authorization") != f"Bearer {key}":
                status, text = 401, "send the API key"
            self._send(status, text)

        def _send(self, status, text):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    return Server, asked


def make_metrics(looks):
    """Return a handler that tells these numbers of requests under way, then none, and what is left to tell.

    A look that is "drop" ends without an answer, "hang" gets one when who looked has long given up.
    """
    left = list(looks)

    class Metrics(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            return

        def do_GET(self):
            number = left.pop(0) if left else 0
            if number == "drop":
                return
            if number == "hang":
                self.connection.settimeout(30)
                # The other side's end, or its time out.
                self.rfile.read(1)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f'# HELP\nvllm:num_requests_running{{engine="0"}} {number}.0\n'.encode())

    return Metrics, left


@pytest.fixture
def run(tmp_path):
    """Run the program as pods do, by its file alone; returns the process and the report that it left."""

    def run_program(*arguments, **environment):
        log = tmp_path / "termination-log"
        command = (sys.executable, "-I", smoke_prompt.__file__, *arguments)
        variables = {"FINETUNE_TERMINATION_LOG": str(log), "http_proxy": "http://127.0.0.1:9", **environment}
        finished = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
        report = ExitReport.from_termination_message(log.read_text()) if log.exists() else None
        return finished, report

    return run_program


@pytest.mark.parametrize("ending", ["data: [DONE]\n\n", END])
def test_an_answer_is_measured_and_reported(run, ending):
    server, asked = make_server((200, STREAM + ending))
    with running(server) as url:
        finished, report = run("smoke", "--url", url, "--model", "support", "--within", "30")
    assert finished.returncode == 0, finished.stderr
    assert report.details["tokens"] == len(TOKENS)
    assert 0 < report.details["time_to_first_token_seconds"] <= report.details["answer_seconds"]
    assert report.details["tokens_per_second"] > 0
    assert {path for path, _, _ in asked} == {"/v1/chat/completions"}
    assert {body["model"] for _, body, _ in asked} == {"support"}


def test_an_answer_without_text_is_one_when_the_model_ended_it(run):
    server, _ = make_server((200, END))
    with running(server) as url:
        assert run("smoke", "--url", url, "--within", "30")[0].returncode == 0


def test_a_server_that_is_not_there_yet_is_waited_for(run):
    server, asked = make_server((503, "loading"), (502, "bad gateway"), (200, STREAM + END))
    with running(server) as url:
        assert run("smoke", "--url", url, "--within", "30")[0].returncode == 0
    assert len(asked) == 4


def test_a_server_that_never_comes_is_reported_apart(run):
    finished, report = run("smoke", "--url", "http://127.0.0.1:9", "--within", "0.5")
    assert finished.returncode == smoke_prompt.EXIT_NO_ANSWER
    assert report.reason == "SmokePromptFailed"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, "CUDA error: an illegal memory access"), "HTTP 500: CUDA error"),
        ((404, "no such model"), "HTTP 404"),
        ((200, STREAM), "broke off"),
        ((200, 'data: {"error": "boom"}\n\n'), "boom"),
        ((200, "data: no JSON\n\n"), "Expecting value"),
        ((200, "<html>"), "broke off"),
    ],
)
def test_a_wrong_answer_is_refused_after_three_tries(run, answer, said):
    server, asked = make_server(answer)
    with running(server) as url:
        finished, report = run("smoke", "--url", url, "--within", "30")
    assert (finished.returncode, len(asked)) == (smoke_prompt.EXIT_REFUSED, smoke_prompt.TRIES)
    assert said in report.message


def test_the_key_goes_with_every_request(run):
    server, _ = make_server((200, STREAM + END), key="secret")
    with running(server) as url:
        assert run("check", "--url", url, INFERENCE_API_KEY="secret")[0].returncode == 0
        assert run("check", "--url", url)[0].returncode == 1


@pytest.mark.parametrize(
    "looks",
    [(2, 1), (0, 3, 0, 1), ("drop", 1, "drop", 2), ("hang", 1)],
    ids=["under way", "between two answers", "connections lost", "too busy to tell"],
)
def test_draining_ends_when_no_request_is_under_way(monkeypatch, looks):
    monkeypatch.setattr(smoke_prompt, "LOOK_SECONDS", 0.5)
    server, left = make_metrics(looks)
    with running(server) as url:
        assert smoke_prompt.drain(url, 30) == 0
    assert not left


def test_draining_a_server_that_is_gone_ends_at_once(run):
    assert run("drain", "--url", "http://127.0.0.1:9", "--within", "3600")[0].returncode == 0


def test_draining_ends_after_its_time_whatever_is_under_way(run):
    server, left = make_metrics([1] * 10_000)
    with running(server) as url:
        assert run("drain", "--url", url, "--within", "1.2")[0].returncode == 0
    assert left
