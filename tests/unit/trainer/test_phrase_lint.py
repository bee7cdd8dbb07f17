"""The linter of phrase lists finds the faults that old lists carried for years, and says what they do to the data."""

from __future__ import annotations

import json
import pathlib

import pytest

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.formats import parse_row
from finetune_trainer.data.phrase_lint import Effects, find_problems, parse_entries
from finetune_trainer.data.refusals import make_filter


def list_kinds(*lines: str) -> list[list[str]]:
    entries = parse_entries("\n".join(lines))
    find_problems(entries)
    return [[problem.kind for problem in entry.problems] for entry in entries]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("remain human safetyethical principlesharmful to people", "fused"),
        ("know until September 2021as a language model", "fused"),
        ('"avoid harm" "cannot provide"', "fused"),
        ("c\\u00f3digos", "dead-escape"),
        ("bad\\_language", "dead-escape"),
        ("don\\'t", "dead-escape"),
        ('"I cannot",', "copied-syntax"),
        ("I cannot,", "copied-syntax"),
        (" I cannot", "outer-space"),
        ("I cannot ", "outer-space"),
        ("I\u00a0cannot", "unseen-character"),
        ("I can\u200bnot", "unseen-character"),
        ("c\u00c3\u00b3digos", "encoding"),
        ("na\u0303o posso", "accents"),
        ("# refusals", "comment"),
        ("ai", "too-short"),
    ],
)
def test_a_fault_is_found(line, kind):
    assert kind in list_kinds(line)[0]


@pytest.mark.parametrize(
    "line",
    [
        "as a language model",
        "I'm sorry, but",
        "OpenAI",
        "September 2021",
        "n\u00e3o posso",
        "\u62b1\u6b49",
        "13b models",
    ],
)
def test_a_good_line_is_left_alone(line):
    assert list_kinds(line) == [[]]


def test_lines_are_compared_in_the_case_that_legacy_mode_compares():
    kinds = list_kinds("As an AI", "as an ai", "as an ai model", "diversity", "bias", "diversitybias")
    assert kinds == [[], ["duplicate"], ["contained"], [], [], ["fused"]]


def test_a_line_of_a_copied_list_without_its_comma_is_found():
    assert [("fused" in kinds) for kinds in list_kinds('"one two",', '"three four"', '"five six",', '"last one"')] == [
        False,
        True,
        False,
        False,
    ]


def test_the_effects_are_those_of_legacy_mode():
    lines = ["bias", "unbiased", "as an ai", "never", "Bias"]
    rows = ["An unbiased view.", "A bias.", "Used as an aid.", "Nothing.", "Bias as an AI."]
    entries = parse_entries("\n".join(lines))
    effects = Effects(entries)
    for row in rows:
        effects.add(["Go on.", row])
    assert [entry.num_rows for entry in entries] == [3, 1, 2, 0, 3]
    assert [entry.num_rows_alone for entry in entries] == [0, 0, 1, 0, 0]
    assert (effects.num_rows, effects.num_removed) == (5, 4)
    assert entries[2].words == {"as an aid": 1}
    for index, entry in enumerate(entries):
        rest = [line for place, line in enumerate(lines) if place != index]
        assert count_removed(lines, rows) - count_removed(rest, rows) == entry.num_rows_alone


def count_removed(phrases: list[str], answers: list[str]) -> int:
    legacy = make_filter(FilterConfig(rules="legacy"), phrases)
    rows = [parse_row({"instruction": "Go on.", "output": answer}, "evol", {}) for answer in answers]
    return sum(legacy.judge(row).removal is not None for row in rows)


def test_words_of_the_data_are_shown_and_words_it_knows_are_not_split():
    entries = parse_entries("aid\nthe cyberprinciples are")
    effects = Effects(entries)
    for text in ("He said it.", "She said so.", "First aid."):
        effects.add([text])
    find_problems(entries, ["cyberprinciples"])
    assert "said (2)" in entries[0].problems[0].message
    assert entries[1].problems == []


def test_the_command_prints_problems_and_effects(run_command, instructions: pathlib.Path, capsys):
    phrases, rows = instructions / "legacy-phrases.txt", instructions / "legacy-rows.json"
    assert run_command("lint-phrases", str(phrases), "--source", str(rows)).code == 0
    printed = capsys.readouterr().out
    for fragment in ("line 1:", "fused", "dead-escape", "as an airline (1)", "the same as line 5", "rows removed"):
        assert fragment in printed
    assert run_command("lint-phrases", str(phrases), "--source", str(rows), "--json").code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["errors"] == 3
    assert answer["rowsRemoved"] == sum(one["expected"] != "kept" for one in json.loads(rows.read_text()))
    entry = next(one for one in answer["entries"] if one["phrase"] == "As an AI")
    assert entry["rowsAlone"] <= entry["rows"] == 2


def test_only_strict_fails_over_errors(run_command, instructions: pathlib.Path, tmp_path):
    good = tmp_path / "good.txt"
    good.write_text("as a language model\n")
    assert run_command("lint-phrases", str(instructions / "legacy-phrases.txt"), "--strict").code == ExitCode.DATA
    assert run_command("lint-phrases", str(good), "--strict").code == ExitCode.OK


def test_a_list_that_cannot_be_read_is_named(run_command, tmp_path, capsys):
    assert run_command("lint-phrases", str(tmp_path / "none.txt")).code == ExitCode.NO_INPUT
    assert "none.txt: cannot be read" in capsys.readouterr().err
