"""The same code as on CPUs, on every GPU of the machine: NCCL, both recipes' precisions, resume, and a full GPU."""

import json
import os
import signal
import subprocess
import sys

import pytest

from finetune_contract.reports import ExitCode, Reason
from tests.support import tiny_models

ROWS = [
    (f"What does list.{verb} do?", f"It {verb} the list and returns it.") for verb in ("opens", "joins", "sorts")
] * 16


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A base model and a prepared data set."""
    root = tmp_path_factory.mktemp("material")
    texts = [f"{question}\n\n### Response:{answer}" for question, answer in ROWS]
    tiny_models.build_tiny_llama(root / "model", texts, vocab_size=400, hidden=64, layers=2)
    (root / "data").mkdir()
    for name in ("train", "holdout"):
        lines = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "index": i, "source": 0}
            for i, (q, a) in enumerate(ROWS)
        ]
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _train(material, workspace, num_gpus, *settings):
    """Train in a process of its own, as a pod does; return the exit code and the report."""
    words = ["--model", material / "model", "--data", material / "data", "--workspace", workspace]
    chosen = (
        f"topology.gpus_per_node={num_gpus}",
        f"topology.processes_per_node={num_gpus}",
        "training.max_length=128",
        "training.gradient_accumulation_steps=1",
        "training.learning_rate=0.01",
        "checkpoint.every_steps=4",
        *settings,
    )
    words += [word for setting in chosen for word in ("--set", setting)]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "finetune_trainer", "train", *map(str, words)]
    code = subprocess.run(command, check=False, env=environment, timeout=540).returncode
    return code, json.loads((workspace / "reports" / "train.json").read_text())


@pytest.mark.parametrize(
    "recipe",
    [
        ("training.precision=bf16", "training.packing=true"),
        ("training.precision=fp16", "training.packing=false"),
        ("training.precision=bf16", "training.method=lora"),
        *(
            ("training.method=lora", "training.lora_quantization=nf4", f"training.zero_stage={stage}")
            for stage in (2, 3)
        ),
        ("training.precision=bf16", "training.zero_stage=2"),
    ],
)
def test_a_run_trains_saves_and_resumes(material, tmp_path, num_gpus, recipe):
    assert _train(material, tmp_path, num_gpus, "training.max_steps=4", *recipe)[0] == ExitCode.OK

    code, report = _train(material, tmp_path, num_gpus, "training.max_steps=8", *recipe)

    assert code == ExitCode.OK, report
    assert report["details"]["resumed_from_step"] == 4
    assert report["details"]["step"] == 8
    assert report["details"]["loss"] < 7


def test_a_full_gpu_is_reported_with_the_batch_to_try(material, tmp_path, num_gpus, monkeypatch):
    # PyTorch may use a sliver of the GPU only: less than the CUDA libraries and this model need together.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "per_process_memory_fraction:0.0001")

    code, report = _train(material, tmp_path, num_gpus, "training.max_steps=2")

    assert (code, report["reason"]) == (ExitCode.OUT_OF_MEMORY, Reason.OUT_OF_MEMORY), report
    assert "perDeviceBatchSize to 4" in report["hint"]


def test_a_save_copies_from_the_gpu_through_locked_memory_and_waits_for_no_disk(tmp_path, num_gpus):
    import torch

    from finetune_trainer.checkpoints.attempt import Fence
    from finetune_trainer.checkpoints.writer import Writer
    from finetune_trainer.training.snapshot import Buffer, copy_images, count_buffer_bytes, draw_state

    # Before CUDA is initialised, as in a rank.
    writer = Writer.start()
    try:
        device = f"cuda:{num_gpus - 1}"
        torch.cuda.set_device(device)
        weights = torch.arange(64 << 20, dtype=torch.float32, device=device)
        images = [draw_state("shard.pt", {"weights": weights, "view": weights[3:9], "on the host": torch.arange(5)})]
        buffer = Buffer(writer)
        buffer.grow(count_buffer_bytes(images))
        assert torch.frombuffer(writer.map_buffer(1), dtype=torch.uint8).is_pinned()
        # The disk does not answer; the next step comes all the same, and what is written is what was.
        os.kill(writer.pid, signal.SIGSTOP)
        copy_images(images, buffer, writer, (tmp_path / "checkpoint-5", Fence(tmp_path / "attempt.json", 1)))
        weights.zero_()
        torch.cuda.synchronize()
        os.kill(writer.pid, signal.SIGCONT)
        writer.wait()
        assert writer.failure is None
        loaded = torch.load(tmp_path / "checkpoint-5" / "shard.pt", map_location="cpu")
    finally:
        writer.stop()
    assert torch.equal(loaded["weights"], torch.arange(64 << 20, dtype=torch.float32))
    assert loaded["view"].tolist() == [3, 4, 5, 6, 7, 8]
    assert loaded["on the host"].tolist() == [0, 1, 2, 3, 4]
