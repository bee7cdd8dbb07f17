"""How `finetune-trainer checkpoints` tells what it found: one JSON object, or text for people. Pure."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_trainer.checkpoints import doctor
from finetune_trainer.checkpoints.disk import format_bytes
from finetune_trainer.checkpoints.doctor import Diagnosis
from finetune_trainer.checkpoints.findings import Examined, Fault
from finetune_trainer.checkpoints.repair import Kind

_HEADINGS = ("STEP", "STATE", "SIZE", "RANKS", "ZERO", "JUDGED BY", "FOLDER")
_WORDS = {Fault.SAVE_UNFINISHED: "unfinished", Fault.BEING_DELETED: "half deleted", Fault.EMPTY_FOLDER: "empty"}


def to_camel(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields under the names that JSON has here."""
    return {re.sub("_(.)", lambda match: match[1].upper(), name): value for name, value in fields.items()}


def describe(diagnosis: Diagnosis, status: str) -> dict[str, Any]:
    """Return what was found as JSON."""
    chosen = diagnosis.chosen
    return {
        "status": {"nothing": "none"}.get(status, status),
        "checkpoints": [_describe_one(one) for one in diagnosis.checkpoints],
        "quarantine": [str(folder.path) for folder in diagnosis.quarantined],
        "resumeFrom": str(chosen.path) if chosen else None,
        "resumeCommand": doctor.build_command(diagnosis),
        "why": doctor.explain_choice(diagnosis),
        "passedOver": [str(one.path) for one in diagnosis.passed_over],
    }


def _describe_one(one: Examined) -> dict[str, Any]:
    facts = one.facts
    return {
        "path": str(one.path),
        "step": one.step,
        "complete": one.is_complete,
        "problems": [finding.text for finding in one.findings],
        "faults": [finding.fault for finding in one.findings],
        "notes": list(facts.notes),
        "hasManifest": one.is_ours,
        "bytes": facts.num_bytes,
        "worldSize": facts.world_size,
        "zeroStage": facts.zero_stage,
        "attempt": facts.attempt,
        "createdAt": facts.created_at or None,
        "metrics": dict(facts.metrics),
    }


def build_text(diagnosis: Diagnosis, action: str, answer: Mapping[str, Any], root: pathlib.Path) -> str:
    """Return the same for people."""
    builders = {"plan": _build_plan, "prune": _build_prune, "repair": _build_repair}
    lines = [*_build_table(diagnosis), *_build_choice(diagnosis, root)]
    if action in builders:
        lines += ["", *builders[action](answer)]
    elif any(not one.is_complete for one in diagnosis.checkpoints):
        lines.append(
            f"Mend        finetune-trainer checkpoints repair {root}    (says what it would do; --yes does it)"
        )
    return "\n".join(lines)


