"""`finetune-trainer train`: fine-tune the model with DeepSpeed, from the newest complete checkpoint if there is one."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import sys
from typing import TYPE_CHECKING

from finetune_contract import environment
from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.commands import plain
from finetune_trainer.commands.common import apply_workspace_lock
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import write_exit_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune_trainer.training.inputs import Inputs
    from finetune_trainer.training.supervisor import Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run in a pod and of a run on plain files."""
    plain.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and report how it ended."""
    settings = plain.load_settings(args)
    workspace = apply_workspace_lock(settings)
    _set_environment(settings)

    from finetune_trainer.training.inputs import check_settings, read_inputs
    from finetune_trainer.training.ledger import WorkLedger
    from finetune_trainer.training.rank import run_rank
    from finetune_trainer.training.stack import import_stack
    from finetune_trainer.training.supervisor import ProgressDeadline, run_ranks

    check_settings(settings)
    attempt = _read_attempt(workspace)
    import_stack(settings.training.tracking, uses_gpus=settings.topology.gpus_per_node > 0)
    inputs = read_inputs(settings)
    ledger = WorkLedger()
    node = int(os.environ.get(environment.NODE_RANK) or 0)
    stacks = workspace.reports / f"stacks-attempt-{attempt}-pod-{node}.txt"
    deadline = ProgressDeadline(settings.progress_deadline_seconds, stacks)
    try:
        work = functools.partial(run_rank, inputs, attempt, ledger)
        launch = functools.partial(run_ranks, work, inputs.run.topology, inputs.run.training, deadline)
        outcome, mirrored = _train(inputs, attempt, node, launch)
    except TrainerError as error:
        error.details.update(ledger.to_details())
        raise
    has_stopped = outcome.exit_code == ExitCode.SUSPENDED
    results = {
        **ledger.to_details(),
        **inputs.describe(),
        **outcome.results,
        **mirrored,
        "in_pod_restarts": outcome.num_restarts,
    }
    step, total = results.get("step", 0), results.get("total_steps", 0)
    message = f"stopped on request at step {step} of {total}" if has_stopped else f"trained {step} steps"
    saved = results.get("latest_complete")
    if has_stopped and saved != step and step:
        message += ", with no time left to save: " + (f"step {saved} is kept" if saved else "no step is kept")
    reason = Reason.SUSPENDED if has_stopped else Reason.COMPLETED
    report = ExitReport(Phase.TRAIN, reason, message, outcome.exit_code, attempt=attempt, details=results)
    # Results live with rank 0; the other nodes' pods only say that they ended.
    write_exit_report(report, workspace if node == 0 else None)
    return outcome.exit_code


def _train(
    inputs: Inputs, attempt: int, node: int, launch: Callable[[], Outcome]
) -> tuple[Outcome, dict[str, int | None]]:
    """Run the ranks, beside the mirror process where the job has a mirror and this is the pod with index 0."""
    if node or not inputs.run.checkpoint.mirror.destination:
        return launch(), {}
    from finetune_trainer.training.mirroring import finish_mirror, mirroring

    with mirroring(inputs.run, inputs.identity, attempt) as process:
        outcome = launch()
        return outcome, finish_mirror(process, inputs.run, outcome.exit_code == ExitCode.SUSPENDED)


def _read_attempt(workspace: Workspace) -> int:
    """Return the attempt's number; outside a cluster each run is a newer attempt."""
    from finetune_trainer.checkpoints.attempt import read_newest_attempt

    return int(os.environ.get(environment.ATTEMPT) or read_newest_attempt(workspace.attempt_file) + 1)


def _set_environment(settings: RunConfig) -> None:
    """Set what the libraries read when they are imported; a pod has these from the operator."""
    if settings.topology.gpus_per_node == 0:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        threads = (os.cpu_count() or 1) // settings.topology.processes_per_node
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # DeepSpeed's native op is built with ninja, found beside this program's interpreter.
    here = str(pathlib.Path(sys.executable).parent)
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = here + os.pathsep + os.environ.get("PATH", "")
