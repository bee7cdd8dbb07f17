"""`finetune-trainer promote`: turn a checkpoint into a model that is verified to be whole."""

from __future__ import annotations

import argparse

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_trainer.commands import plain
from finetune_trainer.commands.common import apply_workspace_lock
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import write_exit_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run in a pod and of a run on plain files."""
    plain.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Promote, and report the digest."""
    settings = plain.load_settings(args)
    workspace = apply_workspace_lock(settings)
    plain.prepare_libraries(reads_shards=True)

    from finetune_trainer.promotion.promote import promote

    result = promote(settings)
    details = {
        "digest": result.digest,
        "path": str(result.path),
        "checkpoint_step": result.checkpoint_step,
        "parameters": result.num_parameters,
        "bytes": result.num_bytes,
        **write_run_report(settings, result.digest),
    }
    message = f"promoted checkpoint-{result.checkpoint_step} as {result.digest}"
    write_exit_report(ExitReport(Phase.PROMOTE, Reason.COMPLETED, message, details=details), workspace)
    print(result.digest)
    return ExitCode.OK
