"""`prepare --judge ...`: the judge of plain use, as arguments, and the judge that arguments or a job ask for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import JUDGED_ROWS, JudgeConfig
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import ProgressBar

if TYPE_CHECKING:
    import argparse
    import pathlib

    from finetune_contract.run_config import DatasetConfig
    from finetune_trainer.data.judge import Judge, Score


def add_judge_arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the arguments to the group of plain use."""
    usual = JudgeConfig()
    parser.add_argument(
        "--judge", metavar="DIR", default="", help="sequence classifier that judges rows beside the rules"
    )
    parser.add_argument(
        "--judge-rows",
        choices=JUDGED_ROWS,
        default=usual.rows,
        help="it decides rows the rules doubt, or all they keep (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-label", metavar="NAME", action="append", default=[], help="its label, or number, of rows to remove"
    )
    parser.add_argument(
        "--judge-threshold", metavar="P", type=float, default=usual.threshold, help="probability that removes a row"
    )
    parser.add_argument(
        "--judge-text", metavar="TEXT", default=usual.text, help="what is judged, with {instruction} and {output}"
    )
    parser.add_argument(
        "--judge-audit",
        metavar="SHARE",
        type=float,
        default=usual.audit_fraction,
        help="share of the rows the rules are sure of to judge too, for the report",
    )


def build_judge_config(args: argparse.Namespace) -> JudgeConfig:
    """Return the settings that the arguments give. Raises TrainerError."""
    if "{output}" not in args.judge_text:
        raise _refuse("--judge-text without {output}", "Write {output} where the answer belongs.")
    for option in ("judge_threshold", "judge_audit"):
        if not 0 <= getattr(args, option) <= 1:
            raise _refuse(f"--{option.replace('_', '-')} {getattr(args, option)}: out of range", "Write 0 to 1.")
    config = JudgeConfig(
        args.judge,
        labels=tuple(args.judge_label),
        threshold=args.judge_threshold,
        audit_fraction=args.judge_audit,
        text=args.judge_text,
        rows=args.judge_rows,
    )
    if not args.judge and config != JudgeConfig():
        raise _refuse("options of a judge without --judge", "Add --judge DIR.")
    return config


def _refuse(what: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, what, hint)


def fetch_judge(
    dataset: DatasetConfig, root: pathlib.Path, downloads: pathlib.Path
) -> tuple[DatasetConfig, Judge | None]:
    """Return the settings with the digest of the judge's files, and the judge, which is loaded later."""
    if not dataset.judge.source:
        return dataset, None
    from finetune_trainer import fetch
    from finetune_trainer.data.judge import Judge

    with ProgressBar("reading the judge", None, "B") as bar:
        folder, digest = fetch.fetch_judge(dataset.judge, root, downloads, bar.advance)

    def load() -> Score:
        from finetune_trainer.classifier import load_classifier

        return load_classifier(folder, dataset.judge.labels).score

    config = dataclasses.replace(dataset.judge, digest=digest)
    return dataclasses.replace(dataset, judge=config), Judge(config, load)
