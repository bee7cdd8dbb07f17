"""What several subcommands share: the run's settings, and the lock that keeps two jobs off one workspace."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING

from finetune_contract import environment
from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import argparse


def add_run_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--run-config`; without it the environment names the file."""
    parser.add_argument(
        "--run-config",
        metavar="FILE",
        default=os.environ.get(environment.RUN_CONFIG),
        help=f"the run's settings as JSON (default: ${environment.RUN_CONFIG})",
    )


def load_run_config(args: argparse.Namespace) -> RunConfig:
    """Read the run's settings, and note on `args` where the exit report belongs."""
    if not args.run_config:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.USAGE,
            "no settings were given",
            f"Name the file with --run-config or ${environment.RUN_CONFIG}.",
        )
    try:
        text = pathlib.Path(args.run_config).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.CONFIG, f"{args.run_config}: cannot be read: {error}"
        ) from error
    run = RunConfig.from_json(text)
    args.workspace_root = run.workspace
    return run


def apply_workspace_lock(run: RunConfig) -> Workspace:
    """Return the workspace after making sure that it is this job's; the first pod of a job takes it.

    A run without a job (plain files, no cluster) takes no lock.
    """
    workspace = Workspace(pathlib.Path(run.workspace))
    workspace.root.mkdir(parents=True, exist_ok=True)
    if not run.job.uid:
        return workspace
    if not workspace.lock_file.exists():
        _create_lock(workspace.lock_file, run)
    owner = _read_owner(workspace.lock_file)
    if owner.get("uid") != run.job.uid:
        other = f"{owner.get('namespace', '?')}/{owner.get('name', '?')}"
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            f"the workspace belongs to job {other} (uid {owner.get('uid')}), not to this one",
            "Give spec.workspace.subPath a folder of its own, or name another spec.workspace.existingClaim. "
            f"If job {other} is gone for good, delete {workspace.lock_file.name} on the volume.",
            {"workspace_locked": True},
        )
    return workspace


def _create_lock(path: pathlib.Path, run: RunConfig) -> None:
    mine = path.with_name(f"{path.name}.{run.job.uid}")
    write_json(mine, {"uid": run.job.uid, "namespace": run.job.namespace, "name": run.job.name})
    try:
        # A link fails if the name exists: of two jobs that start together one wins, and never with half a file.
        os.link(mine, path)
    except FileExistsError:
        return
    except OSError:
        # Volumes without hard links (object-store mounts) lose that, not the lock.
        mine.replace(path)
    finally:
        mine.unlink(missing_ok=True)


def _read_owner(path: pathlib.Path) -> dict[str, str]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError):
        owner = None
    # The lock never holds half a file, so this is damage; whose it was cannot be known.
    return owner if isinstance(owner, dict) else {"uid": "unreadable"}
