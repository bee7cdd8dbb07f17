"""Legacy mode is the old scripts: the same rows go, for the same phrase, with all their faults."""

from __future__ import annotations

import json
import pathlib

from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.formats import parse_row
from finetune_trainer.data.refusals import make_filter
from finetune_trainer.data.rules import parse_phrases, read_legacy_phrases

LEGACY = FilterConfig(rules="legacy")


def first_phrase_by_loop(phrases, texts):
    """Return what the old scripts stopped at: the first phrase, in list order, of the first text that has one."""
    for text in texts:
        for phrase in phrases:
            if phrase.lower() in text.lower():
                return phrase
    return None


def judge(phrases, output, instruction="Go on.", config=LEGACY) -> Finding | None:
    row = {"instruction": instruction, "output": output}
    return make_filter(config, phrases).judge(parse_row(row, "evol", {})).removal


def test_the_known_faults_of_old_lists_are_reproduced(instructions: pathlib.Path):
    phrases = parse_phrases((instructions / "legacy-phrases.txt").read_text())
    for row in json.loads((instructions / "legacy-rows.json").read_text()):
        removal = judge(phrases, row["output"])
        verdict = "kept" if removal is None else f"removed:{removal.rule}"
        assert verdict == row["expected"], row["output"]


words = st.text(alphabet="aAbB \u0130\u00dfs'\u2019", max_size=6)


@given(st.lists(words, max_size=8), words, words)
def test_every_verdict_equals_that_of_the_naive_loop(phrases, instruction, output):
    instruction = instruction if instruction.strip() else "x"
    removal = judge(phrases, output, instruction)
    assert (None if removal is None else removal.rule) == first_phrase_by_loop(phrases, [instruction, output])


@given(st.lists(words.filter(bool), min_size=1, max_size=5), words)
def test_the_span_holds_the_phrase(phrases, output):
    removal = judge(phrases, output, instruction="\u00fc")
    if removal is not None:
        start, end = removal.span
        assert removal.rule.lower() in output[start:end].lower() or "\u0130" in output


def test_instruction_and_output_are_searched_unless_fields_are_chosen():
    assert judge(["taboo"], "fine", instruction="Taboo?") is not None
    only_output = FilterConfig(rules="legacy", fields=("output",))
    assert judge(["taboo"], "fine", instruction="Taboo?", config=only_output) is None
    assert judge(["taboo"], "a TABOO", config=only_output) is not None


def test_every_turn_of_a_conversation_is_searched():
    row = {"conversations": [{"from": "human", "value": "a taboo"}, {"from": "gpt", "value": "fine"}]}
    removal = make_filter(LEGACY, ["taboo"]).judge(parse_row(row, "sharegpt", {})).removal
    assert removal == Finding("taboo", "legacy", "", "conversations[0].value", (2, 7))


def test_the_built_in_list_is_in_the_style_of_the_old_ones():
    phrases = read_legacy_phrases()
    assert len(phrases) > 50
    assert len(set(phrases)) == len(phrases)
    removal = judge(None, "It was used as an aid.")
    assert removal is not None
    assert removal.rule == "as an ai"


def test_extra_phrases_join_the_list():
    config = FilterConfig(rules="legacy", extra_phrases=("zebra",))
    assert judge(None, "ZEBRAS run.", config=config) is not None
