"""`generate --server`: a file of prompts answered by vLLM, as the same model answers it here."""

from __future__ import annotations

import json

import pytest

from finetune_contract import smoke_prompt
from finetune_trainer.__main__ import main
from finetune_trainer.serving import batch
from tests.support.training_runs import build_pairs
from tests.support.vllm_pod import KEY


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """A file of two windows of prompts, of every form of row."""
    monkeypatch.setenv(smoke_prompt.API_KEY, KEY)
    rows = [{"idx": index, "Instruction": question} for index, (question, _) in enumerate(build_pairs()[:20])]
    rows[1] = {"instruction": "What does list.opens do?", "input": "a list"}
    rows[2] = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]}
    rows[3]["Instruction"] = "word " * 20_000
    path = tmp_path / "Input.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(model, prompts, output, *words):
    files = ("--input", str(prompts), "--output", str(output))
    common = ("--batch-size", "2", "--max-new-tokens", "60")
    assert main(["generate", "--model", str(model), *files, *common, *words]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_file_is_answered_as_by_the_model_itself(plain, promoted, prompts, tmp_path):
    here = answer(promoted, prompts, tmp_path / "here.jsonl")
    there = answer(promoted, prompts, tmp_path / "there.jsonl", "--server", f"{plain.url}/v1")

    assert [row["finish_reason"] for row in there[:4]][3] == "prompt-too-long"
    assert [row["prompt_tokens"] for row in there] == [row["prompt_tokens"] for row in here]
    assert [set(row) for row in there] == [set(row) for row in here]
    # In 16 bits the order of additions differs: where two tokens are as likely, so may the answers.
    equal = sum(mine["output"] == its["output"] for mine, its in zip(here, there, strict=True))
    assert equal >= len(here) - 2
    assert len({row["output"] for row in there}) > 2


def test_sampling_reaches_the_server_and_a_run_goes_on(plain, promoted, prompts, tmp_path):
    words = ("--server", plain.url, "--temperature", "1.5", "--seed", "3")
    output = tmp_path / "Output.jsonl"
    first = answer(promoted, prompts, output, *words)
    assert first != answer(promoted, prompts, tmp_path / "other.jsonl", *words[:-1], "4")
    assert first != answer(promoted, prompts, tmp_path / "greedy.jsonl", "--server", plain.url)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[: 2 * batch.BATCHES_PER_WINDOW + 1]))
    answer(promoted, prompts, output, *words)
    assert output.read_bytes().splitlines()[: 2 * batch.BATCHES_PER_WINDOW] == whole.splitlines()[:16]
    assert len(output.read_bytes().splitlines()) == len(lines)


def test_the_model_of_a_composition_is_asked_by_its_name(pods, promoted, prompts, tmp_path, capsys):
    _, pod = pods
    words = ["generate", "--model", str(promoted), "--input", str(prompts), "--output", str(tmp_path / "x.jsonl")]
    assert main([*words, "--server", pod.url]) != 0
    assert "--name" in capsys.readouterr().err
    adapted = answer(promoted, prompts, tmp_path / "a.jsonl", "--server", pod.url, "--name", "support-7b")
    alone = answer(promoted, prompts, tmp_path / "b.jsonl", "--server", pod.url, "--name", "support-7b-base")
    assert adapted != alone
