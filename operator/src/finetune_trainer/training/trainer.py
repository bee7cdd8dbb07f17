"""TRL's SFTTrainer with our checkpoint contract; everything else is theirs."""

from __future__ import annotations

from typing import Any

import transformers.trainer
from transformers import TrainerCallback
from trl import SFTTrainer

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints.manifest import Weight
from finetune_trainer.errors import TrainerError
from finetune_trainer.training import quantization, weights
from finetune_trainer.training.capture import Capture, capturing
from finetune_trainer.training.keeper import CheckpointKeeper
from finetune_trainer.training.sampler import ReadPlan, RowLoader
from finetune_trainer.training.schedule import count_rows_per_step


def _skip_passes(loader: RowLoader, num_passes: int) -> RowLoader:
    return loader.starting_at(num_passes)


# The Trainer resumes in the middle of an epoch by drawing and dropping all batches before it; ours begins at the right
# one. (Its `ignore_data_skip` begins the epoch anew, and miscounts the accumulation at the epoch's end.)
transformers.trainer.skip_first_batches = _skip_passes


class ContractTrainer(SFTTrainer):  # type: ignore[misc]
    """Saves through a keeper: training waits for a copy in memory, the rest goes on beside it."""

    keeper: CheckpointKeeper
    _capture: Capture | None = None
    """The save that is being put together."""
    is_converted = False
    """The checkpoint to resume from is in DeepSpeed's universal form."""

    def get_train_dataloader(self) -> RowLoader:
        """Return this rank's share of the rows, which needs no replay when it is resumed."""
        args = self.args
        plan = ReadPlan(
            len(self.train_dataset), self._train_batch_size, args.world_size, args.process_index, args.data_seed
        )
        return RowLoader(self.train_dataset, self.data_collator, plan)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self.keeper.is_saved(step):
            return
        self.keeper.before_save()
        with capturing(self.model_wrapped, step) as self._capture:
            super()._save_checkpoint(model, trial)
            quantization.drop_quantized(self._capture.states.values(), self.model_wrapped.module)
            described = self._require_whole(self._capture)
            images = self._capture.draw_images()
        self._capture = None
        rows = step * count_rows_per_step(self.args.world_size, self.keeper.run.training)
        position = {"epoch": float(self.state.epoch or 0.0), "rows": rows}
        facts = {"metrics": self._read_metrics(), "weights": described, "data_position": position}
        self.keeper.save(step, images, facts)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._capture is None else str(self._capture.folder.parent)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, or nothing but the configuration: the weights are in the shards, each once."""
        engine, is_lora = self.model_wrapped, self._is_lora()
        adapter = None
        if is_lora and self.keeper.run.training.zero_stage == 3:
            adapter = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)  # noqa: SLF001
        elif is_lora and self.args.should_save:
            adapter = engine.module_state_dict(exclude_frozen_parameters=True)
        if not self.args.should_save:
            return
        if is_lora:
            self.model.save_pretrained(output_dir, state_dict=adapter)
        else:
            self.model.config.save_pretrained(output_dir)

    def _is_lora(self) -> bool:
        return self.keeper.run.training.method == "lora"

    def _require_whole(self, capture: Capture) -> dict[str, Weight]:
        """Return the weights of the model after comparing them with what is about to be saved.

        Raises the same TrainerError on every rank where a weight is missing or empty on one.
        """
        group, stage = self.keeper.group, self.keeper.run.training.zero_stage
        module = self.model_wrapped.module
        trained = weights.describe_weights(module, trained_only=True)
        expected = trained if self._is_lora() else weights.describe_weights(module, trained_only=False)
        gaps = weights.find_gaps(capture.states.values(), expected, stage)
        if self._is_lora() and group.rank == 0:
            gaps += weights.find_adapter_gaps(capture.folder)
        shares = group.gather((gaps, *weights.count_saved(capture.states.values())))
        gaps = [gap for share, _, _ in shares for gap in share]
        num_masters = sum(count for _, count, _ in shares)
        num_trained = sum(weight.count for weight in trained.values())
        if not any(count for _, _, count in shares):
            gaps.append("no rank has saved the model")
        if num_masters < num_trained:
            gaps.append(f"the optimizer shards hold {num_masters} of {num_trained} weights")
        if gaps:
            raise TrainerError(
                Reason.CHECKPOINT_INVALID,
                ExitCode.INTERNAL,
                f"the state at step {self.state.global_step} is not whole: {gaps[0]}",
                "Nothing was saved; the checkpoints before it are whole. Report this with the attempt's log.",
            )
        return expected

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_converted:
            # DeepSpeed gives all groups of a converted ZeRO-3 checkpoint one and the same counter of steps, which each
            # group would then advance.
            for state in self.model_wrapped.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()

    def commit_last(self) -> None:
        """Make the end of training a checkpoint, whatever the save interval; nothing is saved twice."""
        self._save_checkpoint(self.model_wrapped, None)
        self.keeper.settle()

    def _read_metrics(self) -> dict[str, float]:
        """Return the evaluation metrics of this step, if it was evaluated."""
        for entry in reversed(self.state.log_history):
            if entry.get("step") == self.state.global_step and any(name.startswith("eval_") for name in entry):
                return {name: float(value) for name, value in entry.items() if name.startswith("eval_")}
        return {}

    def create_model_card(self, *_args: Any, **_options: Any) -> None:
        """Write none at every save: the model card belongs to the promoted model."""


class CommitCallback(TrainerCallback):  # type: ignore[misc]
    """Learns, between two steps, whether the save in flight has been committed or has failed."""

    def __init__(self, keeper: CheckpointKeeper) -> None:
        self._keeper = keeper

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at each step."""
        self._keeper.look()
