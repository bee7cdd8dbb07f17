"""QLoRA: the base in 4 bits, its adapter trained, saved, resumed to the bit, and promoted over the base as it came."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.promotion.adapter import list_adapter_files
from finetune_trainer.serving.generate import Generator
from finetune_trainer.training import modeling, quantization
from tests.support.training_runs import end_state, kill_group

QLORA = (
    *("training.method=lora", "training.lora_rank=4", "training.lora_quantization=nf4", "training.precision=bf16"),
    *("training.learning_rate=0.01", "training.scheduler=constant", "training.warmup_steps=0"),
    *("training.gradient_checkpointing=true", "training.logging_steps=1", "checkpoint.every_steps=4"),
)
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def make_qlora(make_run):
    """Return a function that makes a workspace of a run on a quantized base."""
    return lambda name, *settings, family="llama": make_run(family, name, *QLORA, *settings)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_that_is_killed_ends_with_the_same_bits(make_qlora, stage, capfd):
    # Evaluations between steps leave the base as it is.
    settings = (f"training.zero_stage={stage}", "checkpoint.keep_best=1")
    whole, killed = make_qlora("whole", *settings), make_qlora("killed", *settings)
    child = killed.start("training.max_steps=100000")
    killed.wait_for_checkpoint(4)
    kill_group(child)
    last = max(killed.manifests()) + 3
    resumed = killed.train(f"training.max_steps={last}")
    results = whole.train(f"training.max_steps={last}")

    assert (resumed["resumed_from_step"], results["resumed_from_step"]) == (last - 3, None)
    assert end_state(killed.manifests()[last]) == end_state(whole.manifests()[last])
    assert "base model quantized to=nf4 layers=14" in capfd.readouterr().err
    assert results["loss"] < 5.7, "guessing costs 5.98"
    folder = whole.workspace.checkpoints / f"checkpoint-{last}"
    adapter = load_file(folder / "adapter_model.safetensors")
    # 2 layers x 7 linear layers x (A and B).
    assert len(adapter) == 28
    assert all(tensor.any() for tensor in adapter.values())
    # The base in 4 bits is made anew, not saved.
    assert set(_read_shards(folder)) == {name.replace(".weight", ".default.weight") for name in adapter}


def test_the_base_is_held_in_four_bits_and_promoted_as_it_came(make_qlora, models, tmp_path):
    run = make_qlora("workspace", "training.zero_stage=1", "training.max_steps=8")
    run.train()
    assert run.call("promote") == 0, run.report("promote")
    folder = run.workspace.promoted_model(run.report("promote")["details"]["digest"])
    base, merged = load_file(models["llama"] / "model.safetensors"), load_file(folder / "model.safetensors")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")

    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    for name, weight in base.items():
        wanted = weight.to(torch.bfloat16)
        if name.split(".")[-2] in LINEAR:
            down, up = (adapter[f"base_model.model.{name.replace('weight', f'lora_{half}.weight')}"] for half in "AB")
            # alpha / rank: 32 / 4.
            wanted = wanted + 8 * (up.float() @ down.float()).to(torch.bfloat16)
        assert torch.allclose(merged[name], wanted, rtol=0.02, atol=1e-3), name
    assert Generator(folder).answer([{"role": "user", "content": "What does list.opens do?"}], 4).text
    (tmp_path / "beside").mkdir()
    assert {file.name for file in list_adapter_files(folder, tmp_path / "beside", "destination")[1]} > {
        *("adapter_config.json", "adapter_model.safetensors", "README.md"),
    }


@pytest.mark.parametrize(("stage", "kept_in"), [(2, torch.uint8), (3, torch.bfloat16)])
def test_linear_layers_take_a_quarter_of_their_memory(models, stage, kept_in):
    training = TrainingConfig(method="lora", lora_quantization="nf4", zero_stage=stage)
    model = modeling.load_model(models["llama"], "bfloat16", quantization=quantization.build_quantization(training))

    plain = load_file(models["llama"] / "model.safetensors")
    quantized = {name: each for name, each in model.named_parameters() if name.split(".")[-2] in LINEAR}
    assert len(quantized) == 14
    assert {each.dtype for each in quantized.values()} == {kept_in}
    assert all(4 * each.nbytes == 2 * plain[name].numel() for name, each in quantized.items())
    assert {each.dtype for name, each in model.named_parameters() if name not in quantized} == {torch.bfloat16}


def test_the_process_that_ranks_are_forked_from_does_not_import_what_initialises_cuda():
    code = """if True:
        import sys
        from finetune_trainer.training.stack import import_stack

        import_stack(uses_gpus=True)
        print([name for name in ("peft", "bitsandbytes") if name in sys.modules])
        """
    run = subprocess.run((sys.executable, "-c", code), check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "['peft']"


def test_a_tensor_of_another_shape_is_refused_although_it_is_packed_into_bits(make_qlora, models, tmp_path):
    run = make_qlora("workspace", "training.zero_stage=3", "training.max_steps=1")
    run.model = shutil.copytree(models["llama"], tmp_path / "reshaped")
    tensors, name = load_file(run.model / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:100].contiguous()
    save_file(tensors, run.model / "model.safetensors", {"format": "pt"})

    assert run.call("train") == ExitCode.NO_INPUT
    assert f"tensor {name} has shape (100, 64), the configuration says (192, 64)" in run.report("train")["message"]


def _read_shards(folder):
    for path in sorted(folder.rglob("*model_states.pt")):
        yield from torch.load(path, weights_only=False)["module"]
