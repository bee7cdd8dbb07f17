"""The fence between attempts: the newest attempt owns the workspace, an older one's writer stops when it sees it.

A lost node's pods may go on writing after their attempt has been replaced. Rank 0 claims the workspace at its start,
and looks again before each commit and each deletion.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.resume import set_foreign_aside
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit_warning, write_json


def read_newest_attempt(attempt_file: pathlib.Path) -> int:
    """Return the newest attempt on the workspace; 0 when none has written."""
    try:
        return int(json.loads(attempt_file.read_text())["attempt"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0


def claim_workspace(attempt_file: pathlib.Path, attempt: int) -> None:
    """Make `attempt` the newest one. Raises TrainerError (Fenced) when a newer one has been there.

    The first attempt of all sets aside what another trainer has left: no later one could tell it from garbage of ours.
    """
    require_newest(attempt_file, attempt)
    if not attempt_file.exists():
        for path in set_foreign_aside(attempt_file.parent):
            hint = f"to resume from it: finetune-trainer checkpoints repair --yes {path.parent}, then move it back"
            emit_warning("checkpoint of another trainer set aside", checkpoint=str(path), hint=hint)
    attempt_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(attempt_file, {"attempt": attempt})


def require_newest(attempt_file: pathlib.Path, attempt: int) -> None:
    """Raise TrainerError (Fenced) when a newer attempt owns the workspace."""
    newest = read_newest_attempt(attempt_file)
    if newest > attempt:
        raise TrainerError(
            Reason.FENCED,
            ExitCode.FENCED,
            f"attempt {newest} owns this workspace; attempt {attempt} stops without writing",
            "Nothing to do: the newer attempt goes on.",
        )


@dataclasses.dataclass(frozen=True)
class Fence:
    """What an attempt looks at before each commit and each deletion."""

    attempt_file: pathlib.Path
    attempt: int

    def require_newest(self) -> None:
        """Raise TrainerError (Fenced) when a newer attempt owns the workspace."""
        require_newest(self.attempt_file, self.attempt)
