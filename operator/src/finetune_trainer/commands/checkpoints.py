"""`finetune-trainer checkpoints`: list, verify and plan checkpoints; needs no torch."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import disk, layout, retention
from finetune_trainer.checkpoints.manifest import ManifestError, read_manifest
from finetune_trainer.checkpoints.resume import Verdict, choose_resume, observe_checkpoints
from finetune_trainer.errors import TrainerError

ACTIONS = {
    "ls": "list the checkpoints and the one that would be resumed from",
    "verify": "the same after reading every byte and comparing digests",
    "plan": "also say what retention would delete, and how much room the next save needs",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action, the folder and the form of the output."""
    parser.add_argument("action", choices=list(ACTIONS), help="; ".join(f"{k}: {v}" for k, v in ACTIONS.items()))
    parser.add_argument("folder", metavar="DIR", help="folder with checkpoint-N folders, or a workspace")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--keep-latest", type=int, default=3, metavar="N", help="for plan (default: 3)")
    parser.add_argument("--keep-best", type=int, default=0, metavar="N", help="for plan (default: 0)")
    parser.add_argument("--best-metric", default="eval_loss", metavar="NAME", help="for plan (default: eval_loss)")
    parser.add_argument("--best-mode", default="min", choices=["min", "max"], help="for plan (default: min)")


def run(args: argparse.Namespace) -> int:
    """Print what was found; exit code 0 also when something is damaged, since that is the answer."""
    root = find_root(pathlib.Path(args.folder))
    verdicts = observe_checkpoints(root, full=args.action == "verify")
    chosen = choose_resume(verdicts)
    answer: dict[str, Any] = {
        "checkpoints": [_describe(verdict) for verdict in verdicts],
        "resumeFrom": str(chosen.path) if chosen else None,
    }
    if args.action == "plan":
        answer |= _plan(args, root)
    if args.json:
        json.dump(answer, sys.stdout, indent=1)
        print()
    else:
        _print(answer)
    return ExitCode.OK


def find_root(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder that holds the checkpoints: the one given, or that of the workspace given."""
    if not folder.is_dir():
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.NO_INPUT,
            f"{folder}: no such folder",
            "Name the folder that holds checkpoint-N folders.",
        )
    inside = folder / "checkpoints"
    return inside if inside.is_dir() and not layout.list_folders(folder) else folder


def _describe(verdict: Verdict) -> dict[str, Any]:
    described: dict[str, Any] = {
        "path": str(verdict.folder.path),
        "step": verdict.folder.step,
        "complete": verdict.is_complete,
        "problems": list(verdict.problems),
    }
    try:
        manifest = read_manifest(verdict.folder.path)
    except ManifestError:
        return described
    return described | {
        "bytes": manifest.num_bytes,
        "worldSize": manifest.world_size,
        "zeroStage": manifest.zero_stage,
        "attempt": manifest.attempt,
        "createdAt": manifest.created_at,
        "metrics": dict(manifest.metrics),
    }


def _plan(args: argparse.Namespace, root: pathlib.Path) -> dict[str, Any]:
    limits = retention.Limits(args.keep_latest, args.keep_best, args.best_mode)
    committed = retention.list_committed(root, args.best_metric)
    return {
        "wouldDelete": retention.select_surplus(committed, limits),
        "nextSaveBytes": disk.read_last_bytes(root),
        "freeBytes": disk.read_free_bytes(root),
    }


def _print(answer: dict[str, Any]) -> None:
    for checkpoint in answer["checkpoints"]:
        state = "complete" if checkpoint["complete"] else "NOT COMPLETE"
        size = disk.format_bytes(checkpoint["bytes"]) if "bytes" in checkpoint else "-"
        print(f"step {checkpoint['step']:>8}  {state:<12}  {size:>10}  {checkpoint['path']}")
        for problem in checkpoint["problems"]:
            print(f"               {problem}")
    print(f"resume from: {answer['resumeFrom'] or 'nothing, training would begin anew'}")
    if "wouldDelete" in answer:
        steps = ", ".join(map(str, answer["wouldDelete"])) or "none"
        free, needed = disk.format_bytes(answer["freeBytes"]), disk.format_bytes(answer["nextSaveBytes"])
        print(f"retention would delete: {steps}; the next save needs {needed}, free are {free}")
