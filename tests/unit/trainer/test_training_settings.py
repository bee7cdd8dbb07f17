"""Settings of a run: step arithmetic, DeepSpeed's configuration, packing, and fields set by name."""

import argparse
import dataclasses
import functools
import json
import operator

import pytest

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import DatasetConfig, RunConfig, Source, Topology, TrainingConfig
from finetune_trainer.checkpoints.identity import identify_run
from finetune_trainer.commands import plain
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.deepspeed_config import build_deepspeed_config
from finetune_trainer.training.inputs import check_settings
from finetune_trainer.training.schedule import count_steps

RUN = RunConfig(model=Source("hf://org/model"), dataset=DatasetConfig(sources=()))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_recipe_s_deepspeed_configuration_has_no_offload_and_leaves_numbers_to_the_trainer(stage):
    config = build_deepspeed_config(TrainingConfig(zero_stage=stage, precision="fp16"))

    zero = config["zero_optimization"]
    assert zero["stage"] == stage
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero
    assert (config["fp16"], config["bf16"]) == ({"enabled": True}, {"enabled": False})
    assert config["train_batch_size"] == config["gradient_accumulation_steps"] == "auto"
    # Without it a ZeRO-3 run saves placeholders of shape (0,).
    assert zero.get("stage3_gather_16bit_weights_on_model_save", stage < 3) is True


def test_offload_all_means_parameters_too_only_where_they_are_partitioned():
    def offloaded(stage, offload):
        zero = build_deepspeed_config(TrainingConfig(zero_stage=stage, offload=offload))["zero_optimization"]
        return sorted(key for key in zero if key.startswith("offload"))

    assert offloaded(3, "all") == ["offload_optimizer", "offload_param"]
    assert offloaded(3, "optimizer") == ["offload_optimizer"]
    assert offloaded(2, "all") == ["offload_optimizer"]


def test_what_the_user_writes_wins_key_by_key():
    user = {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}

    config = build_deepspeed_config(TrainingConfig(deepspeed_config=user))

    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["zero_optimization"]["stage"] == 3
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("rows", "ranks", "training", "steps"),
    [
        # The recipe of origin: 54,974 rows, 4 GPUs x 8 x 4 = 128 rows per step, rounded up as the Trainer does.
        (54_974, 4, TrainingConfig(), 1290),
        (10, 1, TrainingConfig(epochs=1, per_device_batch_size=1, gradient_accumulation_steps=4), 3),
        (7, 2, TrainingConfig(epochs=1, per_device_batch_size=2, gradient_accumulation_steps=1), 2),
        (7, 2, TrainingConfig(epochs=0.5, per_device_batch_size=2, gradient_accumulation_steps=1), 1),
        (7, 2, TrainingConfig(max_steps=9), 9),
        (1, 4, TrainingConfig(epochs=3), 3),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(rows, ranks, training, steps):
    assert count_steps(rows, ranks, training) == steps


def test_fp16_without_gpus_is_refused_with_what_to_type():
    fp16 = RunConfig(model=RUN.model, dataset=RUN.dataset, training=TrainingConfig(precision="fp16"))

    with pytest.raises(TrainerError) as caught:
        check_settings(fp16)

    assert caught.value.exit_code == ExitCode.CONFIG
    assert "spec.training.precision" in caught.value.message
    assert "bf16" in caught.value.hint
    check_settings(RunConfig(RUN.model, RUN.dataset, training=fp16.training, topology=Topology(gpus_per_node=1)))


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"lora_quantization": "int4"}, "int4 is not one of nf4", "quantization to nf4"),
        ({"method": "full"}, "needs an adapter", "method to lora"),
        ({"precision": "fp16"}, "not trained in fp16", "precision to bf16"),
        ({"offload": "all"}, "not offloaded", "offload to optimizer"),
    ],
)
def test_a_base_in_four_bits_is_refused_where_it_is_not_shown_to_work(changes, said, hint):
    quantized = TrainingConfig(method="lora", lora_quantization="nf4")
    gpus = dataclasses.replace(RUN, topology=Topology(gpus_per_node=1), training=quantized)
    check_settings(gpus)
    with pytest.raises(TrainerError) as caught:
        check_settings(dataclasses.replace(gpus, training=dataclasses.replace(quantized, **changes)))
    assert caught.value.exit_code == ExitCode.CONFIG
    assert "spec.training.lora.quantization" in caught.value.message
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_quantization_tells_runs_apart_and_checkpoints_from_before_it_are_taken_up(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "config.json").write_text("{}")

    def digest(training):
        return identify_run(dataclasses.replace(RUN, training=training), tmp_path, tmp_path)["settings"]

    # As it was before the setting came.
    assert digest(TrainingConfig()) == "0c6e24918b7898ef3c8007dd51fbd487"
    assert digest(TrainingConfig(lora_quantization="nf4")) != digest(TrainingConfig())


def test_every_field_that_is_named_in_the_hint_can_be_set():
    settings = dataclasses.asdict(RUN)

    def read(name):
        return functools.reduce(operator.getitem, name.split("."), settings)

    for name in plain.list_fields(RunConfig):
        assert plain.apply_overrides(RUN, [f"{name}={json.dumps(read(name))}"]) == RUN, name


def test_any_field_can_be_set_by_its_name():
    changed = plain.apply_overrides(
        RUN, ["training.max_steps=10", "dataset.prompt_template=wizardlm", 'training.deepspeed_config={"a": 1}']
    )

    assert changed.training.max_steps == 10
    assert changed.dataset.prompt_template == "wizardlm"
    assert changed.training.deepspeed_config == {"a": 1}
    assert RUN.training.max_steps == 0


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("training.maxSteps=1", "training.maxSteps=1: no such field"),
        ("nonsense", "nonsense: no such field"),
        ("training.max_steps=ten", "training.max_steps: expected int"),
    ],
)
def test_a_wrong_assignment_is_named(assignment, said):
    with pytest.raises(TrainerError) as caught:
        plain.apply_overrides(RUN, [assignment])

    assert caught.value.exit_code == ExitCode.USAGE
    assert said in caught.value.message


def test_plain_files_stand_in_for_a_run_configuration(tmp_path):
    parser = argparse.ArgumentParser()
    plain.add_arguments(parser)
    args = parser.parse_args(
        [
            "--model",
            str(tmp_path),
            "--data",
            str(tmp_path),
            "--workspace",
            str(tmp_path / "w"),
            "--set",
            "training.seed=7",
        ]
    )

    settings = plain.load_settings(args)

    assert (settings.model.source, settings.workspace) == (str(tmp_path), str(tmp_path / "w"))
    assert settings.dataset.sources[0].source == str(tmp_path)
    assert settings.training.seed == 7
    assert args.workspace_root == str(tmp_path / "w")


def test_a_run_configuration_file_is_read(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(json.loads(RUN.to_json()) | {"workspace": str(tmp_path)}))
    parser = argparse.ArgumentParser()
    plain.add_arguments(parser)

    settings = plain.load_settings(parser.parse_args(["--run-config", str(file)]))

    assert settings.workspace == str(tmp_path)
