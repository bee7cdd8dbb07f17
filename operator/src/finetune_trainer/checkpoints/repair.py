"""What can be mended in a folder of checkpoints without inventing data; nothing is ever deleted.

`plan_repairs` is what a dry run prints; `carry_out` does it, looking again at each checkpoint before the next step. A
checkpoint that cannot be mended goes to the quarantine, whole; one of the stock Trainer that verifies gets a manifest,
so that our trainer resumes from it.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import pathlib
from collections.abc import Iterator

from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import layout
from finetune_trainer.checkpoints.attempt import read_newest_attempt
from finetune_trainer.checkpoints.doctor import ADOPTED, Diagnosis, examine_checkpoint
from finetune_trainer.checkpoints.findings import Examined, Fault
from finetune_trainer.checkpoints.foreign import list_empty_weights, list_strange_imports
from finetune_trainer.checkpoints.manifest import (
    Manifest,
    Weight,
    list_files,
    seal_files,
    sync_folder,
    write_manifest,
)
from finetune_trainer.checkpoints.resume import move_to_quarantine
from finetune_trainer.checkpoints.shards import LATEST
from finetune_trainer.reporting import now_text
from finetune_trainer.safetensors_header import LENGTH_BYTES, parse_header, parse_length

QUIET_SECONDS = 60
"""An unfinished newest checkpoint that was written to more recently may be a save that goes on."""
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_LATEST_FAULTS = frozenset({Fault.LATEST_MISSING, Fault.LATEST_DANGLING})


class Kind(enum.StrEnum):
    """What a repair does."""

    WRITE_LATEST = "write-latest"
    SET_WEIGHTS_ASIDE = "set-weights-aside"
    RENAME = "rename"
    WRITE_MANIFEST = "write-manifest"
    QUARANTINE = "quarantine"
    LEAVE = "leave"
    """Nothing, and why."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """One thing to do with one checkpoint."""

    kind: Kind
    path: pathlib.Path
    text: str
    target: str = ""
    """What `latest` will say, or the folder's new name."""


def plan_repairs(diagnosis: Diagnosis, now: float | None = None) -> list[Repair]:
    """Return what `carry_out` would do, in order; `now` is the time, or None where no save can be running."""
    repairs: list[Repair] = []
    taken = {one.path.name for one in diagnosis.checkpoints}
    for one in diagnosis.checkpoints:
        is_newest = one is diagnosis.checkpoints[-1]
        if now is not None and is_newest and not one.is_complete and now - _read_changed(one.path) < QUIET_SECONDS:
            text = f"written to less than {QUIET_SECONDS} s ago: a save may be running (--now mends it all the same)"
            repairs.append(Repair(Kind.LEAVE, one.path, text))
            continue
        repairs += _plan_one(one, taken)
    return repairs


def _read_changed(path: pathlib.Path) -> float:
    return max([path.stat().st_mtime, *(entry.stat().st_mtime for entry in path.rglob("*"))])


def _plan_one(one: Examined, taken: set[str]) -> list[Repair]:
    if Fault.BEING_DELETED in one.faults:
        return [Repair(Kind.LEAVE, one.path, "its deletion was cut short; `prune --yes` finishes it")]
    if layout.parse_step(one.path.name) is None and not one.is_complete:
        return [Repair(Kind.LEAVE, one.path, "only folders named checkpoint-N are moved")]
    fixes = list(_find_fixes(one, taken))
    mended = frozenset().union(*(_mends(fix) for fix in fixes))
    if one.faults - mended:
        worst = next(finding for finding in one.findings if finding.fault not in mended)
        return [Repair(Kind.QUARANTINE, one.path, f"cannot be mended: {worst.text}")]
    return fixes + list(_plan_manifest(one))


def _mends(fix: Repair) -> frozenset[Fault]:
    step = {Fault.STEP_MISMATCH}
    mended = {
        Kind.WRITE_LATEST: _LATEST_FAULTS | step,
        Kind.SET_WEIGHTS_ASIDE: {Fault.WEIGHTS_EMPTY},
        Kind.RENAME: step,
    }
    return frozenset(mended[fix.kind])


