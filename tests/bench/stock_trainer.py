"""The baseline: Hugging Face's Trainer with DeepSpeed and `resume_from_checkpoint=True`, on the same model and data.

It takes the command line of `finetune-trainer train`, so that both train under the same settings. What is different is
only how checkpoints are written, chosen and deleted. Its one callback notes steps and finished saves for the watcher.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tests.support.training_runs  # noqa: F401 (sets the environment that torch reads)
from finetune_contract.workspace import Workspace
from finetune_trainer.__main__ import build_parser
from finetune_trainer.commands import plain


def train(words: Sequence[str]) -> int:
    """Train in forked ranks of this process, and return the exit code."""
    from finetune_trainer.training.inputs import read_inputs
    from finetune_trainer.training.supervisor import run_ranks

    settings = plain.load_settings(build_parser("train").parse_args(list(words)))
    inputs = read_inputs(settings)
    return run_ranks(lambda: _run_rank(inputs), inputs.run.topology, inputs.run.training).exit_code


def saved_path(root: pathlib.Path, step: int) -> pathlib.Path:
    """Return the path of the mark that a save came to its end, on a workspace of this trainer."""
    return root / "reports" / f"saved-{step}"


def _run_rank(inputs: Any) -> tuple[int, dict[str, Any]]:
    import transformers.trainer
    from accelerate import skip_first_batches
    from transformers import Trainer, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from finetune_trainer.training import modeling
    from finetune_trainer.training.arguments import torch_dtype
    from finetune_trainer.training.collate import Collator
    from finetune_trainer.training.rank import build_dataset, join_ranks

    # Ours puts something else in its place, in the process that both are forked from.
    transformers.trainer.skip_first_batches = skip_first_batches
    run = inputs.run
    join_ranks(run.topology.gpus_per_node > 0)
    output = Workspace(pathlib.Path(run.workspace)).checkpoints
    arguments = _build_arguments(run, output)
    set_seed(run.training.seed)
    model = modeling.load_model(
        inputs.base_model,
        torch_dtype(run.training.precision),
        is_partitioned=run.training.zero_stage == 3,
        attention=inputs.packed_attention,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=Collator(modeling.choose_pad_token(inputs.tokenizer), packed=bool(inputs.packed_attention)),
        train_dataset=build_dataset(inputs.train),
        callbacks=[_build_callback(pathlib.Path(run.workspace) / "reports")],
    )
    # `True` is refused where there is no checkpoint at all, so a first start has to ask.
    has_any = output.is_dir() and get_last_checkpoint(str(output)) is not None
    trainer.train(resume_from_checkpoint=has_any or None)
    return 0, {}


def _build_arguments(run: Any, output: pathlib.Path) -> Any:
    from transformers import TrainingArguments

    from finetune_trainer.training.deepspeed_config import build_deepspeed_config, merge

    training = run.training
    gathered = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}
    deepspeed = build_deepspeed_config(training)
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.scheduler,
        warmup_steps=training.warmup_steps,
        optim="adamw_torch",
        bf16=training.precision == "bf16",
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=True,
        deepspeed=merge(deepspeed, gathered) if training.zero_stage == 3 else deepspeed,
        save_strategy="steps",
        save_steps=run.checkpoint.every_steps,
        save_total_limit=run.checkpoint.keep_latest,
        logging_steps=training.logging_steps,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _build_callback(reports: pathlib.Path) -> Any:
    from transformers import TrainerCallback

    class Notes(TrainerCallback):
        """Notes each step, and each save that came to its end; on rank 0 only."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                reports.mkdir(exist_ok=True)
                with (reports / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": state.global_step}) + "\n")

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                saved_path(reports.parent, state.global_step).touch()

    return Notes()


if __name__ == "__main__":
    from tests.bench.training_process import import_stack

    import_stack()
    sys.exit(train(sys.argv[1:]))
