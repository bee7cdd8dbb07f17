"""`finetune-trainer judge train`: a classifier for `prepare --judge`, from rows that somebody has labelled."""

from __future__ import annotations

import pathlib
import shlex
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from finetune_trainer.data.labelled import LabelledRow
    from finetune_trainer.judge_training import JudgeTraining

CARD = "README.md"
_TEXT = "{instruction}\n\n{output}"
_THRESHOLD = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser("train", help="train a judge", description="Train a judge of the data.")
    train.add_argument(
        "--data",
        metavar="FILE",
        type=pathlib.Path,
        action="append",
        required=True,
        help='rows with a "label" of "remove" or "keep", in any format that prepare reads; may be given again',
    )
    train.add_argument("--base", metavar="DIR", type=pathlib.Path, required=True, help="pretrained encoder, local")
    train.add_argument("--out", metavar="DIR", type=pathlib.Path, required=True, help="folder to write; new")
    train.add_argument("--text", default=_TEXT, help="what is judged (default: instruction, empty line, output)")
    train.add_argument("--held-back", metavar="SHARE", type=float, default=0.1, help="rows to test by (default: 0.1)")
    train.add_argument("--seed", type=int, default=0, help="of the split and the training (default: 0)")
    for name, kind, what in (
        ("epochs", int, "times that each row is seen"),
        ("learning-rate", float, "highest learning rate"),
        ("max-length", int, "tokens of a row; the rest is cut off"),
        ("frozen-layers", int, "lowest layers to leave as they are: faster, and safer with few rows"),
    ):
        train.add_argument(f"--{name}", type=kind, help=what)


def run(args: argparse.Namespace) -> int:
    """Train, test on the rows held back, write folder and card."""
    from finetune_trainer.data.labelled import read_labelled
    from finetune_trainer.judge_training import JudgeTraining, train_judge
    from finetune_trainer.weight_diff.files import fresh_folder

    _check(args)
    given = {name: getattr(args, name) for name in ("epochs", "learning_rate", "max_length", "frozen_layers")}
    how = JudgeTraining(seed=args.seed, **{name: value for name, value in given.items() if value is not None})
    rows = read_labelled(args.data, args.text, args.seed)
    tested = [row for row in rows if row.share < args.held_back]
    trained = [row for row in rows if row.share >= args.held_back]
    if len({row.label for row in trained}) < 2:
        raise _refuse(
            f"--held-back {args.held_back} leaves rows of one label only", "Label more rows, or hold back fewer."
        )
    judge = train_judge(trained, args.base, how)
    removed = [score >= _THRESHOLD for score in judge.score([row.text for row in tested])]
    card = build_card(args, how, trained, list(zip(tested, removed, strict=True)))
    with fresh_folder(args.out) as folder:
        judge.save(folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    print(card)
    return ExitCode.OK


def _check(args: argparse.Namespace) -> None:
    if "{output}" not in args.text:
        raise _refuse("--text without {output}", "Write {output} where the answer belongs.")
    if not 0 <= args.held_back < 1:
        raise _refuse(f"--held-back {args.held_back}: out of range", "Write 0 or more, and less than 1.")
    for name, least in (("epochs", 1), ("max_length", 8), ("frozen_layers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise _refuse(f"--{name.replace('_', '-')} {value}: out of range", f"Write {least} or more.")
    if args.learning_rate is not None and not 0 < args.learning_rate < 1:
        raise _refuse(f"--learning-rate {args.learning_rate}: out of range", "Write more than 0, and less than 1.")
    if args.out.exists():
        raise _refuse(f"--out {args.out} is there already", "Name a new folder.")


def _refuse(what: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, what, hint)


def build_card(
    args: argparse.Namespace,
    how: JudgeTraining,
    trained: Sequence[LabelledRow],
    tested: Sequence[tuple[LabelledRow, bool]],
) -> str:
    """Return what the judge was trained on, how, and how well it does on rows held back, each with its verdict."""
    use = ["finetune-trainer", "prepare", "--source", "FILE", "--out", "DIR", "--judge", str(args.out)]
    use += ["--judge-rows", "all", "--judge-text", args.text]
    settings = ", ".join(
        f"{name.replace('_', ' ')} {getattr(how, name)}"
        for name in ("epochs", "learning_rate", "batch_size", "max_length", "frozen_layers", "seed")
    )
    return "\n".join(
        [
            "# A judge of instruction data",
            "",
            "Says of a row whether to `keep` or to `remove` it.",
            f"Trained from {args.base} by `finetune-trainer judge train`.",
            "",
            "| Rows | All | Labelled `remove` |",
            "|---|---:|---:|",
            f"| trained on | {len(trained)} | {sum(row.label for row in trained)} |",
            f"| held back | {len(tested)} | {sum(row.label for row, _ in tested)} |",
            "",
            _describe_test(tested),
            "",
            f"Data: {', '.join(path.name for path in args.data)}. Settings: {settings}.",
            "The base's licence holds for this model too.",
            "",
            "```",
            shlex.join(use),
            "```",
            "",
        ]
    )


def _describe_test(tested: Sequence[tuple[LabelledRow, bool]]) -> str:
    if not tested:
        return "No rows were held back, so nothing is known of how well it does."
    right = sum(removed == bool(row.label) for row, removed in tested)
    hits = sum(removed and row.label for row, removed in tested)
    num_removed, to_remove = sum(removed for _, removed in tested), sum(row.label for row, _ in tested)
    return (
        f"Of the rows held back it judges {right} rightly (accuracy {right / len(tested):.3f}): at a threshold of "
        f"{_THRESHOLD} it removes {num_removed}, {hits} of them rightly, of {to_remove} that are to be removed."
    )
