"""Answers to files of prompts: the prompt of training, in order, really sampled, resumed without a trace."""

import json

import pytest

from finetune_contract.reports import ExitCode
from finetune_trainer.__main__ import main
from finetune_trainer.data.prompts import encode_prompt
from finetune_trainer.serving import batch
from finetune_trainer.serving.generate import Generator, Sampling
from tests.support.web_server import QuietHandler, running

NAMES = ("joins", "opens", "splits", "strips", "reads", "closes", "finds", "counts", "sorts", "pads", "cuts")
WORDS = ("--prompt-template", "wizardlm", "--batch-size", "1", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


@pytest.fixture
def prompts(tmp_path):
    rows = [{"idx": index, "Instruction": f"What does path.{name} do?"} for index, name in enumerate(NAMES)]
    rows[3] = {"messages": [{"role": "user", "content": "What does list.opens do? " * 5}]}
    rows[4] = {"instruction": "Sort these.", "input": "b a", "kept": [1]}
    rows[5]["Instruction"] = "word " * 20_000
    path = tmp_path / "Input.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _answer(model, prompts, output, *words):
    assert (
        main(["generate", "--model", str(model), "--input", str(prompts), "--output", str(output), *WORDS, *words]) == 0
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_row_is_answered_in_order_with_the_prompt_of_training(model, prompts, tmp_path):
    rows = _answer(model, prompts, tmp_path / "Output.jsonl")

    read = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert [{key: row[key] for key in one} for row, one in zip(rows, read, strict=True)] == read
    generator = Generator(model)
    message = {"role": "user", "content": read[4]["instruction"], "input": "b a"}
    tokens = encode_prompt([message], "wizardlm", generator.tokenizer)
    assert rows[4]["prompt_tokens"] == len(tokens)
    assert rows[4]["output"] == generator.answer_all([tokens], 12, Sampling())[0].text
    assert (rows[5]["finish_reason"], rows[5]["output"]) == ("prompt-too-long", "")
    assert {row["finish_reason"] for row in rows} <= {"stop", "length", "prompt-too-long"}


def test_sampling_is_applied_and_seeded(model, prompts, tmp_path):
    hot = ("--temperature", "1.5", "--seed", "3")
    greedy = _answer(model, prompts, tmp_path / "greedy.jsonl")
    first = _answer(model, prompts, tmp_path / "first.jsonl", *hot)
    again = _answer(model, prompts, tmp_path / "again.jsonl", *hot)
    other = _answer(model, prompts, tmp_path / "other.jsonl", "--temperature", "1.5", "--seed", "4")
    only_one = _answer(model, prompts, tmp_path / "one.jsonl", *hot, "--top-k", "1")
    assert first == again
    assert first != other
    assert first != greedy
    assert only_one == greedy


@pytest.mark.parametrize("left", [0, 3, 8, 9, 11])
def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(model, prompts, tmp_path, left):
    output, words = tmp_path / "Output.jsonl", ("--temperature", "1", "--seed", "5")
    _answer(model, prompts, output, *words)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:left]) + (lines[left][:9] if left < len(lines) else b""))
    _answer(model, prompts, output, *words)
    assert output.read_bytes() == whole


def test_answers_of_other_settings_are_not_mixed_and_not_overwritten(model, prompts, tmp_path, capsys):
    output = tmp_path / "Output.jsonl"
    _answer(model, prompts, output)
    before = output.read_bytes()
    words = ("--input", str(prompts), "--output", str(output), *WORDS, "--seed", "9")
    assert main(["generate", "--model", str(model), *words]) == ExitCode.USAGE
    assert "was not made by this model, input and sampling" in capsys.readouterr().err
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2: not JSON"),
        ('{"idx": 3}', "line 2: neither Instruction nor messages"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last one has to be the user's"),
    ],
)
def test_a_row_that_is_no_prompt_is_named_before_anything_is_answered(tmp_path, line, why):
    path = tmp_path / "Input.jsonl"
    path.write_text('{"idx": 0, "Instruction": "Hello"}\n' + line + "\n")
    with pytest.raises(Exception, match=why):
        batch.read_prompts(path)


LISTED = (200, {"data": [{"id": "tiny", "max_model_len": 128}, {"id": "tiny-base", "max_model_len": 128}]})


def make_server(models, completions):
    """Return a handler that answers so: (status, JSON) for the list of models, and for every completion."""

    class Server(QuietHandler):
        def do_GET(self):  # noqa: N802 - the name that http.server calls
            self.reply(*models)

        def do_POST(self):  # noqa: N802 - the same
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*completions)

        def reply(self, status, content):
            self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    return Server


@pytest.fixture
def ask_server(model, prompts, capsys):
    """Return a function that asks a server which answers so, and cannot be used: its URL, and what the user reads."""

    def ask(name, *answers):
        with running(make_server(*answers)) as url:
            words = ("--input", str(prompts), "--output", f"{prompts}.answers", *WORDS, "--server", url, "--name", name)
            assert main(["generate", "--model", str(model), *words]) == ExitCode.CONFIG
        return url, capsys.readouterr().err

    return ask


@pytest.mark.parametrize(
    ("name", "answers", "said"),
    [
        ("", (LISTED, None), "has 2 models | Say --name with one of tiny, tiny-base"),
        ("huge", (LISTED, None), "has no model huge | Say --name with one of tiny, tiny-base"),
        ("", ((401, {"error": "Unauthorized"}), None), "Unauthorized"),
        ("", ((401, {"error": "Unauthorized"}), None), "Set INFERENCE_API_KEY to its key."),
        ("tiny", (LISTED, (500, {"error": "EngineDeadError"})), "HTTP 500"),
        ("tiny", (LISTED, (200, {"choices": [{"index": 0, "text": "It joins."}]})), "Name an endpoint whose runtime"),
    ],
)
def test_a_server_that_cannot_be_used_is_named(ask_server, name, answers, said):
    url, told = ask_server(name, *answers)
    assert said in told
    assert url in told


def test_a_server_that_is_away_can_be_asked_again(model, prompts, tmp_path, capsys):
    words = ("--input", str(prompts), "--output", str(tmp_path / "Output.jsonl"), *WORDS)
    assert main(["generate", "--model", str(model), *words, "--server", "http://127.0.0.1:9"]) == ExitCode.UNAVAILABLE
    assert "goes on behind the last answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--input", "x", "--output", "y", "--name", "tiny"), "--name without --server"),
        (("--input", "x", "--output", "y", "--server", "tiny:8000"), "Write it as http://HOST:PORT"),
        (("--prompt", "Hello", "--server", "http://tiny"), "--server without --input"),
        (("--input", "x", "--output", "y", "--server", "http://tiny", "--adapter", "."), "--adapter beside --server"),
    ],
)
def test_what_a_server_cannot_be_asked_for_is_refused(model, capsys, words, said):
    assert main(["generate", "--model", str(model), *words]) == ExitCode.USAGE
    assert said in capsys.readouterr().err
