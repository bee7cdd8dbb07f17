"""What the pod says reaches the operator, and nothing the operator does reaches the pod."""

from __future__ import annotations

import errno
import json
import logging
import pathlib
import threading

import pytest

from finetune_contract.reports import ExitReport, ProgressReport
from finetune_contract.workspace import Workspace
from finetune_trainer import reporting
from finetune_trainer.reporting import ProgressBar, ProgressReporter, write_exit_report
from tests.support.waiting import eventually
from tests.support.web_server import QuietHandler, running


class Receiver:
    """A progress server that keeps what it is sent."""

    def __init__(self) -> None:
        self.posts: list[tuple[ProgressReport, str]] = []
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        receiver = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.gate.wait(10)
                receiver.posts.append((ProgressReport.from_body(body), self.headers.get("Authorization", "")))
                self.answer(receiver.status, b"{}")

        self.handler = Handler

    def wait_for(self, number: int) -> None:
        eventually(lambda: len(self.posts) >= number, within=10, otherwise=f"{len(self.posts)} posts", every=0.01)


@pytest.fixture
def receiver():
    return Receiver()


def test_posts_carry_metrics_and_the_token_over_tls(receiver, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("secret-token\n")
    with running(receiver.handler, tmp_path) as url:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"{url}/status")
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_CA_CERT", str(tmp_path / "ca.crt"))
        with ProgressReporter(interval_seconds=0) as reporter:
            reporter.update(10.9, {"loss": 2.5}, eta_seconds=12.7)
            receiver.wait_for(1)
            reporter.update(20, {"current_step": 4})
            receiver.wait_for(2)
    (first, authorization), (second, _) = receiver.posts
    assert authorization == "Bearer secret-token"
    assert (first.percentage, first.eta_seconds, first.metrics) == (10, 12, {"loss": 2.5})
    assert (second.percentage, second.metrics) == (20, {"loss": 2.5, "current_step": 4.0})
    assert first.updated_at.endswith("Z")


def test_a_certificate_that_is_not_trusted_gets_no_token(receiver, tmp_path, monkeypatch):
    with running(receiver.handler, tmp_path) as url, ProgressReporter(url) as reporter:
        reporter.update(1, urgent=True)
        reporter.close()
        assert reporter.num_posted == 0
    assert receiver.posts == []


def test_between_two_posts_only_the_newest_state_is_kept(receiver):
    with running(receiver.handler) as url, ProgressReporter(url, interval_seconds=60) as reporter:
        reporter.update(1)
        receiver.wait_for(1)
        for percentage in range(2, 50):
            reporter.update(percentage)
        reporter.close()
        receiver.wait_for(2)
    assert [post.percentage for post, _ in receiver.posts] == [1, 49]


def test_an_urgent_state_does_not_wait_for_the_interval(receiver):
    with running(receiver.handler) as url, ProgressReporter(url, interval_seconds=600) as reporter:
        reporter.update(1)
        receiver.wait_for(1)
        reporter.update(2, urgent=True)
        receiver.wait_for(2)
    assert [post.percentage for post, _ in receiver.posts] == [1, 2]


def test_a_server_that_hangs_holds_nobody_up(receiver):
    receiver.gate.clear()
    with running(receiver.handler) as url:
        reporter = ProgressReporter(url, interval_seconds=0, timeout_seconds=0.2)
        for percentage in range(100):
            reporter.update(percentage)
        reporter.close()
        receiver.gate.set()
    assert reporter.num_posted == 0


@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_of_the_server_is_no_error(receiver, status):
    receiver.status = status
    with running(receiver.handler) as url, ProgressReporter(url, interval_seconds=0) as reporter:
        reporter.update(5)
        receiver.wait_for(1)
        reporter.close()
        assert reporter.num_posted == 0


def test_nobody_listening_is_no_error():
    with ProgressReporter("http://127.0.0.1:9", timeout_seconds=0.5) as reporter:
        reporter.update(5, urgent=True)


def test_without_a_url_nothing_is_started():
    with ProgressReporter() as reporter:
        reporter.update(5, urgent=True)
    assert reporter.num_posted == 0


def test_percentages_stay_between_0_and_100(receiver):
    with running(receiver.handler) as url, ProgressReporter(url, interval_seconds=0) as reporter:
        reporter.update(140, eta_seconds=-3)
        receiver.wait_for(1)
    assert (receiver.posts[0][0].percentage, receiver.posts[0][0].eta_seconds) == (100, 0)


def test_the_exit_report_goes_to_termination_log_and_workspace_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FINETUNE_ATTEMPT", "3")
    monkeypatch.setenv("FINETUNE_MODEL_HF_TOKEN", "hf_verysecret")
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    report = ExitReport("prepare", "Completed", "opened with hf_verysecret", hint="hf_verysecret", details={"rows": 1})
    write_exit_report(report, workspace)
    texts = [(tmp_path / "log").read_text(), (workspace.reports / "prepare.json").read_text()]
    assert json.loads(texts[0]) == json.loads(texts[1])
    assert "verysecret" not in "".join(texts)
    assert json.loads(texts[0])["attempt"] == 3


def test_a_workspace_that_cannot_be_written_leaves_the_termination_log(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_TERMINATION_LOG", str(tmp_path / "log"))

    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporting, "write_json", refuse)
    write_exit_report(ExitReport("train", "StorageFull", "full", 73), Workspace(tmp_path))
    assert json.loads((tmp_path / "log").read_text())["reason"] == "StorageFull"


def test_log_lines_are_fields_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "wandb-secret-value")
    reporting.configure_logging()
    reporting.emit("downloaded a file", name="a b.json", bytes=12, loss=0.123456789)
    reporting.emit_warning("key is wandb-secret-value")
    error = capsys.readouterr().err
    assert 'info downloaded a file name="a b.json" bytes=12 loss=0.123457' in error
    assert "warning key is ***" in error


def test_without_a_terminal_a_bar_becomes_lines(capsys, monkeypatch):
    monkeypatch.setattr(reporting, "PLAIN_LINE_SECONDS", 0)
    reporting.configure_logging()
    with ProgressBar("filtering", 200) as bar:
        bar.advance(50, removed=3)
    assert "filtering done=50 unit=rows percent=25 removed=3" in capsys.readouterr().err


def test_a_json_file_is_replaced_whole(tmp_path: pathlib.Path):
    path = tmp_path / "a.json"
    reporting.write_json(path, {"b": 1})
    reporting.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_debug_lines_appear_only_when_asked_for(capsys):
    reporting.configure_logging(verbose=True)
    reporting.logger.debug("detail")
    reporting.configure_logging()
    reporting.logger.debug("more detail")
    assert capsys.readouterr().err.count("detail") == 1
    assert logging.getLogger("finetune_trainer").level == logging.INFO
