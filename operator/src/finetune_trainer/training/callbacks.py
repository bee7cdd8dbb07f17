"""What happens at step boundaries: progress, metrics, the stop on request, and the end on a loss that is no number."""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import IO, Any

from transformers import TrainerCallback

from finetune_contract import environment
from finetune_contract.reports import ExitCode, Metric, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.mirror_state import read_mirror_state
from finetune_trainer.distributed import read_in_pod_restarts
from finetune_trainer.errors import TrainerError
from finetune_trainer.report.history import START
from finetune_trainer.reporting import ProgressReporter, emit, now_text
from finetune_trainer.training.inputs import Inputs
from finetune_trainer.training.keeper import CheckpointKeeper
from finetune_trainer.training.ledger import WorkLedger
from finetune_trainer.training.notice import StopFlag


class SaveAndStopCallback(TrainerCallback):  # type: ignore[misc]
    """Saves by minutes, and saves and stops when any rank was asked to; all ranks at the same step.

    A stop whose notice holds no save stops without one: the checkpoint before it stands.
    """

    def __init__(self, keeper: CheckpointKeeper, stop: StopFlag, every_minutes: int) -> None:
        self._keeper = keeper
        self._stop = stop
        self._seconds = every_minutes * 60
        self._last_save = time.monotonic()
        self.has_stopped = False
        """Whether the run ended because it was asked to."""
        self.has_saved = True
        """Whether the state at the end is to be saved: False when there was no time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the saves by minutes; from here on a stop waits for the next step boundary."""
        self._stop.is_armed = True
        self._last_save = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Agree on whether to save and whether to stop."""
        group, stop = self._keeper.group, self._stop
        is_due = group.rank == 0 and 0 < self._seconds <= time.monotonic() - self._last_save
        is_hopeless = not stop.has_time_to_save(self._keeper.last_save_seconds)
        is_due, must_stop, is_hopeless = group.any([is_due, stop.is_set, is_hopeless])
        if is_due or must_stop:
            control.should_save = not is_hopeless
        if must_stop and state.global_step < state.max_steps:
            self.has_stopped = True
            self.has_saved = not is_hopeless
            control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the minutes from the last save, whatever caused it."""
        self._last_save = time.monotonic()


