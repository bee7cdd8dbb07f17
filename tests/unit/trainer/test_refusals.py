"""The refusal rules do what their own examples say, and the engine what its parts promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.run_config import FilterConfig
from finetune_trainer.data.findings import Finding
from finetune_trainer.data.folding import EDGE_SENTENCES, FoldedText, find_original_span, fold
from finetune_trainer.data.formats import Conversation, parse_row
from finetune_trainer.data.refusals import RowFilter, RuleFilter, make_filter
from finetune_trainer.data.rules import CATEGORIES, Example, Rule, RuleError, _read_file, list_languages, read_rules
from finetune_trainer.errors import TrainerError

RULES = read_rules()
DEFAULT = make_filter(FilterConfig())


def judge(answer: str, instruction: str = "Go on.", row_filter: RowFilter = DEFAULT) -> Finding | None:
    return row_filter.judge(parse_row({"instruction": instruction, "output": answer}, "evol", {})).removal


def finds(rule: Rule, example: Example) -> bool:
    """Whether the rule, on its own, finds something in the example, and one of its anchors is there."""
    folded = FoldedText(example.answer)
    is_anchored = any(fold(anchor) in folded.text for anchor in rule.anchors)
    return is_anchored and bool(RuleFilter([rule]).judge(read_example(example)).findings)


def read_example(example: Example) -> Conversation:
    return parse_row({"instruction": example.question, "output": example.answer}, "evol", {})


@pytest.mark.parametrize(
    ("rule", "example"),
    [pytest.param(rule, one, id=f"{rule.id}-{number}") for rule in RULES for number, one in enumerate(rule.match)],
)
def test_a_rule_matches_its_examples_and_the_row_goes(rule: Rule, example: Example):
    assert finds(rule, example)
    removal = DEFAULT.judge(read_example(example)).removal
    assert removal is not None
    start, end = removal.span
    assert 0 <= start < end <= len(example.answer)


@pytest.mark.parametrize(
    ("rule", "example"),
    [pytest.param(rule, one, id=f"{rule.id}-{number}") for rule in RULES for number, one in enumerate(rule.doubt)],
)
def test_a_rule_finds_what_is_to_be_doubted_and_the_row_stays_for_a_judge(rule: Rule, example: Example):
    assert finds(rule, example)
    verdict = DEFAULT.judge(read_example(example))
    assert verdict.removal is None
    assert verdict.is_unsure


@pytest.mark.parametrize(
    "example", [pytest.param(one, id=f"{rule.id}-{n}") for rule in RULES for n, one in enumerate(rule.no_match)]
)
def test_no_rule_removes_a_counterexample(example: Example):
    assert judge(example.answer, example.question) is None


def test_every_language_has_rules_of_every_category():
    assert set(list_languages()) == {"de", "en", "es", "fr", "ja", "pt", "zh"}
    for language in list_languages():
        assert {rule.category for rule in read_rules(language)} == set(CATEGORIES)


RULE = """
language = "en"