def _find_fixes(one: Examined, taken: set[str]) -> Iterator[Repair]:
    """Find what the rest of the checkpoint tells beyond doubt."""
    step = one.facts.state_step
    tag = f"global_step{step}"
    latest = one.path / LATEST
    has_shards = not one.is_ours and (one.path / tag).is_dir()
    is_right = latest.exists() and latest.read_text(errors="replace").strip() == tag
    if has_shards and one.faults & (_LATEST_FAULTS | {Fault.STEP_MISMATCH}) and not is_right:
        text = f"write {tag!r} into latest: trainer_state.json is of that step, and its shards are there"
        yield Repair(Kind.WRITE_LATEST, one.path, text, tag)
    empty = list_empty_weights(one.path) if has_shards and Fault.WEIGHTS_EMPTY in one.faults else []
    if empty:
        text = f"set {', '.join(empty)} aside: a resume reads the shards, and nothing else can use placeholders"
        yield Repair(Kind.SET_WEIGHTS_ASIDE, one.path, text)
    name = layout.checkpoint_name(step) if step is not None else one.path.name
    is_misnamed = Fault.STEP_MISMATCH in one.faults and one.path.name != name and (has_shards or one.is_ours)
    if is_misnamed and name not in taken:
        taken.add(name)
        yield Repair(Kind.RENAME, one.path, f"rename it to {name}: everything in it is of that step", name)


def _plan_manifest(one: Examined) -> Iterator[Repair]:
    if one.is_ours:
        return
    if one.facts.zero_stage is None or one.facts.world_size is None:
        yield Repair(
            Kind.LEAVE, one.path, "it has no DeepSpeed state, which our trainer resumes from; it stays as it is"
        )
        return
    yield Repair(Kind.WRITE_MANIFEST, one.path, f"write {layout.MANIFEST}, so that our trainer resumes from it")


def carry_out(root: pathlib.Path, repairs: list[Repair]) -> list[str]:
    """Do what was planned, and return what was refused on a second look."""
    refused: list[str] = []
    moved: dict[pathlib.Path, pathlib.Path] = {}
    for repair in repairs:
        path = moved.get(repair.path, repair.path)
        if repair.kind is Kind.QUARANTINE:
            move_to_quarantine(root, layout.Folder(layout.parse_step(path.name) or 0, path))
        elif repair.kind is Kind.SET_WEIGHTS_ASIDE:
            _set_weights_aside(root, path)
        elif repair.kind is Kind.WRITE_LATEST:
            _write_latest(path, repair.target)
        elif repair.kind is Kind.RENAME:
            moved[repair.path] = path.rename(path.with_name(repair.target))
        elif repair.kind is Kind.WRITE_MANIFEST:
            refused += _adopt(root, path)
    return refused


def _write_latest(path: pathlib.Path, tag: str) -> None:
    """Replace `latest` by a rename, so that no reader finds half of it."""
    beside = path / f".{LATEST}.new"
    with beside.open("w", encoding="utf-8") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path / LATEST)
    sync_folder(path)


def _set_weights_aside(root: pathlib.Path, path: pathlib.Path) -> None:
    target = layout.next_quarantine_path(root, layout.parse_step(path.name) or 0)
    target.mkdir(parents=True)
    for name in list_empty_weights(path):
        (path / name).rename(target / name)


def _adopt(root: pathlib.Path, path: pathlib.Path) -> list[str]:
    """Write the manifest of a checkpoint that verifies with every byte read."""
    one = examine_checkpoint(path, is_ours=False, full=True)
    if not one.is_complete or one.step is None or one.facts.zero_stage is None or one.facts.world_size is None:
        problem = one.findings[0].text if one.findings else "its number of ranks is unknown"
        return [f"{path.name}: got no manifest: {problem}"]
    strange = list_strange_imports(path)
    if strange:
        return [f"{path.name}: got no manifest: loading it would run {', '.join(strange[:3])}, which no trainer writes"]
    files = seal_files(path, list_files(path))
    manifest = Manifest(
        step=one.step,
        world_size=one.facts.world_size,
        zero_stage=one.facts.zero_stage,
        dtype=one.facts.dtype or "fp32",
        attempt=read_newest_attempt(root / Workspace().attempt_file.name),
        created_at=now_text(),
        files=files,
        metrics=one.facts.metrics,
        weights=_read_weights(path),
        random_states=sorted(name for name in files if name.startswith("rng_state")),
        extra={ADOPTED: True},
    )
    write_manifest(path, manifest)
    return []


def _read_weights(path: pathlib.Path) -> dict[str, Weight]:
    """Return what the gathered weights tell of the model; without them it cannot be promoted before the next save."""
    weights = {}
    for file in sorted(path.glob("model*.safetensors")):
        with file.open("rb") as stream:
            header = parse_header(stream.read(parse_length(stream.read(LENGTH_BYTES))))
        for name, shape in header.shapes.items():
            dtype = header.dtypes[name]
            weights[name] = Weight(shape, _DTYPES.get(dtype, dtype.lower()))
    return weights
