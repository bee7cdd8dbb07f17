"""`finetune-trainer weight-diff`: a tuned model as the difference from its base, and back to the byte."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode
from finetune_trainer.reporting import ProgressBar

if TYPE_CHECKING:
    import argparse

_HELP = {
    "make": "write what changed from a base model to a tuned one",
    "recover": "write the tuned model from its base and a diff",
    "verify": "read a diff, and models if named, and compare every byte with what was recorded",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their folders."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in _HELP.items():
        action = actions.add_parser(name, help=text, description=text.capitalize() + ".")
        required = name != "verify"
        action.add_argument(
            "--base", metavar="DIR", type=pathlib.Path, required=required, help="model that was tuned (safetensors)"
        )
        if name != "recover":
            action.add_argument(
                "--tuned", metavar="DIR", type=pathlib.Path, required=required, help="model that came of it"
            )
        if name != "make":
            action.add_argument("--diff", metavar="DIR", type=pathlib.Path, required=True, help="folder made by make")
        if required:
            action.add_argument("--out", metavar="DIR", type=pathlib.Path, required=True, help="folder to write; new")
        action.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Make, recover or verify."""
    facts = {"make": _make, "recover": _recover, "verify": _verify}[args.action](args)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    return ExitCode.OK


def _make(args: argparse.Namespace) -> dict[str, object]:
    from finetune_trainer.weight_diff.make import make_diff

    with ProgressBar("subtracting", _count_bytes(args.tuned, "--tuned"), "B") as bar:
        made = make_diff(args.base, args.tuned, args.out, bar.advance)
    return {
        "base": f"{made.record.base_name} {made.record.base_digest}",
        "tuned": f"{made.record.tuned_name} {made.record.tuned_digest}",
        "tensors": len(made.record.tensors),
        "onlyInBase": list(made.dropped),
        "diffBytes": made.diff_bytes,
        "tunedBytes": made.tuned_bytes,
        "ratio": round(made.diff_bytes / max(made.tuned_bytes, 1), 4),
    }


def _recover(args: argparse.Namespace) -> dict[str, object]:
    from finetune_trainer.weight_diff.recover import recover_model

    with ProgressBar("adding", None, "B") as bar:
        record = recover_model(args.base, args.diff, args.out, bar.advance)
    return {"tuned": f"{record.tuned_name} {record.tuned_digest}", "tensors": len(record.tensors), "out": str(args.out)}


def _verify(args: argparse.Namespace) -> dict[str, object]:
    from finetune_trainer.weight_diff.recover import verify_diff, verify_side

    record = verify_diff(args.diff)
    facts: dict[str, object] = {"diff": "whole"}
    for side in ("base", "tuned"):
        folder = getattr(args, side)
        if folder is not None:
            with ProgressBar(f"reading the {side} model", _count_bytes(folder, f"--{side}"), "B") as bar:
                verify_side(record, folder, side, bar.advance)
            facts[side] = f"{getattr(record, f'{side}_name')} {getattr(record, f'{side}_digest')}"
    return facts


def _count_bytes(folder: pathlib.Path, option: str) -> int:
    from finetune_trainer.weight_diff.tensors import list_tensors

    return sum(tensor.num_bytes for tensor in list_tensors(folder, option).values())
