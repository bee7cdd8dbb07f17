"""Agreement between the ranks of an attempt: one decides, all learn the same outcome, errors included.

Used inside the ranks. Control messages travel on a CPU group (gloo), so that they neither wait for nor disturb the
accelerator. Outside a process group every function acts for one rank alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_trainer.errors import TrainerError, as_trainer_error

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
IN_POD_RESTARTS = "FINETUNE_IN_POD_RESTARTS"
"""Variable that the supervisor sets in its ranks."""


def read_rank() -> int:
    """Return this process's rank from the environment; 0 outside a launch."""
    return int(os.environ.get("RANK", "0"))


def read_in_pod_restarts() -> int:
    """Return how often the ranks of this pod were started before; set by the supervisor."""
    return int(os.environ.get(IN_POD_RESTARTS, "0"))


class ControlGroup:
    """The CPU group for control messages; made by all ranks at the same point, once per process."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        needs_own = self.size > 1 and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo") if needs_own else None

    def decide(self, decision: Callable[[], T]) -> T:
        """Return what rank 0's `decision` returns, on every rank; its error is raised on every rank."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = decision()
            except Exception as error:
                if self.size == 1:
                    raise
                failure = as_trainer_error(error)
                fields = (failure.reason, failure.exit_code, failure.message, failure.hint, failure.details)
                outcome[1] = fields
        if self.size > 1:
            self._dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise TrainerError(*outcome[1])
        result: T = outcome[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, flags: list[bool]) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        if self.size == 1:
            return flags
        import torch

        tensor = torch.tensor(flags, dtype=torch.uint8)
        self._dist.all_reduce(tensor, op=self._dist.ReduceOp.MAX, group=self._group)
        return [bool(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any([False])
