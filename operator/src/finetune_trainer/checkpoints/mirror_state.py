"""What the mirror process of an attempt has done, in a file on the workspace: written by it, read by rank 0."""

from __future__ import annotations

import dataclasses
import json

from finetune_contract.reports import Metric
from finetune_contract.workspace import Workspace
from finetune_trainer.reporting import write_json


@dataclasses.dataclass
class MirrorState:
    """Figures of one mirror process."""

    step: int | None = None
    """Newest complete checkpoint on the mirror."""
    bytes: int = 0
    """Sent by this process."""
    failures: int = 0
    """Tries that failed."""

    def to_metrics(self) -> dict[str, float]:
        """Return the figures as metrics."""
        metrics = {Metric.MIRRORED_BYTES: self.bytes, Metric.MIRROR_FAILURES: self.failures}
        if self.step is not None:
            metrics[Metric.MIRRORED_CHECKPOINT] = self.step
        return {str(name): float(value) for name, value in metrics.items()}


def write_mirror_state(workspace: Workspace, state: MirrorState) -> None:
    """Write the file anew."""
    workspace.reports.mkdir(parents=True, exist_ok=True)
    write_json(workspace.mirror_state, dataclasses.asdict(state))


def read_mirror_state(workspace: Workspace) -> MirrorState | None:
    """Return what was written last; None when nothing was."""
    try:
        return MirrorState(**json.loads(workspace.mirror_state.read_text()))
    except (OSError, ValueError, TypeError):
        return None
