"""Training that goes on with another number of ranks, or another ZeRO stage, ends where it would have ended.

Not to the bit: the sums over ranks and passes are taken in another order. In fp32 the end differs by rounding alone.
"""

import argparse

import pytest
import torch

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import disk
from finetune_trainer.checkpoints.layout import CONVERSION_MARKER, CONVERTED, MANIFEST
from finetune_trainer.checkpoints.manifest import read_manifest, verify_checkpoint
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.errors import TrainerError
from finetune_trainer.training import universal

CONSTANT = ("training.scheduler=constant", "training.warmup_steps=0", "checkpoint.every_steps=0")
"""A learning rate that does not depend on the length of the run, so that a run may be ended early."""
TOLERANCE = {"fp32": 1e-6, "bf16": 0.01}
"""Largest distance of two ends, as a share of the way from the start (Euclidean, all weights)."""
STAGES = {2: "training.zero_stage=2", 3: "training.zero_stage=3"}
NOT_PACKED, PACKED = "training.packing=false", "training.packing=true"


def read_weights(run, step):
    """Return the fp32 weights of a checkpoint as one vector, whoever saved it."""
    shards = universal.read_shards(run.workspace.checkpoints / f"checkpoint-{step}" / f"global_step{step}")
    parts = [
        fragment.read("fp32").detach().float().clone()
        for name in sorted(shards.shapes)
        for fragment in shards.fragments[name]
    ]
    return torch.cat(parts)


def measure_distance(one, other, start):
    """Return how far two ends are apart, as a share of the way."""
    return float((one - other).norm() / (one - start).norm())


def ranks(number):
    return f"topology.processes_per_node={number}"


@pytest.mark.parametrize(
    ("stage", "packing", "precision"), [(3, PACKED, "fp32"), (2, NOT_PACKED, "fp32"), (3, NOT_PACKED, "bf16")]
)
def test_four_two_and_four_ranks_end_where_four_ranks_end(make_run, stage, packing, precision):
    # 40 rows, or about 13 packs, in steps of 12: at the end of an epoch some of the ranks have no rows left.
    settings = (
        *CONSTANT,
        STAGES[stage],
        packing,
        f"training.precision={precision}",
        "training.per_device_batch_size=3",
    )
    whole, changed = make_run("llama", "whole", *settings), make_run("llama", "changed", *settings)
    whole.train(ranks(4), "training.max_steps=1")
    start = read_weights(whole, 1)
    whole.train(ranks(4), "training.max_steps=9")
    changed.train(ranks(4), "training.max_steps=3")
    changed.train(ranks(2), "training.max_steps=6")
    changed.train(ranks(4), "training.max_steps=9")

    assert [(each.world_size, each.rows_per_step) for each in changed.manifests().values()] == [
        (4, 12),
        (2, 12),
        (4, 12),
    ]
    assert measure_distance(read_weights(whole, 9), read_weights(changed, 9), start) < TOLERANCE[precision]
    assert not (changed.workspace.checkpoints / CONVERTED).exists()


def test_another_zero_stage_goes_on_there_and_back(make_run):
    settings = (*CONSTANT, NOT_PACKED, "training.precision=fp32")
    whole, changed = make_run("llama", "whole", *settings), make_run("llama", "changed", *settings)
    whole.train(STAGES[3], "training.max_steps=1")
    start = read_weights(whole, 1)
    whole.train(STAGES[3], "training.max_steps=9")
    for stage, steps in ((3, 3), (2, 6), (3, 9)):
        changed.train(STAGES[stage], f"training.max_steps={steps}")

    assert [each.zero_stage for each in changed.manifests().values()] == [3, 2, 3]
    assert measure_distance(read_weights(whole, 9), read_weights(changed, 9), start) < TOLERANCE["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_goes_on_with_another_number_of_ranks(make_run, stage):
    settings = (*CONSTANT, STAGES[stage], NOT_PACKED, "training.precision=fp32", "training.method=lora")
    whole, changed = make_run("llama", "whole", *settings), make_run("llama", "changed", *settings)
    whole.train(ranks(2), "training.max_steps=1")
    start = read_weights(whole, 1)
    whole.train(ranks(2), "training.max_steps=6")
    changed.train(ranks(2), "training.max_steps=3")
    changed.train(ranks(1), "training.max_steps=6")

    assert measure_distance(read_weights(whole, 6), read_weights(changed, 6), start) < TOLERANCE["fp32"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_conversion_holds_what_deepspeed_makes_of_the_shards(make_run, tmp_path, stage):
    from deepspeed.checkpoint import ds_to_universal

    run = make_run("llama", "workspace", STAGES[stage])
    run.train("training.max_steps=2")
    checkpoint = run.workspace.checkpoints / "checkpoint-2"
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(checkpoint / "global_step2"), "output_folder": str(tmp_path / "theirs")}
    ds_to_universal.main(argparse.Namespace(**arguments, **folders, inject_missing_state=True))

    ours = universal.convert(checkpoint, read_manifest(checkpoint), ControlGroup()) / "global_step2" / "zero"
    theirs = tmp_path / "theirs" / "zero"

    names = [path.relative_to(theirs) for path in theirs.glob("*/*.pt")]
    assert len(names) > 60
    for name in names:
        assert torch.equal(read_tensor(ours / name), read_tensor(theirs / name)), name


def read_tensor(path):
    loaded = torch.load(path, weights_only=False)
    return (loaded["param"] if isinstance(loaded, dict) else loaded).flatten()


def test_half_a_conversion_is_made_again_and_a_whole_one_is_used_again(make_run):
    run = make_run()
    run.train("training.max_steps=2")
    checkpoint = run.workspace.checkpoints / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    folder = universal.convert(checkpoint, manifest, ControlGroup())
    weights = next(folder.rglob("fp32.pt"))
    written = weights.stat().st_mtime_ns

    universal.convert(checkpoint, manifest, ControlGroup())
    assert weights.stat().st_mtime_ns == written

    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    (folder / CONVERSION_MARKER).unlink()
    universal.convert(checkpoint, manifest, ControlGroup())
    assert weights.read_bytes() == whole


def test_a_conversion_writes_nothing_into_the_checkpoint_and_needs_room(make_run, monkeypatch):
    run = make_run()
    run.train("training.max_steps=2")
    checkpoint = run.workspace.checkpoints / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    monkeypatch.setattr(disk, "read_free_bytes", lambda root: 1000)

    with pytest.raises(
        TrainerError, match=r"converting checkpoint-2 for other ranks needs .* has 1000 B free"
    ) as found:
        universal.convert(checkpoint, manifest, ControlGroup())

    assert found.value.reason is Reason.STORAGE_FULL
    monkeypatch.undo()
    universal.convert(checkpoint, manifest, ControlGroup())
    assert verify_checkpoint(checkpoint, full=True) == []
    assert {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} == {
        MANIFEST,
        *manifest.files,
    }


def test_ranks_that_cannot_keep_the_rows_per_step_are_refused_with_what_would_work(make_run):
    run = make_run()
    run.train("training.max_steps=2")

    assert run.call("train", "training.max_steps=4", ranks(3)) == ExitCode.CONFIG
    report = run.report("train")
    assert "4 rows per step, which 3 processes with 2 rows each cannot take" in report["message"]
    assert "nodes x processesPerNode is one of 1, 2, 4" in report["hint"]
