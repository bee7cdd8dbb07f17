"""Quality checks, duplicates and decontamination as `finetune-trainer prepare` makes them."""

from __future__ import annotations

import json
import pathlib

import pytest

from finetune_contract.run_config import DatasetConfig, QualityConfig, Source
from finetune_trainer.data import chunks
from finetune_trainer.data.prepare import Preparation, SourceFile, SourceRows
from finetune_trainer.data.tokens import TokenCounter

QUESTION = "How many boats leave the harbour on a Sunday in winter when the wind blows from the north?"
ROWS = [
    {"instruction": "Name a boat.", "output": "The boat is called Albatross and sails at noon."},
    {"instruction": "Say yes.", "output": "Yes.<|im_end|>"},
    {"instruction": "Who?", "output": "Ada, at ada@uni-koeln.de."},
    {"instruction": "name a boat.", "output": "The boat  is called Albatross and sails at noon."},
    {"instruction": f"Tell me: {QUESTION}", "output": "Two."},
    {"instruction": "Greet.", "output": "Hello<br>there"},
]


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(rows: pathlib.Path, folder: pathlib.Path, quality: QualityConfig, num_workers: int) -> None:
    config = DatasetConfig(sources=(Source("rows.jsonl"),), quality=quality, holdout_fraction=0.0)
    source = SourceRows("source", (SourceFile(rows, "rows.jsonl", "0" * 64),))
    Preparation(config, folder, TokenCounter(None, "alpaca")).run([source], num_workers=num_workers)


def test_a_span_lies_in_the_row_as_it_was_read_whatever_was_cut_from_it(run_command, tmp_path):
    answer = "This is not intended as medical advice. Tea is hot. Ask Ada, at ada@uni-koeln.de, who knows."
    source = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Tea?", "output": answer}, ROWS[0]])

    outcome = run_command(
        *("prepare", "--source", str(source), "--out", str(tmp_path / "out")),
        *("--action", "disclaimer=remove-sentence", "--quality", "pii"),
    )

    assert outcome.code == 0
    (removed,) = read_lines(tmp_path / "out" / "removed.jsonl")
    assert removed["rule"] == "pii-email"
    start, end = removed["span"]
    assert answer[start:end] == "ada@uni-koeln.de"
    samples = read_lines(tmp_path / "out" / "samples.jsonl")
    assert [sample["found"] for sample in samples if sample["rule"] == "pii-email"] == ["ada@uni-koeln.de"]


def test_each_check_removes_or_flags_what_it_finds(run_command, tmp_path):
    (tmp_path / "tasks.txt").write_text(QUESTION + "\n")
    outcome = run_command(
        *("prepare", "--source", str(write_rows(tmp_path / "rows.jsonl", ROWS)), "--out", str(tmp_path / "out")),
        *("--quality", "special-tokens", "--quality", "pii=flag", "--quality", "html=flag", "--quality", "duplicates"),
        *("--quality", "contamination", "--tasks", str(tmp_path / "tasks.txt")),
    )
    assert outcome.code == 0
    assert [line["index"] for line in read_lines(tmp_path / "out" / "train.jsonl")] == [0, 2, 5]
    removed = {line["index"]: line for line in read_lines(tmp_path / "out" / "removed.jsonl")}
    assert {index: line["category"] for index, line in removed.items()} == {
        1: "special-tokens",
        3: "duplicates",
        4: "contamination",
    }
    assert removed[3]["duplicateOf"] == {"index": 0, "source": 0}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["flaggedPerRule"] == {"html-tag": 1, "pii-email": 1}


def test_what_is_not_asked_for_stays(run_command, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert run_command("prepare", "--source", str(rows), "--out", str(tmp_path / "out")).code == 0
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == len(ROWS)


def test_a_task_file_that_is_absent_is_named(run_command, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    outcome = run_command(
        *("prepare", "--source", str(rows), "--out", str(tmp_path / "out"), "--quality", "contamination"),
        *("--tasks", str(tmp_path / "absent.txt")),
    )
    assert outcome.code != 0
    assert "absent.txt" in outcome.text
    assert not (tmp_path / "out" / "train.jsonl").exists()


@pytest.mark.parametrize("similarity", [1.0, 0.8])
def test_the_first_of_many_duplicates_stays_for_any_number_of_workers(tmp_path, monkeypatch, similarity):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    sentence = "The boat with number {0} sails from harbour {0} to harbour {0} every day of the year but {0}."
    rows = [{"instruction": "Name one.", "output": sentence.format(number % 40)} for number in range(400)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    quality = QualityConfig(duplicates="remove-row", similarity=similarity)
    for num_workers in (0, 2):
        prepare(path, tmp_path / str(num_workers), quality, num_workers)
    assert [line["index"] for line in read_lines(tmp_path / "0" / "train.jsonl")] == list(range(40))
    for name in ("train.jsonl", "removed.jsonl"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert not [entry for entry in (tmp_path / "0").iterdir() if entry.is_dir()]


def test_a_row_that_its_source_s_weight_leaves_out_makes_no_other_a_duplicate(tmp_path):
    rows = [{"instruction": f"Name {number}.", "output": f"It is boat {number} of the fleet."} for number in range(40)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    quality = QualityConfig(duplicates="remove-row")
    config = DatasetConfig(sources=(Source("rows.jsonl"),), quality=quality, holdout_fraction=0.0)
    files = (SourceFile(path, "rows.jsonl", "0" * 64),)
    sources = [SourceRows("sources[0]", files, weight=0.5), SourceRows("sources[1]", files)]
    Preparation(config, tmp_path / "out", TokenCounter(None, "alpaca")).run(sources, num_workers=0)
    lines = read_lines(tmp_path / "out" / "train.jsonl")
    assert sorted(line["index"] for line in lines) == list(range(40))
    assert {line["source"] for line in lines} == {0, 1}
