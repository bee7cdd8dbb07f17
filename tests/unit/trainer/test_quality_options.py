"""`prepare --quality`: what the arguments mean, and which are refused."""

from __future__ import annotations

import argparse

import pytest

from finetune_contract.run_config import PII_KINDS, QualityConfig
from finetune_trainer.commands.quality_options import add_quality_arguments, build_quality
from finetune_trainer.errors import TrainerError


def parse(*arguments: str) -> QualityConfig:
    parser = argparse.ArgumentParser()
    add_quality_arguments(parser.add_argument_group("plain"))
    return build_quality(parser.parse_args(arguments))


def test_without_arguments_nothing_is_checked():
    assert parse() == QualityConfig()


def test_checks_have_actions_and_their_own_settings():
    config = parse(
        *("--quality", "html", "--quality", "special-tokens=flag", "--quality", "pii", "--pii-kinds", "email,iban"),
        *("--quality", "language=flag", "--expect-language", "en, de", "--quality", "duplicates"),
        *("--similarity", "0.8", "--quality", "contamination", "--tasks", "gsm8k,own.yaml,texts.txt"),
    )
    assert (config.html, config.special_tokens, config.truncated) == ("remove-row", "flag", "")
    assert (config.pii, config.pii_kinds) == ("remove-row", ("email", "iban"))
    assert (config.language, config.languages) == ("flag", ("en", "de"))
    assert (config.duplicates, config.similarity) == ("remove-row", 0.8)
    assert config.contamination_tasks == ("gsm8k", "own.yaml", "texts.txt")
    assert parse("--quality", "pii").pii_kinds == PII_KINDS


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--quality", "spelling"], "no such check"),
        (["--quality", "html=remove-sentence"], "no such action"),
        (["--quality", "language"], "--quality language alone"),
        (["--quality", "contamination"], "--quality contamination alone"),
        (["--expect-language", "en"], "--expect-language without"),
        (["--tasks", "gsm8k"], "--tasks without"),
        (["--pii-kinds", "email"], "--pii-kinds without"),
        (["--similarity", "0.8"], "--similarity without"),
        (["--quality", "duplicates", "--similarity", "0.2"], "out of range"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(arguments, wrong):
    with pytest.raises(TrainerError, match=wrong):
        parse(*arguments)
