"""`finetune-trainer compose`: fetch a job's adapters, compose them over the promoted model, and measure the result."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_trainer.commands import plain
from finetune_trainer.commands.common import apply_workspace_lock
from finetune_trainer.evaluation.scores_file import shorten_scores
from finetune_trainer.reporting import write_exit_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from finetune_trainer.adapters.job import Composed

MAX_SCORES = 1500
"""Characters of scores in the exit report; all are in measurement.json."""
_MAX_DIFFERENCES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run in a pod; on plain files `adapters compose` and `adapters measure` do the same."""
    plain.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compose, measure, and report both."""
    settings = plain.load_settings(args)
    workspace = apply_workspace_lock(settings)
    if any(not name.endswith((".yaml", ".yml")) for name in settings.evaluation.tasks):
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    open_storage(source.source for source in settings.composition.adapters)
    plain.prepare_libraries()

    from finetune_trainer.adapters.job import compose_for_job
    from finetune_trainer.adapters.measure import format_table

    composed = compose_for_job(settings)
    table = format_table(composed.measurement)
    workspace.reports.mkdir(parents=True, exist_ok=True)
    (workspace.reports / f"adapters-{composed.profile.digest}.md").write_text(table + "\n", encoding="utf-8")
    print(table, file=sys.stderr)
    details = _describe(composed, workspace.root)
    differences = _list_differences(composed)
    message = f"composed {composed.profile.name}, rank {composed.rank}"
    message += f"; beyond the error: {'; '.join(differences[:_MAX_DIFFERENCES])}" if differences else ""
    write_exit_report(ExitReport(Phase.COMPOSE, Reason.COMPLETED, message, details=details), workspace)
    return ExitCode.OK


def open_storage(sources: Iterable[str]) -> None:
    """Import what adapters are fetched with, before packages that only trackers need can be imported no more."""
    schemes = {source.partition("://")[0] for source in sources}
    if "hf" in schemes:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    if "s3" in schemes:
        import finetune_trainer.storage.s3  # noqa: F401


def _describe(composed: Composed, root: pathlib.Path) -> dict[str, Any]:
    from finetune_trainer.adapters.profile import COMPOSITION

    profile, measurement = composed.profile, composed.measurement
    return {
        "digest": profile.digest,
        "model": os.path.relpath(composed.model, root),
        "rank": composed.rank,
        "largest_error": float(f"{composed.largest_error:.3g}"),
        "adapters": [{"name": each.name, "digest": each.digest, "weight": each.weight} for each in profile.entries],
        "drift": {side: float(f"{each.divergence.value:.4g}") for side, each in measurement.drift.items()},
        **shorten_scores({"scores": measurement.scores[COMPOSITION]}, MAX_SCORES),
    }


def _list_differences(composed: Composed) -> list[str]:
    """Return the scores that are beyond the error, as text: `holdout.loss is 0.2 above that of polite`."""
    return [
        f"{each.task}.{each.metric} is {abs(each.delta):.3g} {'above' if each.delta > 0 else 'below'} that of {side}"
        for side, found in composed.measurement.list_differences().items()
        for each in found
        if each.is_larger_than_error
    ]
