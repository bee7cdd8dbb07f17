"""`finetune-trainer checkpoints`: the checkpoint doctor. Needs no torch, and reads checkpoints of any Trainer."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import pathlib
import sys
import time
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import disk, doctor, forecast, prune, repair
from finetune_trainer.checkpoints.doctor import Diagnosis
from finetune_trainer.checkpoints.retention import Limits
from finetune_trainer.commands import checkpoints_output as output
from finetune_trainer.errors import TrainerError

ACTIONS = {
    "ls": "list the checkpoints, what is wrong with them, and the one to resume from; reads names, sizes and headers",
    "verify": "the same after reading every byte and comparing digests and checksums",
    "plan": "say what checkpoints will need on the disk, what fits, and what retention would delete",
    "prune": "delete what retention does not keep; only says what it would delete, unless --yes is given",
    "repair": "mend what can be mended without inventing data, set the rest aside; says what it would do, unless --yes",
}
EXIT_CODES = """\
exit codes:
  0   there is a checkpoint to resume from, and nothing is damaged;
      ls, verify and plan with --json: the answer was printed, its "status" is ok, damaged or none
  3   there is a checkpoint to resume from, and others are damaged or unfinished
  4   there is nothing to resume from
  5   plan: the disk is too small; prune, repair: something could not be done
  64  wrong command line    66  DIR is no folder    80  prune: an attempt has started there meanwhile
"""
DESCRIPTION = """\
Tell which checkpoints of a folder are whole, which one to resume from and why, and mend or delete the others. Reads our
checkpoints, and those of any Hugging Face Trainer, alone or with DeepSpeed. Nothing is unpickled.
"""


class State(enum.IntEnum):
    """How the checkpoints of a folder stand, as an exit code."""

    OK = 0
    DAMAGED = 3
    NOTHING = 4
    INCOMPLETE = 5
    """What was asked for could not be done, or does not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with its own options."""
    parser.description, parser.epilog = DESCRIPTION, EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, summary in ACTIONS.items():
        action = actions.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        action.add_argument(
            "folder", metavar="DIR", help="folder with checkpoint-N folders, one of these, or a workspace"
        )
        action.add_argument("--json", action="store_true", help="print one JSON object")
        if name in ("plan", "prune"):
            _add_retention(action)
        if name == "plan":
            _add_size(action)
        if name in ("prune", "repair"):
            action.add_argument("--yes", action="store_true", help="do it; without this nothing is changed")
        if name == "prune":
            action.add_argument(
                "--protect", action="append", default=[], metavar="STEP", help="keep it; can be repeated"
            )
            action.add_argument(
                "--garbage", action="store_true", help="also delete what is damaged and older than the newest"
            )
        if name == "repair":
            action.add_argument(
                "--now", action="store_true", help="no training runs: mend a newest one just written to, too"
            )


def _add_retention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-latest", type=int, default=3, metavar="N", help="newest checkpoints to keep (default: 3)"
    )
    parser.add_argument("--keep-best", type=int, default=0, metavar="N", help="best ones beside them (default: 0)")
    parser.add_argument("--best-metric", default="eval_loss", metavar="NAME", help="what is best (default: eval_loss)")
    parser.add_argument(
        "--best-mode", default="min", choices=["min", "max"], help="min: lower is better (default: min)"
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--model", metavar="DIR", help="model folder with safetensors, or config.json")
    size.add_argument("--parameters", type=int, metavar="N", help="number of parameters, such as 6738415616")
    parser.add_argument("--trained-parameters", type=int, metavar="N", help="LoRA: those of the adapter (default: all)")
    parser.add_argument(
        "--zero-stage", type=int, choices=[1, 2, 3], help="default: that of the newest checkpoint, or 3"
    )


def run(args: argparse.Namespace) -> int:
    """Carry out one action, and return the exit code."""
    root = doctor.find_root(pathlib.Path(args.folder))
    diagnosis = doctor.examine_folder(root, full=args.action in ("verify", "repair"))
    actions = {"plan": _plan, "prune": _prune, "repair": _repair}
    answer, state = actions[args.action](args, diagnosis) if args.action in actions else ({}, None)
    if answer.pop("changed", False):
        diagnosis = doctor.examine_folder(root, full=args.action == "repair")
    state = judge(diagnosis) if state is None else state
    if args.json:
        json.dump({**output.describe(diagnosis, judge(diagnosis).name.lower()), **answer}, sys.stdout, indent=1)
        print()
        return ExitCode.OK if args.action in ("ls", "verify", "plan") else state
    print(output.build_text(diagnosis, args.action, answer, root))
    return state


def judge(diagnosis: Diagnosis) -> State:
    """Return how the checkpoints stand."""
    if diagnosis.chosen is None:
        return State.NOTHING
    return State.OK if diagnosis.is_sound else State.DAMAGED


def _limits(args: argparse.Namespace) -> Limits:
    if args.keep_latest < 1 or args.keep_best < 0:
        name, least = ("--keep-latest", 1) if args.keep_latest < 1 else ("--keep-best", 0)
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, f"{name}: give {least} or more")
    return Limits(args.keep_latest, args.keep_best, args.best_mode)


def _plan(args: argparse.Namespace, diagnosis: Diagnosis) -> tuple[dict[str, Any], State | None]:
    limits = _limits(args)
    planned = prune.plan_prune(diagnosis, limits, args.best_metric, (), with_garbage=False)
    newest = diagnosis.chosen
    stage = args.zero_stage or (newest.facts.zero_stage if newest and newest.facts.zero_stage else 3)
    free = disk.read_free_bytes(diagnosis.root)
    there = sum(one.facts.num_bytes for one in diagnosis.checkpoints if one.path in planned.kept and one.is_complete)
    need, parameters = _estimate(args, diagnosis, stage, limits.latest + limits.best)
    has_room = need["ours"].peak_bytes - there <= free
    answer = {
        "wouldDelete": [one.step for one in diagnosis.checkpoints if one.path in planned.surplus],
        "nextSaveBytes": need["ours"].checkpoint_bytes,
        "freeBytes": free,
        "parameters": parameters,
        "zeroStage": stage,
        "keep": limits.latest + limits.best,
        "need": {name: output.to_camel(dataclasses.asdict(one)) for name, one in need.items()},
        "fits": free // need["ours"].checkpoint_bytes if need["ours"].checkpoint_bytes else None,
        "hasRoom": has_room,
    }
    if not has_room:
        return answer, State.INCOMPLETE
    # To plan for a disk that is still empty is no failure.
    return answer, None if diagnosis.checkpoints else State.OK


def _estimate(
    args: argparse.Namespace, diagnosis: Diagnosis, stage: int, num_kept: int
) -> tuple[dict[str, forecast.Need], int | None]:
    """Return the need of our checkpoints and of the stock Trainer's, and the parameters where they are known."""
    parameters = forecast.count_parameters(pathlib.Path(args.model)) if args.model else args.parameters
    if parameters is None:
        measured = diagnosis.chosen.facts.num_bytes if diagnosis.chosen else 0
        need = forecast.Need(measured, (num_kept + 1) * measured)
        return {"ours": need, "stock": need}, None
    trained = args.trained_parameters or parameters
    if not 0 < trained <= parameters:
        message = f"{trained} trained of {parameters} parameters cannot be"
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, "Give numbers above 0.")
    is_adapter = trained < parameters
    kinds = {"ours": is_adapter, "stock": True}
    return {
        name: forecast.estimate_need(parameters, trained, stage, num_kept, has_gathered_weights=gathers)
        for name, gathers in kinds.items()
    }, parameters


