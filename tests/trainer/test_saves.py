"""Saves in the background: the files are those that `torch.save` writes, and a death costs the save in flight only."""

import io
import os
import pathlib
import signal
import struct
import zipfile

import pytest
import torch

from finetune_contract.reports import Reason
from finetune_trainer.checkpoints.attempt import Fence
from finetune_trainer.checkpoints.files import PAGE
from finetune_trainer.checkpoints.layout import MANIFEST
from finetune_trainer.checkpoints.manifest import verify_checkpoint
from finetune_trainer.checkpoints.writer import Writer
from finetune_trainer.training.snapshot import Buffer, copy_images, count_buffer_bytes, draw_bytes, draw_state
from finetune_trainer.training.weights import find_gaps
from tests.support.training_runs import reap
from tests.support.waiting import eventually


@pytest.fixture
def writer():
    started = Writer.start()
    yield started
    started.stop()


def build_state():
    base = torch.arange(30_000, dtype=torch.float32)
    return {
        "whole": base,
        "view of the same storage": base[100:200],
        "transposed": base[:600].view(20, 30).t(),
        "bf16": torch.randn(77, 5).to(torch.bfloat16),
        "empty": torch.empty(0),
        "scalar": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "nested": [{"step": 3, "moment": torch.randn(2049)}],
        "text": "1,287 steps",
    }


def save(state, folder, buffer_bytes, writer):
    """Save as a rank does, through a buffer of the given size or one that holds all."""
    images = [draw_state("shard.pt", state), draw_bytes("config.json", b"{}"), draw_bytes("empty", b"")]
    buffer = Buffer(writer)
    buffer.grow(buffer_bytes or count_buffer_bytes(images))
    copy_images(images, buffer, writer, (folder, Fence(folder.parent / "attempt.json", 1)))
    writer.wait()
    assert writer.failure is None
    return folder / "shard.pt"


@pytest.mark.parametrize("buffer_bytes", [0, 3 * PAGE], ids=["a buffer for everything", "three pages"])
def test_a_shard_is_what_torch_save_writes_but_for_the_checksums_of_its_tensors(tmp_path, writer, buffer_bytes):
    state = build_state()
    written = save(state, tmp_path / "checkpoint-5", buffer_bytes, writer).read_bytes()
    stock = io.BytesIO()
    torch.save(state, stock)

    assert len(written) == len(stock.getvalue())
    ours, theirs = zipfile.ZipFile(io.BytesIO(written)), zipfile.ZipFile(stock)
    for one, other in zip(ours.infolist(), theirs.infolist(), strict=True):
        assert (one.filename, one.header_offset) == (other.filename, other.header_offset)
        # The id is made of the checksums.
        if not one.filename.endswith("serialization_id"):
            assert read_record(written, one) == read_record(stock.getvalue(), other), one.filename
            expected = 0 if "/data/" in one.filename else other.CRC
            assert expected == one.CRC
    assert (tmp_path / "checkpoint-5" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "checkpoint-5" / "empty").read_bytes() == b""


def read_record(content, record):
    """Return what lies behind the fixed part of a record's header: name, padding, content. No checksum is looked at."""
    begin = record.header_offset + 30
    lengths = struct.unpack_from("<HH", content, record.header_offset + 26)
    return content[begin : begin + sum(lengths) + record.file_size]


def test_torch_loads_a_shard_with_its_shared_storages(tmp_path, writer):
    state = build_state()
    path = save(state, tmp_path / "checkpoint-5", 0, writer)

    for is_mapped in (False, True):
        loaded = torch.load(path, mmap=is_mapped, weights_only=True)
        assert list(loaded) == list(state)
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(loaded[name], value), name
                assert loaded[name].stride() == value.stride()
        assert torch.equal(loaded["nested"][0]["moment"], state["nested"][0]["moment"])
        assert loaded["whole"].untyped_storage().data_ptr() == loaded["transposed"].untyped_storage().data_ptr()


def test_the_copy_is_of_the_moment_of_the_save(tmp_path, writer):
    tensor = torch.zeros(500_000)
    os.kill(writer.pid, signal.SIGSTOP)
    images = [draw_state("shard.pt", {"a": tensor})]
    buffer = Buffer(writer)
    buffer.grow(count_buffer_bytes(images))
    copy_images(images, buffer, writer, (tmp_path / "checkpoint-5", Fence(tmp_path / "attempt.json", 1)))
    tensor.add_(1)
    os.kill(writer.pid, signal.SIGCONT)
    writer.wait()

    assert not torch.load(tmp_path / "checkpoint-5" / "shard.pt")["a"].any()


def test_an_empty_weight_in_a_shard_is_refused_before_it_is_written(make_run, monkeypatch):
    run = make_run("llama", "workspace", "checkpoint.every_steps=2", "training.zero_stage=2")
    monkeypatch.setattr("finetune_trainer.training.trainer.weights.find_gaps", lose_a_weight)
    assert run.call("train", "training.max_steps=2") != 0

    report = run.report("train")
    assert report["reason"] == Reason.CHECKPOINT_INVALID
    assert "is saved with shape (0,)" in report["message"]
    assert run.manifests() == {}


def lose_a_weight(states, weights, zero_stage):
    """Do what libraries have done: leave a placeholder in the model's shard."""
    for state in states:
        if "module" in state:
            name = next(iter(weights))
            state["module"] = {**state["module"], name: torch.empty(0)}
    return find_gaps(states, weights, zero_stage)


VICTIMS = {
    "its writer": (Reason.KILLED, "the process that writes checkpoints was ended by SIGKILL"),
    "the rank": (Reason.KILLED, "rank 1 was killed by SIGKILL"),
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_death_beside_a_save_costs_that_save_only(make_run, victim):
    reason, said = VICTIMS[victim]
    run = make_run("llama", "workspace", "checkpoint.every_steps=3", "checkpoint.keep_latest=9")
    pid = run.start("training.max_steps=100000")
    run.wait_for_checkpoint(3)
    rank = children(pid)[1]
    # A library may look for a compiler beside it for a moment.
    (writer,) = eventually(lambda: found if len(found := children(rank)) == 1 else None, within=60, every=0.05)
    # Its share of the next save, or of the one after that, lies half-way to the disk.
    os.kill(writer, signal.SIGSTOP)
    step = wait_for_part_of_rank_0(run)
    os.kill(writer if victim == "its writer" else rank, signal.SIGKILL)

    assert reap(pid) != 0
    report = run.report("train")
    assert report["reason"] == reason
    assert said in report["message"]
    committed = sorted(run.manifests())
    assert committed[-1] == step - 3
    results = run.train(f"training.max_steps={step + 1}")
    assert results["resumed_from_step"] == step - 3
    assert verify_checkpoint(run.workspace.checkpoints / f"checkpoint-{step}", full=True) == []
    assert sorted(run.manifests()) == [*committed, step, step + 1]


def wait_for_part_of_rank_0(run):
    """Return the step of a save of which rank 0 has written its part, and rank 1 has not."""

    def find():
        for part in run.workspace.checkpoints.glob("checkpoint-*/finetune-part-0.json"):
            if not (part.parent / "finetune-part-1.json").exists() and not (part.parent / MANIFEST).exists():
                return int(part.parent.name.rpartition("-")[2])
        return None

    return eventually(find, within=60, every=0.01, otherwise="no save is waiting for rank 1")


def children(pid):
    return sorted(int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
