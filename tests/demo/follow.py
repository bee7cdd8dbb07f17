"""Follow a FineTuneJob from its status: one line per state, a bar with step, loss and ETA while it trains.

In the middle of training the caller's `on_training` is asked once per look, so that the demo can do harm there.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from tests.demo.kubectl import Cluster, ClusterError

LOOK_SECONDS = 0.5


class JobFailedError(RuntimeError):
    """The job ended in failure, or did not end in time; the message is the job's own."""


@dataclasses.dataclass
class Follower:
    """Shows one job's progress until it has finished."""

    cluster: Cluster
    namespace: str
    name: str
    on_training: Callable[[dict[str, Any]], None]
    started: float = dataclasses.field(default_factory=time.monotonic)
    _state: str = ""
    _event: str = ""
    _bar: tqdm | None = None
    _shown_step: int = -1

    def follow(self, timeout_seconds: float) -> dict[str, Any]:
        """Return the finished job. Raises JobFailedError."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            job = self._read()
            status = job.get("status") or {}
            self._show(status)
            conditions = {entry["type"]: entry for entry in status.get("conditions", ())}
            if conditions.get("Finished", {}).get("status") == "True":
                self._close_bar()
                if conditions.get("Succeeded", {}).get("status") != "True":
                    raise JobFailedError(explain(status))
                return job
            if status.get("state") == "Training":
                self.on_training(status)
            time.sleep(LOOK_SECONDS)
        self._close_bar()
        raise JobFailedError(
            f"not finished within {timeout_seconds:.0f} s; {explain(self._read().get('status') or {})}"
        )

    def say(self, text: str) -> None:
        """Print a line with the time since the start, above the bar if there is one."""
        line = f"[{time.monotonic() - self.started:6.1f} s] {text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def _read(self) -> dict[str, Any]:
        try:
            return self.cluster.read("finetunejob", self.name, "-n", self.namespace)
        except ClusterError as error:
            if "not found" in str(error).lower():
                raise
            return {}

    def _show(self, status: dict[str, Any]) -> None:
        state = status.get("state") or ""
        reconciling = next((c for c in status.get("conditions", ()) if c["type"] == "Reconciling"), {})
        message = reconciling.get("message") or ""
        if state and (state != self._state or (state != "Training" and message != self._event)):
            if state != "Training":
                self._close_bar()
            self.say(f"{state:<11} {message}")
            self._state, self._event = state, message
        if state == "Training":
            self._show_training(status.get("progress") or {})

    def _show_training(self, progress: dict[str, Any]) -> None:
        total, step = progress.get("totalSteps") or 0, progress.get("step") or 0
        if not total or step == self._shown_step:
            return
        self._shown_step = step
        detail = f"loss {progress.get('loss', '-')}  ETA {progress.get('etaSeconds', '-')} s"
        if not sys.stdout.isatty():
            self.say(f"Training    step {step}/{total}  {detail}")
            return
        if self._bar is None:
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, leave=True, file=sys.stdout)
        self._bar.n = step
        self._bar.set_postfix_str(detail, refresh=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def explain(status: dict[str, Any]) -> str:
    """Say in one line why a job is where it is, from its own conditions."""
    for kind in ("Stalled", "Succeeded", "Ready"):
        for condition in status.get("conditions", ()):
            if condition["type"] == kind and (kind != "Stalled" or condition["status"] == "True"):
                return f"{status.get('state')}: {condition.get('reason')}: {condition.get('message')}"
    return f"no status yet ({status.get('state', 'no state')}): is the operator running?"
