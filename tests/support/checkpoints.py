"""Small committed checkpoints for tests of everything around them; written by the production code."""

from __future__ import annotations

import pathlib

from finetune_trainer.checkpoints.layout import checkpoint_name
from finetune_trainer.checkpoints.manifest import Manifest, list_files, seal_files, write_manifest


def write_checkpoint(
    root: pathlib.Path, step: int, *, metric: float | None = None, world_size: int = 2, zero_stage: int = 3
) -> pathlib.Path:
    """Write a folder in the layout of Trainer and DeepSpeed with a few bytes per file, and commit it."""
    folder = root / checkpoint_name(step)
    shards = folder / f"global_step{step}"
    shards.mkdir(parents=True)
    for rank in range(world_size):
        (shards / f"shard_{rank}.pt").write_bytes(f"shard {rank:>2}".encode())
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    (folder / "latest").write_text(shards.name)
    manifest = Manifest(
        step=step,
        world_size=world_size,
        zero_stage=zero_stage,
        dtype="bf16",
        attempt=1,
        created_at="2026-01-01T00:00:00Z",
        files=seal_files(folder, list_files(folder)),
        metrics={} if metric is None else {"eval_loss": metric},
    )
    write_manifest(folder, manifest)
    return folder
