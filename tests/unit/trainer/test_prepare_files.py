"""`finetune-trainer prepare` on plain files: what it writes, and how it fails."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys

import pyarrow as pa
import pytest
import tokenizers

from finetune_contract.run_config import DatasetConfig, Source
from finetune_trainer.data.prepare import Preparation, SourceFile, SourceRows
from finetune_trainer.data.tokens import TokenCounter

REFUSAL = {"instruction": "x", "input": "", "output": "I can't help with that."}


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_report(folder: pathlib.Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def write_rows(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["alpaca", "evol", "sharegpt", "messages"])
@pytest.mark.parametrize("given", ["auto", "named"])
def test_every_format_is_filtered_and_written(run_command, instructions, tmp_path, name, given):
    source = next(instructions.glob(f"{name}.json*"))
    chosen = name if given == "named" else "auto"
    outcome = run_command("prepare", "--source", str(source), "--format", chosen, "--out", str(tmp_path / "out"))
    assert outcome.code == 0
    report = read_report(tmp_path / "out")
    assert report["sources"][0]["format"] == name
    assert report["rowsRead"] == report["rowsKept"] + report["rowsRemoved"]
    assert report["rowsRemoved"] == sum(report["removedPerRule"].values()) > 0
    train = read_lines(tmp_path / "out" / "train.jsonl")
    removed = read_lines(tmp_path / "out" / "removed.jsonl")
    assert sorted(line["index"] for line in train + removed) == list(range(report["rowsRead"]))
    assert all(line["messages"][-1]["role"] == "assistant" for line in train)


def test_a_removed_row_is_listed_with_rule_field_and_span(run_command, instructions, tmp_path):
    run_command("prepare", "--source", str(instructions / "alpaca.json"), "--out", str(tmp_path / "out"))
    removed = read_lines(tmp_path / "out" / "removed.jsonl")
    assert [line["index"] for line in removed] == [10, 11, 12]
    assert [line["category"] for line in removed] == ["refusal", "disclaimer", "knowledge-cutoff"]
    source = json.loads((instructions / "alpaca.json").read_text())
    for line in removed:
        start, end = line["span"]
        assert source[line["index"]][line["field"]][start:end]
    assert source[10]["output"][slice(*removed[0]["span"])].startswith("I\u2019m sorry")


def test_an_input_reaches_the_prepared_data(run_command, instructions, tmp_path):
    run_command("prepare", "--source", str(instructions / "alpaca.json"), "--out", str(tmp_path / "out"))
    train = read_lines(tmp_path / "out" / "train.jsonl")
    assert train[1]["messages"][0] == {"role": "user", "content": "Sort the list.", "input": "3, 1, 2"}


def test_legacy_rules_with_a_phrase_file_give_what_the_old_scripts_gave(run_command, instructions, tmp_path):
    outcome = run_command(
        "prepare", "--source", str(instructions / "legacy-rows.json"), "--format", "alpaca", "--rules", "legacy",
        "--phrases", str(instructions / "legacy-phrases.txt"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert outcome.code == 0
    expected = [row["expected"] for row in json.loads((instructions / "legacy-rows.json").read_text())]
    found = ["kept"] * len(expected)
    for line in read_lines(tmp_path / "out" / "removed.jsonl"):
        found[line["index"]] = f"removed:{line['rule']}"
    assert found == expected


def test_legacy_rules_keep_rows_that_today_would_count_as_unusable(run_command, tmp_path):
    source = write_rows(
        tmp_path / "rows.json", [{"instruction": "x", "output": ""}, {"instruction": "y", "output": "z"}]
    )
    run_command("prepare", "--source", str(source), "--rules", "legacy", "--out", str(tmp_path / "legacy"))
    run_command("prepare", "--source", str(source), "--out", str(tmp_path / "default"))
    assert read_report(tmp_path / "legacy")["rowsKept"] == 2
    assert read_report(tmp_path / "default")["removedPerRule"] == {"empty-answer": 1}


def test_same_input_and_settings_give_the_same_bytes_anywhere(run_command, instructions, tmp_path):
    folders = [tmp_path / "one", tmp_path / "elsewhere" / "two"]
    for folder in folders:
        copy = folder / "in" / "alpaca.json"
        copy.parent.mkdir(parents=True)
        copy.write_bytes((instructions / "alpaca.json").read_bytes())
        run_command("prepare", "--source", str(copy), "--holdout-fraction", "0.2", "--out", str(folder / "out"))
    for name in ("train.jsonl", "holdout.jsonl", "removed.jsonl", "report.json", "manifest.json"):
        assert (folders[0] / "out" / name).read_bytes() == (folders[1] / "out" / name).read_bytes()


@pytest.mark.parametrize(
    "options", [("--seed", "7"), ("--holdout-fraction", "0.3"), ("--rules", "legacy"), ("--fields", "instruction")]
)
def test_other_settings_give_another_digest(run_command, instructions, tmp_path, options):
    source = ("prepare", "--source", str(instructions / "alpaca.json"))
    run_command(*source, "--out", str(tmp_path / "a"))
    run_command(*source, *options, "--out", str(tmp_path / "b"))
    assert read_report(tmp_path / "a")["digest"] != read_report(tmp_path / "b")["digest"]


def test_the_manifest_holds_the_digest_of_every_file(run_command, instructions, tmp_path):
    run_command("prepare", "--source", str(instructions / "alpaca.json"), "--out", str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (tmp_path / name).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["lines"] == content.count(b"\n")


@pytest.mark.parametrize("number", [1, 2, 3, 20])
def test_a_small_data_set_has_something_to_train_on_and_to_hold_out(run_command, tmp_path, number):
    rows = [{"instruction": f"Question {index}", "output": "Answer"} for index in range(number)]
    source = write_rows(tmp_path / "rows.json", rows)
    run_command("prepare", "--source", str(source), "--holdout-fraction", "0.02", "--out", str(tmp_path / "out"))
    report = read_report(tmp_path / "out")
    assert report["rowsTrain"] + report["rowsHoldout"] == number
    assert report["rowsTrain"] >= 1
    assert (report["rowsHoldout"] >= 1) == (number > 1)
    assert len(read_lines(tmp_path / "out" / "holdout.jsonl")) == report["rowsHoldout"]


def test_no_prompt_is_trained_on_and_held_out(run_command, tmp_path):
    rows = [{"instruction": f"Question {index % 10}", "output": f"Answer {index}"} for index in range(200)]
    source = write_rows(tmp_path / "rows.json", rows)
    run_command("prepare", "--source", str(source), "--holdout-fraction", "0.3", "--out", str(tmp_path / "out"))
    prompts = [
        {line["messages"][0]["content"] for line in read_lines(tmp_path / "out" / name)}
        for name in ("train.jsonl", "holdout.jsonl")
    ]
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


def test_a_folder_of_files_is_one_source_and_only_its_train_split_is_read(run_command, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, question in (("train-0.jsonl", "a"), ("train-1.jsonl.zst", "b"), ("test.jsonl", "c")):
        text = json.dumps({"instruction": question, "output": "x"}).encode()
        (folder / name).write_bytes(pa.compress(text, "zstd", asbytes=True) if name.endswith("zst") else text)
    (folder / "README.md").write_text("about")
    run_command("prepare", "--source", str(folder), "--out", str(tmp_path / "out"))
    train = read_lines(tmp_path / "out" / "train.jsonl")
    assert [line["messages"][0]["content"] for line in train] == ["a", "b"]
    assert [line["index"] for line in train] == [0, 1]


def test_field_names_can_be_mapped(run_command, tmp_path):
    source = write_rows(tmp_path / "rows.json", [{"question": "a", "answer": "b"}])
    names = ("--map", "instruction=question", "--map", "output=answer")
    outcome = run_command("prepare", "--source", str(source), *names, "--out", str(tmp_path / "out"))
    assert outcome.code == 0
    assert read_report(tmp_path / "out")["rowsKept"] == 1


def test_allowed_bad_rows_are_left_out_and_listed(run_command, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"instruction": "a", "output": "b"}\nnonsense\n{"instruction": "c", "output": 3}\n')
    out = str(tmp_path / "out")
    outcome = run_command("prepare", "--source", str(source), "--max-bad-rows", "2", "--out", out)
    assert outcome.code == 0
    bad = read_lines(tmp_path / "out" / "bad.jsonl")
    assert [(line["file"], line["line"], line["index"]) for line in bad] == [("rows.jsonl", 2, 1), ("rows.jsonl", 3, 2)]
    assert bad[1]["why"] == "output: expected text, found a number"
    assert read_report(tmp_path / "out")["rowsBad"] == 2


@pytest.mark.parametrize(
    ("content", "reason", "code", "said", "field"),
    [
        ("", "DatasetEmpty", 65, "has no rows: rows.json", "spec.dataset.source"),
        ("[]", "DatasetEmpty", 65, "has no rows", "spec.dataset.source"),
        (
            '[{"instruction": "a", "output": "b"},\n {"instruction": oops}]',
            "DatasetInvalid",
            65,
            "rows.json, line 2",
            "",
        ),
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "DatasetInvalid", 65, "line 2: not JSON", "maxBadRows"),
        ('[{"text": "a"}]', "DatasetInvalid", 65, "cannot be told from its keys (text)", "spec.dataset.format"),
        (json.dumps([REFUSAL] * 3), "DatasetEmptyAfterFilter", 65, "3 of 3 (refusal 3)", "spec.dataset.filter"),
    ],
)
def test_bad_data_ends_with_a_reason_a_place_and_what_to_do(
    run_command, tmp_path, *, content, reason, code, said, field
):
    source = tmp_path / "rows.json"
    source.write_text(content)
    outcome = run_command("prepare", "--source", str(source), "--out", str(tmp_path / "out"))
    assert (outcome.code, outcome.report["reason"]) == (code, reason)
    assert said in outcome.report["message"]
    assert field in outcome.report["hint"]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dry_run_gives_the_same_report_and_no_data(run_command, instructions, tmp_path):
    options = ("--source", str(instructions / "alpaca.json"), "--holdout-fraction", "0.3")
    run_command("prepare", *options, "--out", str(tmp_path / "real"))
    outcome = run_command("prepare", *options, "--dry-run", "--out", str(tmp_path / "dry"))
    assert outcome.code == 0
    names = {path.name for path in (tmp_path / "dry").iterdir()}
    assert names == {"report.json", "report.html", "samples.jsonl", "removed.jsonl", "bad.jsonl"}
    for name in names:
        assert (tmp_path / "dry" / name).read_bytes() == (tmp_path / "real" / name).read_bytes()


def test_a_dry_run_leaves_prepared_data_alone(run_command, instructions, tmp_path):
    options = ("prepare", "--source", str(instructions / "alpaca.json"), "--out", str(tmp_path / "out"))
    run_command(*options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    outcome = run_command(*options, "--rules", "legacy", "--dry-run")
    assert outcome.code == 64
    assert "--out" in outcome.report["hint"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_dry_run_lists_all_bad_rows_and_says_that_there_are_too_many(run_command, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"instruction": "a", "output": "b"}\nnonsense\n{"instruction": "c", "output": 3}\n')
    outcome = run_command("prepare", "--source", str(source), "--dry-run", "--out", str(tmp_path / "out"))
    assert outcome.code == 0
    assert [line["line"] for line in read_lines(tmp_path / "out" / "bad.jsonl")] == [2, 3]
    assert "at most 0 bad rows are allowed" in capsys.readouterr().out
    real = run_command("prepare", "--source", str(source), "--out", str(tmp_path / "real"))
    assert real.code == 65


def test_a_dry_run_without_a_source_is_a_usage_error(run_command):
    outcome = run_command("prepare", "--dry-run")
    assert outcome.code == 64
    assert "--source" in outcome.report["hint"]


def test_a_missing_file_is_named(run_command, tmp_path):
    outcome = run_command("prepare", "--source", str(tmp_path / "no.json"), "--out", str(tmp_path / "out"))
    assert (outcome.code, outcome.report["reason"]) == (66, "DatasetNotFound")
    assert "no.json" in outcome.report["message"]
    assert "spec.dataset.source" in outcome.text


def test_a_missing_phrase_file_is_named(run_command, instructions, tmp_path):
    source = ("--source", str(instructions / "alpaca.json"), "--rules", "legacy")
    outcome = run_command("prepare", *source, "--phrases", str(tmp_path / "no.txt"), "--out", str(tmp_path / "out"))
    assert outcome.code == 66
    assert "no.txt" in outcome.report["message"]


def test_source_without_out_is_a_usage_error(run_command, instructions):
    outcome = run_command("prepare", "--source", str(instructions / "alpaca.json"))
    assert outcome.code == 64
    assert "--out" in outcome.report["hint"]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Four times the rows may not need noticeably more memory, here or in a worker."""
    program = (
        "import resource, sys\n"
        "from finetune_trainer.__main__ import main\n"
        "assert main(['prepare', '--source', sys.argv[1], '--rules', 'legacy', '--out', sys.argv[2]]) == 0\n"
        "for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):\n"
        "    print('peak', resource.getrusage(whose).ru_maxrss)\n"
    )
    peaks = []
    for number in (11_000, 44_000):
        source = tmp_path / f"{number}.jsonl"
        with source.open("w") as file:
            for index in range(number):
                file.write(json.dumps({"instruction": f"Question {index}", "output": "x" * 400}) + "\n")
        command = [sys.executable, "-c", program, str(source), str(tmp_path / f"out-{number}")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append([int(line.split()[1]) for line in output.splitlines() if line.startswith("peak")])
    for few, many in zip(*peaks, strict=True):
        assert 0 < many - few + 10 * 1024 < 20 * 1024


def test_prepare_needs_no_torch(instructions, tmp_path):
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from finetune_trainer.__main__ import main\n"
        "sys.exit(main(['prepare', '--source', sys.argv[1], '--out', sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", program, str(instructions / "alpaca.json"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_tokens_are_counted_with_the_models_tokenizer(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_rows(tmp_path / "rows.json", [{"instruction": "one two", "output": "three four five"}] * 4)
    rows = SourceRows("spec.dataset", (SourceFile(source, "rows.json", "0" * 64),))
    dataset = DatasetConfig((Source(str(source)),), prompt_template="{instruction} ", holdout_fraction=0.0)
    manifest = Preparation(dataset, tmp_path / "out", TokenCounter(tmp_path, dataset.prompt_template)).run([rows])
    assert manifest["tokens"] == 20
    assert not TokenCounter(tmp_path / "nowhere", "alpaca").is_usable


def test_tokens_of_prompts_and_answers_are_told_apart(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    turns = [("user", "one two"), ("assistant", "three"), ("user", "four"), ("assistant", "five six seven")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for template in ("{instruction}\n", "tokenizer"):
        assert TokenCounter(tmp_path, template).measure([messages, messages[:2]]) == [(3, 4), (2, 1)]
    assert TokenCounter(tmp_path / "nowhere", "alpaca").measure([messages]) == []
