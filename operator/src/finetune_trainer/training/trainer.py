"""TRL's SFTTrainer with our checkpoint contract; everything else is theirs."""

from __future__ import annotations

from typing import Any

import transformers.trainer
from trl import SFTTrainer

from finetune_trainer.training.keeper import CheckpointKeeper
from finetune_trainer.training.sampler import ReadPlan, RowLoader


def _skip_passes(loader: RowLoader, num_passes: int) -> RowLoader:
    return loader.starting_at(num_passes)


# The Trainer resumes in the middle of an epoch by drawing and dropping all batches before it; ours begins at the right
# one. (Its `ignore_data_skip` begins the epoch anew, and miscounts the accumulation at the epoch's end.)
transformers.trainer.skip_first_batches = _skip_passes


class ContractTrainer(SFTTrainer):  # type: ignore[misc]
    """Commits each save through a keeper."""

    keeper: CheckpointKeeper
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
        if self.keeper.latest_complete == self.state.global_step:
            return
        self.keeper.before_save()
        try:
            super()._save_checkpoint(model, trial)
            self.keeper.commit(self.state.global_step, self._read_metrics())
        except Exception as error:
            self.keeper.abandon(self.state.global_step, error)
            raise

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

    def _read_metrics(self) -> dict[str, float]:
        """Return the evaluation metrics of this step, if it was evaluated."""
        for entry in reversed(self.state.log_history):
            if entry.get("step") == self.state.global_step and any(name.startswith("eval_") for name in entry):
                return {name: float(value) for name, value in entry.items() if name.startswith("eval_")}
        return {}

    def create_model_card(self, *_args: Any, **_options: Any) -> None:
        """Write none at every save: the model card belongs to the promoted model."""
