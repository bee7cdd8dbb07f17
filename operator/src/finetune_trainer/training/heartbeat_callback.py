"""Tells the supervisor at every part of a step that this rank is alive; see `heartbeat`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from finetune_trainer.training.heartbeat import Doing, read_pulse


class HeartbeatCallback(TrainerCallback):  # type: ignore[misc]
    """Gives signs of life. Added last, so that it knows whether any other callback asked for a save."""

    def __init__(self) -> None:
        self._pulse = read_pulse()
        self._doing = Doing.STARTING

    def _beat(self, *_args: Any, **_kwargs: Any) -> None:
        self._pulse.beat(self._doing)

    on_epoch_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = _beat
    on_prediction_step = _beat

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From the first step on the clock runs; a save that follows may take its time."""
        self._doing = Doing.PAUSING if control.should_save else Doing.STEPPING
        self._beat()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the steps."""
        self._doing = Doing.STEPPING
        self._beat()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is left is the last save and the trackers' goodbye."""
        self._doing = Doing.PAUSING
        self._beat()
