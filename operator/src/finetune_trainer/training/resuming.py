"""From which checkpoint an attempt goes on, and with what settings; called by all ranks, before there is an engine.

Rank 0 chooses the newest checkpoint whose files are there in full length. Then the ranks compare the content of its
files with the digests, each those that it is about to load, and where one differs the checkpoint is moved to the
quarantine and the one before is tried. So nothing that the libraries load is damaged, and no attempt is lost on it.

What that costs: SHA-256 runs at 1.6 GB/s per process (measured on one core with SHA instructions), and the content
comes only once from the volume, since loading then finds it in the page cache. For 7 billion parameters (81 GB) on four
ranks that is 13 s per start.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable

from finetune_contract.run_config import RunConfig
from finetune_trainer.checkpoints.layout import Folder
from finetune_trainer.checkpoints.manifest import Manifest, read_manifest, verify_files
from finetune_trainer.checkpoints.resume import (
    Verdict,
    choose_resume,
    move_to_quarantine,
    observe_checkpoints,
    quarantine,
)
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.reporting import emit, emit_warning
from finetune_trainer.training.schedule import keep_rows_per_step

_OWNER = re.compile(r"(?:zero_pp_rank|rng_state)_(\d+)")


def choose_checkpoint(root: pathlib.Path, resume: str, group: ControlGroup) -> Folder | None:
    """Return the newest checkpoint whose content is whole; the same on every rank. Sets aside what is not."""
    chosen = group.decide(lambda: _choose_once(root, resume))
    while chosen is not None:
        folder = chosen
        found = group.gather(_verify_share(folder.path, group))
        problems = tuple(problem for share in found for problem in share)
        if not problems:
            break
        chosen = group.decide(lambda: _fall_back_once(root, Verdict(folder, problems)))  # noqa: B023
    if chosen is not None and group.rank == 0:
        emit("resuming", checkpoint=chosen.path.name)
    return chosen


def _choose_once(root: pathlib.Path, resume: str) -> Folder | None:
    verdicts = observe_checkpoints(root)
    for verdict in quarantine(root, verdicts):
        _warn(verdict)
    if resume != "Never":
        return choose_resume(verdicts)
    # The checkpoints of earlier runs go aside, so that new ones never mix with them.
    for verdict in verdicts:
        if verdict.is_complete:
            move_to_quarantine(root, verdict.folder)
    return None


def _fall_back_once(root: pathlib.Path, verdict: Verdict) -> Folder | None:
    move_to_quarantine(root, verdict.folder)
    _warn(verdict)
    return choose_resume(observe_checkpoints(root))


def _warn(verdict: Verdict) -> None:
    name, problem = verdict.folder.path.name, verdict.problems[0]
    emit_warning("checkpoint moved to quarantine", checkpoint=name, problem=problem)


def _verify_share(checkpoint: pathlib.Path, group: ControlGroup) -> list[str]:
    """Return what is wrong with the files that this rank looks at."""
    files = read_manifest(checkpoint).files
    share = select_share(files, group.rank, group.size)
    return verify_files(checkpoint, {name: files[name] for name in share}, full=True)


def select_share(names: Iterable[str], rank: int, num_ranks: int) -> list[str]:
    """Return the files that one rank verifies: those with its number, which it then loads, and its part of the rest."""
    share, rest = [], 0
    for name in sorted(names):
        match = _OWNER.search(name)
        owner = int(match[1]) if match else rest
        rest += 0 if match else 1
        if owner % num_ranks == rank:
            share.append(name)
    return share


def keep_rows(run: RunConfig, checkpoint: pathlib.Path | None, num_ranks: int) -> RunConfig:
    """Return the settings with the rows per step that a checkpoint was trained with. Raises TrainerError where so many
    ranks cannot take them.
    """
    rows = 0 if checkpoint is None else read_manifest(checkpoint).rows_per_step
    if not rows:
        return run
    return dataclasses.replace(run, training=keep_rows_per_step(run.training, rows, num_ranks))


def fit_checkpoint(run: RunConfig, checkpoint: pathlib.Path | None, group: ControlGroup) -> tuple[str | None, bool]:
    """Return the folder to load and whether it is a conversion, made now where the checkpoint's ranks were others."""
    from finetune_trainer.training import universal

    if checkpoint is None:
        return None, False
    manifest = read_manifest(checkpoint)
    if not needs_conversion(manifest, group.size, run.training.zero_stage):
        return str(checkpoint), False
    return str(universal.convert(checkpoint, manifest, group)), True


def needs_conversion(manifest: Manifest, num_ranks: int, zero_stage: int) -> bool:
    """Return whether the shards of a checkpoint are cut for others than these ranks."""
    return manifest.world_size != num_ranks or manifest.zero_stage != zero_stage
