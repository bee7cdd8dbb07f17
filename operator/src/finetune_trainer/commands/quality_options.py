"""`prepare --quality ...`: the quality checks of plain use, as arguments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import PII_KINDS, QUALITY_ACTIONS, QualityConfig
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import argparse

CHECKS = ("truncated", "repetition", "html", "special-tokens", "language", "pii", "duplicates", "contamination")


def add_quality_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the arguments to the group of plain use."""
    parser.add_argument(
        "--quality",
        metavar="CHECK[=ACTION]",
        action="append",
        default=[],
        help=f"look for more than refusals: {', '.join(CHECKS)}; remove-row (default) or flag. May be repeated",
    )
    parser.add_argument("--expect-language", metavar="CODES", default="", help="languages of the answers, as in en,de")
    parser.add_argument("--pii-kinds", metavar="KINDS", default="", help=f"what is personal: {','.join(PII_KINDS)}")
    parser.add_argument(
        "--similarity", type=float, default=1.0, help="of duplicates: 1 equal (default), 0.5 to 1 also near ones"
    )
    parser.add_argument(
        "--tasks", metavar="NAMES", default="", help="for contamination: evaluation tasks, task files or .txt files"
    )


def build_quality(args: argparse.Namespace) -> QualityConfig:
    """Return the settings that the arguments give. Raises TrainerError."""
    actions: dict[str, Any] = {}
    for item in args.quality:
        name, _, action = item.partition("=")
        if name not in CHECKS:
            raise _refuse(f"--quality {name}: no such check", f"Use one of {', '.join(CHECKS)}.")
        if (action or QUALITY_ACTIONS[0]) not in QUALITY_ACTIONS:
            raise _refuse(f"--quality {item}: no such action", f"Use one of {', '.join(QUALITY_ACTIONS)}.")
        actions[name.replace("-", "_")] = action or QUALITY_ACTIONS[0]
    for option, check in (("expect_language", "language"), ("pii_kinds", "pii"), ("tasks", "contamination")):
        if getattr(args, option) and check not in actions:
            raise _refuse(f"--{option.replace('_', '-')} without its check", f"Add --quality {check}.")
    for option, check in (("expect_language", "language"), ("tasks", "contamination")):
        if check in actions and not getattr(args, option):
            raise _refuse(f"--quality {check} alone", f"Add --{option.replace('_', '-')} and what is meant.")
    if args.similarity != 1 and "duplicates" not in actions:
        raise _refuse("--similarity without its check", "Add --quality duplicates.")
    if not 0.5 <= args.similarity <= 1:
        raise _refuse(f"--similarity {args.similarity}: out of range", "Write 0.5 to 1.")
    return dataclasses.replace(
        QualityConfig(**actions),
        languages=_split(args.expect_language),
        pii_kinds=_split(args.pii_kinds) or PII_KINDS,
        similarity=args.similarity,
        contamination_tasks=_split(args.tasks),
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _refuse(message: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)
