"""`finetune-trainer report`: what came of a run, as a page, as JSON and as a model card, from the files it has left."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.commands.common import add_run_config_argument, load_run_config
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion.promoted import MANIFEST

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_run_config_argument(parser)
    parser.add_argument("--workspace", metavar="DIR", help="folder with checkpoints, output and reports of a run")
    parser.add_argument("--digest", metavar="DIGEST", help="promoted model to report on (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Gather, write, and say where."""
    from finetune_trainer.report.facts import build_report
    from finetune_trainer.report.write import write_report

    settings = load_run_config(args) if args.run_config or args.workspace is None else None
    workspace = Workspace(pathlib.Path(args.workspace or (settings.workspace if settings else "")).resolve())
    if not workspace.root.is_dir():
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.NO_INPUT,
            f"--workspace {workspace.root}: there is no such folder",
            "Name the folder that the run was given as its workspace.",
        )
    digest = _choose_digest(workspace, args.digest or (settings.promotion.digest if settings else ""))
    report = build_report(workspace, settings, digest)
    page = write_report(workspace, report)
    print(json.dumps(report, indent=1, sort_keys=True) if args.json else page)
    return ExitCode.OK


def _choose_digest(workspace: Workspace, wanted: str) -> str:
    """Return the whole digest that was named by its beginning, else that of the newest model; empty: there is none."""
    known = [path.parent for path in workspace.output.glob(f"*/{MANIFEST}")]
    found = [folder for folder in known if folder.name.startswith(wanted)]
    if wanted and len(found) != 1:
        names = ", ".join(sorted(folder.name[:12] for folder in known)) or "none"
        raise TrainerError(
            Reason.MODEL_NOT_FOUND,
            ExitCode.NO_INPUT,
            f"--digest {wanted}: {len(found)} promoted models in {workspace.output} begin so",
            f"There are: {names}.",
        )
    return max(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime).name if found else ""
