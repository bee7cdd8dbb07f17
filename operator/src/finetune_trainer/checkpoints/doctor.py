"""The checkpoint doctor: examines every checkpoint of a folder, ours or not, and says which to resume from and why.

Called by `finetune-trainer checkpoints`. Reads only; `repair` and `retention` change things. A folder counts as ours
once our trainer has claimed it or committed into it: there a checkpoint without a manifest is a save that did not
finish, whatever its files look like. Elsewhere a checkpoint is judged by its files.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import layout, manifest
from finetune_trainer.checkpoints.findings import Examined, Facts, Fault, Finding
from finetune_trainer.checkpoints.foreign import STATE, examine_foreign, list_companions
from finetune_trainer.errors import TrainerError

ADOPTED = "adopted"
"""In a manifest's extra facts: written by `repair` for a checkpoint that another trainer wrote."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Everything found in one folder."""

    root: pathlib.Path
    """Where the checkpoints lie; the folder above, where one checkpoint alone was named."""
    is_ours: bool
    checkpoints: tuple[Examined, ...]
    """Oldest step first."""
    quarantined: tuple[layout.Folder, ...]
    is_full: bool
    """Whether every byte was read."""

    @property
    def chosen(self) -> Examined | None:
        """The newest complete checkpoint."""
        complete = [one for one in self.checkpoints if one.is_complete]
        return complete[-1] if complete else None

    @property
    def passed_over(self) -> list[Examined]:
        """The checkpoints that are newer than the chosen one, newest first."""
        newest = list(reversed(self.checkpoints))
        return newest[: newest.index(self.chosen)] if self.chosen else newest

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged or unfinished."""
        return all(one.is_complete for one in self.checkpoints)


def find_root(folder: pathlib.Path) -> pathlib.Path:
    """Return the folder to examine: the one given, or that of the workspace given. Raises TrainerError."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise _bad_folder(f"{folder}: {what}", "Name the folder that holds checkpoint-N folders, or one of these.")
    inside = Workspace(folder).checkpoints
    return inside if inside.is_dir() and not layout.list_folders(folder) and not is_checkpoint(folder) else folder


def _bad_folder(message: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.NO_INPUT, message, hint)


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder is itself a checkpoint, whatever its name."""
    marks = (layout.MANIFEST, STATE, "latest")
    is_named = layout.parse_step(folder.name) is not None
    return is_named or any((folder / mark).exists() for mark in marks) or any(folder.glob("global_step*"))


def examine_folder(root: pathlib.Path, full: bool = False) -> Diagnosis:
    """Examine every checkpoint below `root`, or `root` where it is itself one; with `full` every byte of them."""
    folders = layout.list_folders(root)
    if not folders and is_checkpoint(root):
        paths, home = [root.resolve()], root.resolve().parent
    else:
        paths, home = [folder.path for folder in folders], root
    is_ours = is_claimed(home)
    examined = [examine_checkpoint(path, is_ours, full) for path in paths]
    examined.sort(key=lambda one: (-1 if one.step is None else one.step, one.path.name))
    return Diagnosis(home, is_ours, tuple(examined), tuple(layout.list_quarantined(home)), full)


def confirm_newest(diagnosis: Diagnosis) -> Diagnosis:
    """Return the diagnosis with every byte of the newest complete checkpoint read: what is deleted relies on it."""
    while diagnosis.chosen is not None:
        chosen = diagnosis.chosen
        confirmed = examine_checkpoint(chosen.path, diagnosis.is_ours, full=True)
        checkpoints = tuple(confirmed if one is chosen else one for one in diagnosis.checkpoints)
        diagnosis = dataclasses.replace(diagnosis, checkpoints=checkpoints)
        if confirmed.is_complete:
            break
    return diagnosis


def is_claimed(root: pathlib.Path) -> bool:
    """Whether our trainer has worked in a folder: a manifest-less checkpoint there is a save that did not finish."""
    if (root / Workspace().attempt_file.name).exists():
        return True
    for folder in (*layout.list_folders(root), *layout.list_quarantined(root)):
        if not (folder.path / layout.MANIFEST).exists():
            continue
        try:
            if not manifest.read_manifest(folder.path).extra.get(ADOPTED):
                return True
        except manifest.ManifestError:
            return True
    return False


def examine_checkpoint(path: pathlib.Path, is_ours: bool, full: bool) -> Examined:
    """Examine one checkpoint folder."""
    step = layout.parse_step(path.name)
    if layout.is_being_deleted(path):
        finding = Finding(Fault.BEING_DELETED, "its deletion was cut short; the next deletion finishes it")
        return Examined(path, step, True, (finding,), Facts(num_bytes=_count_bytes(path)))
    has_manifest = (path / layout.MANIFEST).exists()
    if has_manifest or is_ours:
        findings, facts = _examine_ours(path, step, full)
    else:
        siblings = [folder.path for folder in layout.list_folders(path.parent) if folder.path != path]
        usual = set().union(*map(list_companions, siblings))
        findings, facts = examine_foreign(path, full, usual)
    return Examined(path, facts.state_step if step is None else step, has_manifest or is_ours, findings, facts)


def _examine_ours(path: pathlib.Path, step: int | None, full: bool) -> tuple[tuple[Finding, ...], Facts]:
    if not any(path.iterdir()):
        return (Finding(Fault.EMPTY_FOLDER, "the folder is empty"),), Facts()
    try:
        found = manifest.read_manifest(path)
    except manifest.ManifestError as error:
        is_there = (path / layout.MANIFEST).exists()
        fault = Fault.MANIFEST_DAMAGED if is_there else Fault.SAVE_UNFINISHED
        return (Finding(fault, str(error)),), Facts(num_bytes=_count_bytes(path))
    facts = Facts(
        num_bytes=found.num_bytes,
        state_step=found.step,
        world_size=found.world_size,
        zero_stage=found.zero_stage,
        dtype=found.dtype,
        created_at=found.created_at,
        attempt=found.attempt,
        metrics=found.metrics,
    )
    problems = manifest.verify_checkpoint(path, full)
    faults = [Fault.STEP_MISMATCH] * (found.step != step) + [Fault.FILE_DAMAGED] * len(problems)
    pairs = zip(faults, problems, strict=False)
    return tuple(Finding(_name_fault(fault, text), text) for fault, text in pairs), facts


def _name_fault(fault: Fault, text: str) -> Fault:
    return Fault.FILE_MISSING if fault is Fault.FILE_DAMAGED and text.endswith(": is missing") else fault


def _count_bytes(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def explain_choice(diagnosis: Diagnosis) -> str:
    """Say why this checkpoint is the one to resume from, or why none is."""
    if diagnosis.chosen is None:
        return "no checkpoint is whole" if diagnosis.checkpoints else "there is no checkpoint"
    how = "every byte was read" if diagnosis.is_full else "sizes and headers were checked; `verify` reads every byte"
    return f"it is the newest {'that is whole' if diagnosis.passed_over else 'and whole'} ({how})"


def build_command(diagnosis: Diagnosis) -> str:
    """Return what to type to resume from the chosen checkpoint; "" where there is none, or nothing to type."""
    chosen = diagnosis.chosen
    if chosen is None or diagnosis.is_ours or chosen.is_ours:
        return ""
    return f"--resume_from_checkpoint {chosen.path}"


def list_nested(root: pathlib.Path) -> Sequence[pathlib.Path]:
    """List folders one level below that hold checkpoints, for the hint where `root` itself holds none."""
    return [entry for entry in sorted(root.iterdir()) if entry.is_dir() and layout.list_folders(entry)]
