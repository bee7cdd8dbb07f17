"""What happens at step boundaries: progress, metrics, the stop on request, and the end on a loss that is no number."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal
import time
import types
from typing import Any

from transformers import TrainerCallback

from finetune_contract import environment
from finetune_contract.reports import ExitCode, Metric, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.errors import StopRequested, TrainerError
from finetune_trainer.reporting import ProgressReporter, emit, now_text
from finetune_trainer.training.keeper import CheckpointKeeper


class StopFlag:
    """Remembers SIGTERM until the next step boundary; installed by each rank."""

    def __init__(self) -> None:
        self.is_set = False
        self.is_armed = False
        """Whether training has begun; before that there is nothing to save, and the rank ends at once."""

    def install(self) -> None:
        """Take SIGTERM over from the default handler."""
        signal.signal(signal.SIGTERM, self._set)

    def _set(self, _number: int, _frame: types.FrameType | None) -> None:
        if not self.is_armed:
            raise StopRequested
        self.is_set = True


class SaveAndStopCallback(TrainerCallback):  # type: ignore[misc]
    """Saves by minutes, and saves and stops when any rank was asked to; all ranks at the same step."""

    def __init__(self, group: ControlGroup, stop: StopFlag, every_minutes: int) -> None:
        self._group = group
        self._stop = stop
        self._seconds = every_minutes * 60
        self._last_save = time.monotonic()
        self.has_stopped = False
        """Whether the run ended because it was asked to."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of the saves by minutes; from here on a stop waits for the next step boundary."""
        self._stop.is_armed = True
        self._last_save = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Agree on whether to save and whether to stop."""
        is_due = self._group.rank == 0 and 0 < self._seconds <= time.monotonic() - self._last_save
        is_due, must_stop = self._group.any([is_due, self._stop.is_set])
        if is_due or must_stop:
            control.should_save = True
        if must_stop and state.global_step < state.max_steps:
            self.has_stopped = True
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
    """Posts progress, appends to metrics.jsonl and serves Prometheus metrics; on rank 0 only."""

    def __init__(self, run: RunConfig, keeper: CheckpointKeeper, tokens_per_step: float) -> None:
        self._keeper = keeper
        self._tokens_per_step = tokens_per_step
        self._reporter = ProgressReporter()
        reports = Workspace(pathlib.Path(run.workspace)).reports
        reports.mkdir(parents=True, exist_ok=True)
        self._file = (reports / "metrics.jsonl").open("a", encoding="utf-8")
        self._gauges = _serve_gauges()
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)
        self.loss: float | None = None
        """Last logged loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say where the run starts."""
        self._last = (state.global_step, time.monotonic())
        self._reporter.__enter__()
        emit("training", step=state.global_step, total_steps=state.max_steps)
        metrics: dict[str, float] = {}
        if self._keeper.resumed_from is not None:
            metrics[Metric.RESUMED_FROM] = self._keeper.resumed_from
        self._post(state, metrics, urgent=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the first step: rates are measured from there, since it also warms caches up."""
        if self._first is None:
            self._first = (state.global_step, time.monotonic())
            self._post(state, {}, urgent=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Report a logged step."""
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
        }
        self._write(state, metrics)
        self._post(state, metrics)
        emit("step", step=state.global_step, of=state.max_steps, loss=logs["loss"], tokens_per_second=round(rate))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a committed checkpoint."""
        keeper = self._keeper
        # Time spent on a save is no training time.
        self._last = (self._last[0], self._last[1] + keeper.last_seconds)
        metrics: dict[str, float] = {
            Metric.LATEST_CHECKPOINT: keeper.latest_complete or 0,
            Metric.NUM_CHECKPOINTS: len(keeper.kept),
            Metric.CHECKPOINT_SECONDS: keeper.last_seconds,
        }
        if keeper.best is not None:
            metrics[Metric.BEST_CHECKPOINT] = keeper.best
        self._write(state, metrics)
        self._post(state, metrics, urgent=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send the last report and close the file."""
        self._post(state, {}, urgent=True)
        self._reporter.__exit__(None, None, None)
        self._file.close()

    def _write(self, state: Any, metrics: dict[str, float]) -> None:
        line = {"step": state.global_step, "at": now_text(), **{str(key): value for key, value in metrics.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _post(self, state: Any, metrics: dict[str, float], urgent: bool = False) -> None:
        metrics = {str(Metric.STEP): state.global_step, str(Metric.TOTAL_STEPS): state.max_steps, **metrics}
        share = state.global_step / max(state.max_steps, 1)
        eta = None
        if self._first is not None and state.global_step > self._first[0]:
            pace = (time.monotonic() - self._first[1]) / (state.global_step - self._first[0])
            eta = int(pace * (state.max_steps - state.global_step))
        self._reporter.update(int(100 * share), metrics, eta_seconds=eta, urgent=urgent)
        for name, value in metrics.items():
            if name in self._gauges:
                self._gauges[name].set(value)


_HELP = {
    Metric.STEP: "Optimizer steps done",
    Metric.TOTAL_STEPS: "Optimizer steps of the whole run",
    Metric.EPOCH: "Epochs done",
    Metric.LOSS: "Training loss, nats per answer token",
    Metric.LEARNING_RATE: "Learning rate",
    Metric.TOKENS_PER_SECOND: "Real tokens trained on per second, all ranks",
    Metric.LATEST_CHECKPOINT: "Step of the newest complete checkpoint",
    Metric.NUM_CHECKPOINTS: "Complete checkpoints on the workspace",
    Metric.CHECKPOINT_SECONDS: "Time training stood still for the last save",
}


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