def _build_table(diagnosis: Diagnosis) -> Iterator[str]:
    if not diagnosis.checkpoints:
        yield f"{diagnosis.root} holds no folder named checkpoint-N."
        nested = ", ".join(str(folder) for folder in doctor.list_nested(diagnosis.root)[:3])
        if nested:
            yield f"There are some in {nested}."
        return
    rows = [_HEADINGS, *(_build_row(one) for one in diagnosis.checkpoints)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    yield _align(rows[0], widths)
    for one, row in zip(diagnosis.checkpoints, rows[1:], strict=True):
        yield _align(row, widths)
        for finding in one.findings:
            yield f"{'':>{widths[0]}}  - {finding.text}"
        for note in one.facts.notes:
            yield f"{'':>{widths[0]}}  (note: {note})"


def _align(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if column in (0, 2, 3, 4) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _build_row(one: Examined) -> tuple[str, ...]:
    facts = one.facts
    return (
        "-" if one.step is None else str(one.step),
        "complete" if one.is_complete else _WORDS.get(one.findings[0].fault, "DAMAGED"),
        format_bytes(facts.num_bytes),
        str(facts.world_size or "-"),
        "-" if facts.zero_stage is None else str(facts.zero_stage),
        "manifest" if one.is_ours else "its files",
        one.path.name,
    )


def _build_choice(diagnosis: Diagnosis, root: pathlib.Path) -> Iterator[str]:
    if diagnosis.quarantined:
        yield f"In quarantine: {', '.join(folder.path.name for folder in diagnosis.quarantined)}"
    yield ""
    chosen, command = diagnosis.chosen, doctor.build_command(diagnosis)
    yield f"Resume from {chosen.path if chosen else 'nothing: training would begin anew'}"
    yield f"Why         {doctor.explain_choice(diagnosis)}"
    if diagnosis.passed_over:
        names = [one.path.name for one in diagnosis.passed_over]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"Not         {', '.join(names[:4])}{more}: what is wrong with each stands above"
    if chosen is not None:
        yield f"Type        {command or 'nothing: the next start of finetune-trainer train resumes from it by itself'}"


def _build_plan(answer: Mapping[str, Any]) -> Iterator[str]:
    ours, stock = answer["need"]["ours"], answer["need"]["stock"]
    parameters = answer["parameters"]
    if not ours["checkpointBytes"]:
        yield "Need        unknown: name the model with --model DIR or --parameters N"
    elif parameters is None:
        yield f"Need        {format_bytes(ours['checkpointBytes'])} a checkpoint, as large as the newest"
    else:
        yield f"Need        for {parameters:,} parameters under ZeRO-{answer['zeroStage']}:"
        yield f"              finetune-trainer  {_say_need(ours, answer['keep'])}"
        yield f"              stock Trainer     {_say_need(stock, answer['keep'])}"
    if parameters is None and ours["checkpointBytes"]:
        yield f"            {format_bytes(ours['peakBytes'])} at the fullest, {answer['keep'] + 1} checkpoints"
    fits = "" if answer["fits"] is None else f": room for {answer['fits']} more" if answer["fits"] else ": none fits"
    yield f"Free        {format_bytes(answer['freeBytes'])}{fits}"
    if not answer["hasRoom"]:
        yield "            NOT ENOUGH: keep fewer with --keep-latest, or make the disk larger"
    steps = ", ".join(map(str, answer["wouldDelete"])) or "none"
    yield f"Retention   keeps {answer['keep']}, would delete: {steps}"


def _say_need(need: Mapping[str, Any], keep: int) -> str:
    one, peak = format_bytes(need["checkpointBytes"]), format_bytes(need["peakBytes"])
    return f"{one} a checkpoint, {peak} at the fullest ({keep} kept and one in the making)"


def _build_prune(answer: Mapping[str, Any]) -> Iterator[str]:
    is_done = "deleted" in answer
    names = answer["deleted"] if is_done else answer["wouldDelete"]
    if not names:
        yield "Nothing to delete." if not is_done else "Nothing was deleted."
    for name in names:
        yield f"{'Deleted' if is_done else 'Would delete'} {name}"
    for name in answer["failed"]:
        yield f"COULD NOT DELETE {name}; the next prune finishes it"
    if names:
        verb = "freed" if is_done else "would be freed; nothing was changed, --yes deletes"
        yield f"{format_bytes(answer['freedBytes'])} {verb}"


def _build_repair(answer: Mapping[str, Any]) -> Iterator[str]:
    if not answer["repairs"]:
        yield "Nothing to mend."
    for one in answer["repairs"]:
        is_left = one["kind"] == Kind.LEAVE
        word = "Left alone" if is_left else "Done" if answer["done"] else "Would do"
        yield f"{word}: {pathlib.PurePath(one['path']).name}: {_say_kind(one)}"
    for text in answer["refused"]:
        yield f"REFUSED: {text}"
    if not answer["done"] and any(one["kind"] != Kind.LEAVE for one in answer["repairs"]):
        yield "Nothing was changed; --yes does it."


def _say_kind(one: Mapping[str, Any]) -> str:
    return f"move it to quarantine/: {one['what']}" if one["kind"] == Kind.QUARANTINE else str(one["what"])
