"""The weight diff of a promoted model, made once on the workspace by the phase that publishes. No torch."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import disk
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit
from finetune_trainer.storage.publish import ACCOUNTS
from finetune_trainer.training.modeling import find_base_model
from finetune_trainer.weight_diff.make import make_diff
from finetune_trainer.weight_diff.recover import verify_diff
from finetune_trainer.weight_diff.tensors import list_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune_contract.run_config import RunConfig
    from finetune_trainer.weight_diff.record import Record

_FIELD = "spec.promotion.weightDiff.enabled"


@dataclasses.dataclass(frozen=True)
class PromotedDiff:
    """A diff on the workspace."""

    folder: pathlib.Path
    num_bytes: int
    ratio: float
    """By the bytes of the promoted weights."""

    def to_details(self, workspace: Workspace) -> dict[str, Any]:
        """Return the entry `weight_diff` of the exit report."""
        path = self.folder.relative_to(workspace.root).as_posix()
        return {"path": path, "bytes": self.num_bytes, "ratio": round(self.ratio, 4)}


def make_promoted_diff(run: RunConfig, advance: Callable[[int], None] = lambda _: None) -> PromotedDiff:
    """Make the diff of the run's promoted model, or verify the one that is there. Raises TrainerError.

    What tells of the model is no part of it: two runs that make the same model make the same diff.
    """
    workspace = Workspace(pathlib.Path(run.workspace))
    tuned, base = workspace.promoted_model(run.promotion.digest), find_base_model(run)
    out = workspace.weight_diff(run.promotion.digest)
    tuned_bytes = sum(tensor.num_bytes for tensor in list_tensors(tuned, _FIELD).values())
    if out.exists():
        record = _verify(out)
        advance(tuned_bytes)
    else:
        if not list(base.glob("*.safetensors")):
            raise TrainerError(
                Reason.INVALID_CONFIG,
                ExitCode.CONFIG,
                f"{_FIELD}: the base model has no safetensors files to subtract",
                f"Set {_FIELD} to false, or name a base model in safetensors as spec.model.source.",
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        disk.require_room(out.parent, tuned_bytes, "the weight diff")
        record = make_diff(base, tuned, out, advance, skipped=ACCOUNTS).record
    num_bytes = sum(facts.size for facts in record.files.values())
    ratio = num_bytes / max(tuned_bytes, 1)
    emit("weight diff", folder=str(out), size=disk.format_bytes(num_bytes), ratio=round(ratio, 4))
    return PromotedDiff(out, num_bytes, ratio)


def _verify(out: pathlib.Path) -> Record:
    try:
        record = verify_diff(out)
    except TrainerError as error:
        raise _occupied(out, error.message) from error
    if record.tuned_name != out.name:
        raise _occupied(out, f"it is the diff of {record.tuned_name}")
    return record


def _occupied(out: pathlib.Path, why: str) -> TrainerError:
    message = f"{_FIELD}: {out} is not the whole diff of this model: {why}"
    return TrainerError(Reason.PROMOTION_INVALID, ExitCode.NO_INPUT, message, f"Remove {out}; the diff is made anew.")