class FiniteLossCallback(TrainerCallback):  # type: ignore[misc]
    """Ends the run when the loss is no number any more; every rank logs the same loss, so all stop."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Look at each logged loss."""
        loss = logs.get("loss")
        if loss is None or math.isfinite(loss):
            return
        raise TrainerError(
            Reason.NON_FINITE_LOSS,
            ExitCode.USER_CODE,
            f"the loss became {loss} at step {state.global_step}",
            "Lower spec.training.learningRate, or set spec.training.precision to bf16 when it is fp16.",
        )


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Posts progress, appends to metrics.jsonl, serves Prometheus metrics, counts productive time; on rank 0 only.

    Productive is the time in optimizer steps, the data's loading included; saves, evaluations and starts are not. The
    sum is saved with each checkpoint and goes on from there, so that steps which a restart threw away are not in it.
    """

    def __init__(self, inputs: Inputs, keeper: CheckpointKeeper, tokens_per_step: float, ledger: WorkLedger) -> None:
        run = inputs.run
        self._examples = inputs.describe()
        self._keeper = keeper
        self._tokens_per_step = tokens_per_step
        self._ledger = ledger
        self._reporter = ProgressReporter()
        self._workspace = Workspace(pathlib.Path(run.workspace))
        self._is_mirrored = bool(run.checkpoint.mirror.destination)
        self._file = _open_log(self._workspace.metrics_log)
        self._gauges = _serve_gauges()
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)
        self._productive_seconds = 0.0
        self._step_started: float | None = None
        self._longest_step = 0.0
        self._reported: tuple[int | None, str] = (None, "")
        """Step of the newest checkpoint that was reported, and when it was committed."""
        self.loss: float | None = None
        """Last logged loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where the run starts."""
        self._last = (state.global_step, time.monotonic())
        self._productive_seconds = float(state.stateful_callbacks.get(_STATE, {}).get("productive_seconds", 0.0))
        self._ledger.begin(state.global_step, self._productive_seconds)
        self._reporter.__enter__()
        emit("training", step=state.global_step, total_steps=state.max_steps)
        metrics = dict(self._examples)
        if self._keeper.resumed_from is not None:
            metrics |= {Metric.RESUMED_FROM: self._keeper.resumed_from, **self._describe_checkpoints()}
        self._reported = (self._keeper.latest_complete, self._keeper.last_committed_at)
        # What the log has beyond this step was lost; `report.history` reads it so.
        self._write(state, {Metric.TOTAL_STEPS: state.max_steps}, event=START)
        self._post(state, metrics, urgent=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the first step; each other step begins where the one before has ended."""
        if self._step_started is None:
            self._step_started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step. Rates are measured from the end of the first, since it also warms caches up."""
        now = time.monotonic()
        seconds = now - (now if self._step_started is None else self._step_started)
        self._productive_seconds += seconds
        self._longest_step = max(self._longest_step, seconds)
        self._step_started = now
        # Whoever saves the Trainer's state at this step saves the sum with it.
        state.stateful_callbacks[_STATE] = {"productive_seconds": self._productive_seconds}
        self._ledger.note(state.global_step, self._productive_seconds)
        self._report_commit(state)
        is_first = self._first is None
        if is_first:
            self._first = (state.global_step, now)
            emit("first step done", step=state.global_step, seconds=round(seconds, 2))
        self._post(state, {}, urgent=is_first)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Report a logged step."""
        if "eval_loss" in logs:
            self._write(state, {"eval_loss": logs["eval_loss"]})
        if "loss" not in logs:
            return
        now = time.monotonic()
        rate = self._tokens_per_step * (state.global_step - self._last[0]) / max(now - self._last[1], 1e-9)
        self._last = (state.global_step, now)
        self.loss = logs["loss"]
        metrics: dict[str, float] = {
            Metric.LOSS: logs["loss"],
            Metric.LEARNING_RATE: logs.get("learning_rate", 0.0),
            Metric.TOKENS_PER_SECOND: rate,
            Metric.EPOCH: state.epoch or 0.0,
            Metric.PRODUCTIVE_SECONDS: round(self._productive_seconds, 3),
        }
        mirror = read_mirror_state(self._workspace) if self._is_mirrored else None
        metrics |= mirror.to_metrics() if mirror is not None else {}
        self._write(state, metrics)
        self._post(state, metrics)
        emit("step", step=state.global_step, of=state.max_steps, loss=logs["loss"], tokens_per_second=round(rate))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the evaluation out of the next step's time."""
        self._step_started = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the save out of the next step's time, and report it if it is committed by now."""
        self._step_started = time.monotonic()
        # Time spent on a save is no training time.
        self._last = (self._last[0], self._last[1] + self._keeper.last_seconds)
        self._report_commit(state)

    def finish(self, state: Any) -> None:
        """Send the last report, after the last commit, and close the file."""
        self._report_commit(state)
        self._post(state, {}, urgent=True)
        self._reporter.__exit__(None, None, None)
        self._file.close()

    def _report_commit(self, state: Any) -> None:
        """Report the newest checkpoint once it is committed, which may be some steps after its save began."""
        newest = (self._keeper.latest_complete, self._keeper.last_committed_at)
        if newest == self._reported:
            return
        self._reported = newest
        metrics = self._describe_checkpoints()
        self._write(state, metrics)
        self._post(state, metrics, urgent=True)

    def _describe_checkpoints(self) -> dict[str, float]:
        keeper = self._keeper
        metrics: dict[str, float] = {
            Metric.LATEST_CHECKPOINT: keeper.latest_complete or 0,
            Metric.NUM_CHECKPOINTS: len(keeper.kept),
            Metric.CHECKPOINT_BYTES: keeper.last_bytes,
            Metric.CHECKPOINT_TIME: dt.datetime.fromisoformat(keeper.last_committed_at).timestamp(),
        }
        if keeper.last_save_seconds > 0:
            metrics |= {Metric.CHECKPOINT_SECONDS: keeper.last_seconds, Metric.SAVE_SECONDS: keeper.last_save_seconds}
        if keeper.best is not None:
            metrics[Metric.BEST_CHECKPOINT] = keeper.best
        return metrics

    def _write(self, state: Any, metrics: Mapping[str, float], **facts: str) -> None:
        line: dict[str, Any] = {"step": state.global_step, "at": now_text(), "attempt": self._keeper.attempt, **facts}
        line |= {str(name): value for name, value in metrics.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _post(self, state: Any, metrics: dict[str, float], urgent: bool = False) -> None:
        metrics = {
            Metric.STEP: state.global_step,
            Metric.TOTAL_STEPS: state.max_steps,
            Metric.PRODUCTIVE_SECONDS: round(self._productive_seconds, 3),
            Metric.STEPS_LOST: self._ledger.steps_lost,
            Metric.STEP_SECONDS: round(self._longest_step, 3),
            Metric.IN_POD_RESTARTS: read_in_pod_restarts(),
            **metrics,
        }
        share = state.global_step / max(state.max_steps, 1)
        eta = None
        if self._first is not None and state.global_step > self._first[0]:
            pace = (time.monotonic() - self._first[1]) / (state.global_step - self._first[0])
            eta = int(pace * (state.max_steps - state.global_step))
        self._reporter.update(int(100 * share), metrics, eta_seconds=eta, urgent=urgent)
        for name, value in metrics.items():
            if name in self._gauges:
                self._gauges[name].set(value)


_STATE = "finetune_progress"
"""Entry of the Trainer's state that carries the productive seconds into each checkpoint and back."""
_HELP = {
    Metric.STEP: "Optimizer steps done",
    Metric.TOTAL_STEPS: "Optimizer steps of the whole run",
    Metric.EPOCH: "Epochs done",
    Metric.LOSS: "Training loss, nats per answer token",
    Metric.LEARNING_RATE: "Learning rate",
    Metric.TOKENS_PER_SECOND: "Real tokens trained on per second, all ranks",
    Metric.LATEST_CHECKPOINT: "Step of the newest complete checkpoint",
    Metric.NUM_CHECKPOINTS: "Complete checkpoints on the workspace",
    Metric.CHECKPOINT_TIME: "When the newest complete checkpoint was committed, in seconds since 1970",
    Metric.CHECKPOINT_BYTES: "Size of the newest complete checkpoint",
    Metric.CHECKPOINT_SECONDS: "Time training stood still for the newest save",
    Metric.SAVE_SECONDS: "Time from the start of the newest save until it was committed",
    Metric.MIRRORED_CHECKPOINT: "Step of the newest complete checkpoint on the mirror",
    Metric.MIRRORED_BYTES: "Bytes sent to the mirror in this attempt",
    Metric.MIRROR_FAILURES: "Tries to send to the mirror that failed in this attempt",
    Metric.PRODUCTIVE_SECONDS: "Time in the optimizer steps that led to the present weights, over all attempts",
    Metric.PACKING: "1: examples share sequences, 0: not as wanted, -1: the architecture does not allow it",
    Metric.EXAMPLES_TRUNCATED: "Training examples that lost answer tokens at the maximum length",
    Metric.EXAMPLES_DROPPED: "Training examples without an answer token within the maximum length",
    Metric.REAL_TOKEN_SHARE: "Share of the places of training sequences that hold tokens",
    Metric.STEPS_LOST: "Optimizer steps of this attempt that restarts inside its pod threw away",
}


def _open_log(path: pathlib.Path) -> IO[str]:
    """Open the log behind its last whole line: the one before may have been cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="utf-8")


def _serve_gauges() -> dict[str, Any]:
    """Start the metrics endpoint where the environment asks for one, and return its gauges."""
    port = os.environ.get(environment.METRICS_PORT)
    if not port:
        return {}
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    gauges = {
        str(name): prometheus_client.Gauge(f"finetune_training_{name.value}", text, registry=registry)
        for name, text in _HELP.items()
    }
    prometheus_client.start_http_server(int(port), registry=registry)
    return gauges