[[rule]]
id = "en-refusal-help"
category = "refusal"
position = "opening"
weight = 0.5
anchors = ["help"]
pattern = "i can't help"
no_match = ["I can help."]
"""


@pytest.mark.parametrize("key", ["match", "doubt"])
def test_a_rule_needs_examples_that_it_must_remove_or_doubt(key, tmp_path):
    path = tmp_path / "en.toml"
    path.write_text(f'{RULE}{key} = ["I can\'t help."]\n', encoding="utf-8")
    (rule,) = _read_file(path)
    assert getattr(rule, key) == (Example("I can't help."),)
    path.write_text(f"{RULE}{key} = []\n", encoding="utf-8")
    with pytest.raises(RuleError, match=r"en-refusal-help: .* match or doubt"):
        _read_file(path)


def test_rule_names_are_unique():
    assert len({rule.id for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    "answer",
    [
        "I can\u2019t help with that.",
        "I\u00a0can't\u200b  help\nwith that.",
        "\uff29 can't help with that.",
        "> **I can't help with that.**",
        "I CAN'T HELP WITH THAT!",
    ],
)
def test_spelling_does_not_hide_a_refusal(answer):
    removal = judge(answer)
    assert removal is not None
    assert removal.category == "refusal"


def test_a_line_may_be_wrapped_inside_an_anchor():
    assert judge("It is Paris. As of my\nlast update in 2021, that was so.") is not None


def test_a_refusal_deep_inside_an_answer_is_a_story():
    story = "The guard looked up. " * 30
    assert judge("I can't help with that. " + story) is not None
    assert judge(story + "I can't help with that.") is None


def test_a_disclaimer_may_close_an_answer():
    recipe = "Stir the sauce until it is thick. " * 30
    assert judge(recipe + "This is not intended as medical advice.") is not None
    assert judge(recipe + "This is not intended as medical advice." + " Then serve it warm. " * 5) is None


def test_weak_rules_need_each_other():
    assert judge("I am not a doctor. Rest well.") is None
    assert judge("Rest well. Please consult a qualified healthcare professional.") is None
    assert judge("I am not a doctor. Rest well. Please consult a qualified healthcare professional.") is not None


def test_only_answers_are_searched_unless_fields_say_otherwise():
    refusal = "I can't help with that."
    assert judge("Yes.", instruction=refusal) is None
    asked = make_filter(FilterConfig(fields=("instruction",)))
    found = judge("Yes.", instruction=refusal, row_filter=asked)
    assert found is not None
    assert found.field == "instruction"
    assert judge(refusal, row_filter=asked) is None


def test_a_language_limits_the_rules():
    spanish = make_filter(FilterConfig(language="es"))
    assert judge("Lo siento, no puedo ayudar con eso.", row_filter=spanish) is not None
    assert judge("I can't help with that.", row_filter=spanish) is None


def test_refusals_false_removes_nothing_but_own_phrases():
    off = make_filter(FilterConfig(refusals=False, extra_phrases=("acme corp",)))
    assert judge("I can't help with that.", row_filter=off) is None
    assert judge("Ask ACME\u00a0Corp.", row_filter=off) == Finding("acme corp", "extra", "", "output", (4, 13))


def test_own_phrases_are_whole_words():
    own = make_filter(FilterConfig(extra_phrases=("an ai", "\u6a21\u578b")))
    assert judge("Used as an aid.", row_filter=own) is None
    assert judge("It is an AI, they said.", row_filter=own) is not None
    assert judge("\u8fd9\u662f\u6a21\u578b\u3002", row_filter=own) is not None


def test_every_turn_of_a_conversation_is_judged():
    turns = [("human", "Hi"), ("gpt", "Hello."), ("human", "Insult me."), ("gpt", "I won't do that. I can't help you.")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    removal = DEFAULT.judge(parse_row(row, "sharegpt", {})).removal
    assert removal is not None
    assert removal.field == "conversations[3].value"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FilterConfig(rules="strict"), "spec.dataset.filter.rules"),
        (FilterConfig(language="xx"), "spec.dataset.filter.language"),
        (FilterConfig(fields=("answer",)), "spec.dataset.filter.fields"),
    ],
)
def test_an_unknown_setting_is_refused_by_its_name(config, field):
    with pytest.raises(TrainerError, match=field) as caught:
        make_filter(config)
    assert "Use one of" in caught.value.hint


@given(st.text(max_size=200))
def test_folding_is_stable_and_spans_lie_in_the_original(text):
    folded = fold(text)
    assert fold(folded) == folded
    start, end = find_original_span(text, 0, len(folded))
    assert 0 <= start <= end <= len(text)


@given(st.text(max_size=300))
def test_no_text_upsets_the_engine(text):
    removal = judge(text or "x")
    assert removal is None or removal.span[1] <= len(text)


@given(st.text(alphabet="ab .!?\n*\u3002", max_size=80), st.integers(0, 700))
def test_the_last_sentences_are_found_from_the_end(text, padding):
    folded = FoldedText(text + "x" * padding + text)
    assert folded.closing_starts == folded.sentence_starts[-EDGE_SENTENCES:]
    assert folded.opening_starts == folded.sentence_starts[:EDGE_SENTENCES][: len(folded.opening_starts)]


@pytest.mark.parametrize(
    ("request_text", "answer", "stays"),
    [
        (
            "Translate into English: Lo siento, no puedo ayudarte con eso.",
            "I'm sorry, I can't help you with that.",
            True,
        ),
        ("Make this more polite: I can't help you.", "I'm sorry, but I can't help you.", True),
        ("Write a short refusal to a request for a loan.", "I'm sorry, but I can't help you with that.", True),
        ("Translate this insult: du Esel.", "I'm sorry, but I can't help you with that.", False),
        ("How do I pick a lock?", "I'm sorry, but I can't help you with that.", False),
    ],
)
def test_a_refusal_that_was_asked_for_refuses_nothing(request_text, answer, stays):
    assert (judge(answer, instruction=request_text) is None) is stays
