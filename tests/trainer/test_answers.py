"""What a model is worth and what it answers: held-out loss, tasks, the command line, and HTTP."""

import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from finetune_contract import smoke_prompt
from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.__main__ import main
from finetune_trainer.data.prompts import encode_examples, encode_prompt
from finetune_trainer.serving.generate import Generator
from tests.support.training_runs import SMALL, Run
from tests.support.waiting import eventually

KEY = "secret"
"""What the server of these tests asks for."""

QUESTION = "What does path.joins do?"


@pytest.fixture(scope="module")
def run(tmp_path_factory, models, data):
    """A workspace with a promoted model that has learned something."""
    settings = (*SMALL, "training.learning_rate=0.01", "checkpoint.every_steps=0", "evaluation.baseline=true")
    run = Run(tmp_path_factory.mktemp("run"), models["llama"], data, settings)
    run.train("training.max_steps=60")
    assert run.call("promote") == 0
    return run


@pytest.fixture(scope="module")
def folder(run):
    return run.workspace.promoted_model(run.report("promote")["details"]["digest"])


def _generate(capsys, folder, *words):
    capsys.readouterr()
    assert main(["generate", "--model", str(folder), "--prompt", QUESTION, *words]) == 0
    return capsys.readouterr().out


def _loss_by_hand(folder, path):
    """The mean over all answer tokens, row by row, from the probabilities themselves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    paid, answers = [], []
    for line in path.read_text().splitlines():
        (encoded,) = encode_examples(json.loads(line)["messages"], "wizardlm", tokenizer)
        with torch.inference_mode():
            odds = model(torch.tensor([encoded.input_ids])).logits[0].float().log_softmax(-1)
        for place in range(1, len(encoded.input_ids)):
            if encoded.answer_mask[place]:
                paid.append(-odds[place - 1, encoded.input_ids[place]].item())
                answers.append(encoded.input_ids[place])
    entropy = -sum(
        answers.count(token) / len(answers) * math.log(answers.count(token) / len(answers)) for token in set(answers)
    )
    return sum(paid) / len(paid), entropy


def test_held_out_loss_is_that_of_every_answer_token_and_below_the_base_s(run, folder, data):
    assert run.call("evaluate") == 0

    details = run.report("evaluate")["details"]
    scores = details["scores"]["holdout"]
    written = json.loads((run.workspace.reports / "scores.json").read_text())
    assert 0 < written["errors"]["holdout"]["loss"] < scores["loss"]
    assert "| holdout | loss |" in (run.workspace.reports / "scores.md").read_text()
    loss, entropy = _loss_by_hand(folder, data / "holdout.jsonl")
    base_loss, _ = _loss_by_hand(run.model, data / "holdout.jsonl")
    # Padding changes the order of additions in 16 bits.
    assert scores["loss"] == pytest.approx(loss, rel=5e-3)
    assert scores["unigram_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]), rel=1e-4)
    assert details["baseline"]["holdout"]["loss"] == pytest.approx(base_loss, rel=5e-3)
    assert scores["loss"] < scores["unigram_entropy"] < details["baseline"]["holdout"]["loss"]


def test_a_local_task_is_scored_for_the_model_and_its_base(run):
    tasks = run.root / "tasks"
    tasks.mkdir()
    rows = [
        {"question": f"What does {w}.opens do?", "good": f"It opens the {w}", "bad": "zq xj"} for w in ("list", "dict")
    ]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "opens.yaml").write_text(
        "task: opens\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{question}}\\n\\n### Response:"\n'
        'doc_to_choice: "{{[good, bad]}}"\ndoc_to_target: 0\ntarget_delimiter: ""\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )

    assert run.call("evaluate", "--task", "tasks/opens.yaml", "evaluation.holdout=false", "--limit", "2") == 0
    details = run.report("evaluate")["details"]
    assert details["scores"] == {"opens": {"acc": 1.0}}
    assert json.loads((run.workspace.reports / "scores.json").read_text())["errors"]["opens"]["acc"] == 0
    assert set(details["baseline"]) == {"opens"}


def test_further_models_and_rates_of_refusals_stand_beside_the_base(run, models):
    words = ("--refusals", f"--also=pythia={models['gpt_neox']}", f"--also=start={run.model}", "--limit", "3")
    assert run.call("evaluate", *words) == 0

    written = json.loads((run.workspace.reports / "scores.json").read_text())
    assert set(written["models"]) == {"pythia", "start"}
    rates = {"refusal_rate", "hedging_rate", "over_refusal_rate", "over_hedging_rate"}
    every = [written["scores"], written["baseline"], *(side["scores"] for side in written["models"].values())]
    assert all(set(scores["refusals"]) == rates for scores in every)
    # The same weights have the same scores; a model that reads other tokens has no loss to compare.
    assert written["models"]["start"]["scores"] == written["baseline"]
    assert "holdout" not in written["models"]["pythia"]["scores"]
    assert written["harness"]["lm_eval"]
    tables = (run.workspace.reports / "scores.md").read_text()
    assert all(f"| task | metric | tuned | {name} |" in tables for name in ("base", "pythia", "start"))
    assert run.report("evaluate")["details"]["scores"]["refusals"]["refusal_rate"] == 0


def test_every_answer_behind_the_rates_can_be_read(run):
    assert run.call("evaluate", "--refusals", "--limit", "2", "evaluation.holdout=false") == 0

    lines = [json.loads(line) for line in (run.workspace.reports / "refusals.jsonl").read_text().splitlines()]
    assert [(line["model"], line["set"]) for line in lines] == [
        (model, name) for model in ("tuned", "base") for name in ("refusal", "refusal", "over_refusal", "over_refusal")
    ]
    assert all(line["prompt"] and isinstance(line["answer"], str) for line in lines)


def test_a_model_to_score_that_is_not_there_is_named(run, tmp_path):
    assert run.call("evaluate", f"--also=absent={tmp_path / 'absent'}") == ExitCode.NO_INPUT
    assert "spec.evaluation.models[0].source" in run.report("evaluate")["message"]


def test_an_unknown_task_is_named(run):
    assert run.call("evaluate", "--task", "tasks/absent.yaml", "evaluation.holdout=false") == ExitCode.NO_INPUT
    report = run.report("evaluate")
    assert report["reason"] == Reason.EVALUATION_FAILED
    assert "tasks/absent.yaml" in report["message"]


def test_generate_prints_the_answer_alone_or_as_json(folder, capsys):
    text = _generate(capsys, folder)
    answer = json.loads(_generate(capsys, folder, "--json"))

    assert text == answer["text"] + "\n"
    assert text.startswith("It ")
    assert answer["has_ended"]
    assert answer["token_ids"] == json.loads(_generate(capsys, folder, "--json"))["token_ids"]


def test_generate_needs_a_chat_template(models, capsys):
    assert main(["generate", "--model", str(models["llama"]), "--prompt", "x"]) == ExitCode.NO_INPUT
    assert "chat template" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The real server on a free port: its URL and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    words = ["serve", "--promoted", str(folder), "--name", "tiny", "--port", str(port)]
    environment = {**os.environ, "INFERENCE_API_KEY": KEY}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_trainer", *words], stdout=log, stderr=log, env=environment
    )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _is_healthy(url, process), within=120, otherwise=lambda: pathlib.Path(log.name).read_text())
        yield url, process
    finally:
        process.kill()
        process.wait()


def _is_healthy(url, process):
    assert process.poll() is None, "the server ended"
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=30).status == 200
    except OSError:
        return False


def _make_request(server, path, body=None, key=KEY):
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    return urllib.request.Request(server[0] + path, data=json.dumps(body).encode() if body else None, headers=headers)


def _post(server, path, body, key=KEY):
    request = _make_request(server, path, body, key)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_greedy_answer_over_http_is_that_of_generate_token_for_token(server, folder, capsys):
    reference = json.loads(_generate(capsys, folder, "--json", "--max-new-tokens", "24"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24, "temperature": 0}

    status, text = _post(server, "/v1/chat/completions", body)

    answer = json.loads(text)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == reference["text"]
    assert answer["usage"]["prompt_tokens"] == reference["num_prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == len(reference["token_ids"])
    assert answer["model"] == "tiny"


def test_the_answer_is_greedy_by_default_and_the_same_when_streamed(server, folder, capsys):
    reference = json.loads(_generate(capsys, folder, "--json"))
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "stream": True}

    status, text = _post(server, "/v1/chat/completions", body)

    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert status == 200
    assert streamed == reference["text"]


def test_a_conversation_over_http_has_the_prompt_of_training(server, folder):
    import torch

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "It joins the path."},
        {"role": "user", "content": "And list.counts?"},
    ]
    generator = Generator(folder)
    prompt = encode_prompt(messages, "wizardlm", generator.tokenizer)
    with torch.inference_mode():
        ids = generator.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0, len(prompt) :]
    body = {"model": "tiny", "messages": messages, "max_tokens": 16, "temperature": 0}

    status, text = _post(server, "/v1/chat/completions", body)

    answer = json.loads(text)
    assert status == 200
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["choices"][0]["message"]["content"] == generator.tokenizer.decode(ids, skip_special_tokens=True)


def test_plain_completions_work_for_the_one_model_and_it_is_the_only_one(server):
    status, text = _post(
        server, "/v1/completions", {"model": "tiny", "prompt": "It ", "max_tokens": 3, "temperature": 0}
    )
    models = json.load(urllib.request.urlopen(_make_request(server, "/v1/models"), timeout=30))

    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] <= 3
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert _post(server, "/v1/completions", {"model": "gpt2", "prompt": "x"})[0] == 400


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses"])
def test_nobody_can_load_or_unload_models(server, path):
    assert _post(server, path, {"model": "gpt2", "input": "x"})[0] == 404


@pytest.mark.parametrize("key", ["", "another"])
def test_only_those_who_know_the_key_are_answered_but_probes_need_none(server, key):
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, text = _post(server, path, {"model": "tiny", "prompt": "x"}, key)
        assert (status, "Authorization: Bearer" in text) == (401, True)
    assert urllib.request.urlopen(f"{server[0]}/health", timeout=30).status == 200


def test_every_answer_tells_the_digest_of_its_model(server, folder):
    with urllib.request.urlopen(_make_request(server, "/v1/models"), timeout=30) as response:
        assert response.headers["x-model-digest"] == folder.name


def test_the_smoke_prompt_is_answered(server, monkeypatch):
    monkeypatch.setenv("INFERENCE_API_KEY", KEY)
    figures = smoke_prompt.ask(server[0], "tiny", 8)
    assert 1 <= figures["tokens"] <= 8
    assert figures["tokens_per_second"] > 0


def test_the_server_finishes_what_it_is_answering_and_ends_on_sigterm(server):
    process = server[1]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64, "stream": True}
    with urllib.request.urlopen(_make_request(server, "/v1/chat/completions", body), timeout=60) as response:
        first = response.readline()
        os.kill(process.pid, signal.SIGTERM)
        rest = response.read().decode()

    assert first.startswith(b"data:")
    assert "finish_reason" in rest
    assert process.wait(timeout=60) == ExitCode.OK
