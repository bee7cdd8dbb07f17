"""Names of tasks, and scores that fit into a termination message."""

import json

import pytest

from finetune_contract.reports import MAX_TERMINATION_BYTES, ExitReport
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.harness import _find_file, _numbers, expand_tasks, is_local, read_texts
from finetune_trainer.evaluation.scores_file import shorten_scores


def test_the_first_leaderboard_is_one_group_with_its_shots():
    assert expand_tasks(["open-llm-v1"]) == [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
    ]


def test_other_tasks_keep_their_own_shots():
    assert expand_tasks(["gsm8k", "tasks/mine.yaml"]) == [("gsm8k", None), ("tasks/mine.yaml", None)]
    assert [is_local(name) for name in ("gsm8k", "tasks/mine.yaml", "mine.yml")] == [False, True, True]


def test_metrics_lose_the_harness_s_filter_names_and_errors():
    raw = {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.01, "exact_match,strict": 0.5, "sample_len": 10}

    assert _numbers(raw, is_error=False) == {"acc": 0.25, "exact_match,strict": 0.5}
    assert _numbers(raw, is_error=True) == {"acc": 0.01}


def test_many_scores_are_cut_to_what_a_termination_message_holds_and_the_groups_stay():
    parts = {f"mmlu_{number:02}_long_name_of_a_subject": {"acc": 1 / 3} for number in range(57)}
    scores = {"holdout": {"loss": 2.123456789}, "mmlu": {"acc": 0.2512345678}, **parts}

    short = shorten_scores({"scores": scores, "baseline": scores})

    report = ExitReport("evaluate", "Completed", "x" * 200, details=short)
    assert len(report.to_termination_message()) <= MAX_TERMINATION_BYTES
    assert ExitReport.from_termination_message(report.to_termination_message()).details == short
    assert short["scores"]["mmlu"] == {"acc": 0.251235}
    assert short["baseline"]["holdout"] == {"loss": 2.12346}
    assert len(json.dumps(short)) > 1000, "parts that fit stay"


def test_texts_of_a_file_stand_one_a_line(tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffOne.\nZwei \u00fcber.\n".encode())

    assert list(read_texts(["texts.txt"], tmp_path)) == ["One.", "Zwei \u00fcber."]


@pytest.mark.parametrize("name", ["absent.txt", "folder.txt", "bytes.txt"])
def test_a_file_of_texts_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")

    with pytest.raises(TrainerError, match=name):
        list(read_texts([name], tmp_path))


@pytest.mark.parametrize("name", ["tasks/own.yaml", "pvc://tasks/own.yaml"])
def test_a_task_file_is_found_on_the_workspace(tmp_path, name):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").touch()

    assert _find_file(name, tmp_path) == tmp_path / "tasks" / "own.yaml"
