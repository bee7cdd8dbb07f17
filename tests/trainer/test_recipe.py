"""The recipe of origin, in the words of the library that carries it out."""

import dataclasses

import pytest

from finetune_contract.run_config import DatasetConfig, RunConfig, Source, Topology, TrainingConfig
from finetune_trainer.training.supervisor import run_ranks

RECIPE = TrainingConfig(recipe="wizardlm-freeform", packing=False, precision="bf16", zero_stage=3)
RUN = RunConfig(
    model=Source("hf://org/llama-7b"),
    dataset=DatasetConfig(sources=(), prompt_template="wizardlm"),
    training=RECIPE,
    topology=Topology(processes_per_node=1),
)


def _read_arguments(run, tmp_path):
    """Return the library's arguments as a rank builds them."""

    def work():
        from finetune_trainer.training.arguments import build_arguments
        from finetune_trainer.training.rank import join_ranks

        join_ranks(uses_gpus=False)
        return 0, build_arguments(run, tmp_path).to_dict()

    return run_ranks(work, run.topology, run.training).results


def test_the_recipe_s_numbers_reach_the_trainer(tmp_path):
    arguments = _read_arguments(RUN, tmp_path)

    expected = {
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_steps": 800,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "logging_steps": 2,
        "bf16": True,
        "seed": 42,
        "weight_decay": 0.0,
        # Ours does the rotation.
        "save_total_limit": None,
        "report_to": [],
    }
    assert {name: arguments[name] for name in expected} == expected
    assert arguments["gradient_checkpointing"] or arguments["activation_checkpointing"]
    assert arguments["deepspeed"]["zero_optimization"]["stage"] == 3
    assert "offload_optimizer" not in arguments["deepspeed"]["zero_optimization"]


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_is_reported_to_when_it_is_named(tmp_path, tracker):
    run = dataclasses.replace(RUN, training=dataclasses.replace(RECIPE, tracking=(tracker,)))

    assert _read_arguments(run, tmp_path)["report_to"] == [tracker]