def _prune(args: argparse.Namespace, diagnosis: Diagnosis) -> tuple[dict[str, Any], State | None]:
    fence = prune.build_fence(diagnosis.root)
    confirmed = doctor.confirm_newest(diagnosis)
    protected = prune.parse_protected(args.protect)
    planned = prune.plan_prune(confirmed, _limits(args), args.best_metric, protected, with_garbage=args.garbage)
    failed = prune.delete_planned(planned, fence) if args.yes else []
    gone = [str(path) for path in (*planned.garbage, *planned.surplus) if path not in failed]
    answer: dict[str, Any] = {
        "deleted" if args.yes else "wouldDelete": gone,
        "kept": [str(path) for path in planned.kept],
        "freedBytes": planned.freed_bytes,
        "failed": [str(path) for path in failed],
        "changed": args.yes,
    }
    return answer, State.INCOMPLETE if failed else None


def _repair(args: argparse.Namespace, diagnosis: Diagnosis) -> tuple[dict[str, Any], State | None]:
    repairs = repair.plan_repairs(diagnosis, None if args.now else time.time())
    refused = repair.carry_out(diagnosis.root, repairs) if args.yes else []
    answer: dict[str, Any] = {
        "repairs": [{"path": str(one.path), "kind": one.kind, "what": one.text} for one in repairs],
        "refused": refused,
        "done": args.yes,
        "changed": args.yes,
    }
    return answer, State.INCOMPLETE if refused else None
