"""Each model family trains, saves, resumes, promotes and answers; under every ZeRO stage, full and LoRA."""

import json

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.promotion import promoted
from finetune_trainer.serving.generate import Generator


def _promote(run, *settings):
    assert run.call("promote", *settings) == 0, run.report("promote")
    return run.workspace.promoted_model(run.report("promote")["details"]["digest"])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mpt"])
def test_a_family_trains_resumes_promotes_and_answers(make_run, family, capfd):
    run = make_run(family, "workspace", "checkpoint.every_steps=0", "training.packing=true", "training.precision=fp32")
    run.train("training.max_steps=10")
    results = run.train("training.max_steps=70", "training.learning_rate=0.01", "training.scheduler=constant")

    assert (results["resumed_from_step"], results["step"]) == (10, 70)
    assert results["loss"] < 3, "a third of what guessing costs"
    assert ("packing is off" in capfd.readouterr().err) == (family == "mpt")
    assert results["packing"] == (-1 if family == "mpt" else 1)
    # Forty examples of like length leave a gap in most rows, and more of one where each has its own.
    assert (results["real_token_share"] > 0.8) == (family != "mpt")
    assert (results["examples_dropped"], results["examples_truncated"]) == (0, 0)

    answer = Generator(_promote(run)).answer([{"role": "user", "content": "What does list.opens do?"}], 40)
    assert answer.text.startswith("It "), answer
    assert "returns" in answer.text


@pytest.mark.parametrize("stage", [1, 2])
def test_the_other_zero_stages_train_save_resume_and_promote(make_run, stage):
    run = make_run("llama", "workspace", f"training.zero_stage={stage}", "checkpoint.every_steps=2")
    run.train("training.max_steps=2")

    assert run.train("training.max_steps=4")["resumed_from_step"] == 2
    assert run.manifests()[4].zero_stage == stage
    assert promoted.read_manifest(_promote(run))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_lora_adapter_is_never_empty_and_is_promoted_merged(make_run, models, stage):
    from safetensors.torch import load_file

    settings = ("training.method=lora", "training.lora_rank=4", "checkpoint.every_steps=2")
    run = make_run("llama", "workspace", f"training.zero_stage={stage}", *settings)
    run.train("training.max_steps=2")
    assert run.train("training.max_steps=6")["resumed_from_step"] == 2

    adapter = load_file(run.workspace.checkpoints / "checkpoint-6" / "adapter_model.safetensors")
    # 2 layers x 7 linear layers x (A and B).
    assert len(adapter) == 28
    assert all(tensor.numel() > 0 for tensor in adapter.values())
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)

    folder = _promote(run)
    merged, base = load_file(folder / "model.safetensors"), load_file(models["llama"] / "model.safetensors")
    changed = {name.split(".")[-2] for name in base if not merged[name].equal(base[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == ""


def test_gradient_checkpointing_and_accumulation_change_nothing_but_rounding(make_run):
    settings = ("training.packing=false", "training.precision=fp32", "training.max_steps=4", "training.logging_steps=1")
    plain = make_run("llama", "plain", *settings, "training.per_device_batch_size=4")
    other = make_run(
        "llama",
        "other",
        *settings,
        "training.per_device_batch_size=4",
        "training.gradient_checkpointing=true",
    )

    losses = [_losses(run) for run in (plain, other) if run.train()]

    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[0]) == 4


def _losses(run):
    lines = (run.workspace.reports / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_automatic_accumulation_is_resolved_before_training(make_run):
    run = make_run("llama", "workspace", "training.gradient_accumulation_steps=0", "training.packing=false")

    # 40 rows, 2 ranks x 2 rows x 4 (the recipe's accumulation) = 16 rows a step: 3 steps an epoch.
    assert run.train("training.epochs=1")["total_steps"] == 3


def test_keys_merged_into_the_deepspeed_configuration_take_effect(make_run):
    run = make_run()
    bad = 'training.deepspeed_config={"zero_optimization": {"stage": 9}}'

    assert run.call("train", bad, "training.max_steps=1") == ExitCode.CONFIG
    report = run.report("train")
    assert report["reason"] == Reason.INVALID_CONFIG
    assert "spec.training.deepspeed.config" in report["hint"]


def test_a_loss_that_is_no_number_ends_the_run_with_its_reason(make_run):
    run = make_run()

    code = run.call(
        "train",
        "training.max_steps=50",
        "training.learning_rate=1e30",
        "training.precision=fp32",
        "training.warmup_steps=0",
    )

    report = run.report("train")
    assert code == ExitCode.USER_CODE
    assert report["reason"] == Reason.NON_FINITE_LOSS
    assert "spec.training.learningRate" in report["hint"]


def test_a_model_that_cannot_be_loaded_is_named(make_run, tmp_path):
    run = make_run()
    run.model = tmp_path / "not-a-model"
    run.model.mkdir()
    (run.model / "config.json").write_text('{"model_type": "no-such-architecture"}')

    assert run.call("train", "training.max_steps=1") == ExitCode.NO_INPUT
    report = run.report("train")
    assert report["reason"] == Reason.MODEL_INVALID
    assert str(run.model) in report["message"]
