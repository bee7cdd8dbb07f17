"""Whether a checkpoint folder that has no manifest of ours is whole: the layout of Trainer, alone or with DeepSpeed.

The stock Trainer writes straight into `checkpoint-N`, marks nothing as finished, and on resume takes the highest N. So
everything is told from the files: names, sizes, tables of contents, headers. Two levels: quick reads names, sizes and
headers; full reads every byte and compares the checksums that torch's files carry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune_trainer.checkpoints import containers, shards
from finetune_trainer.checkpoints.containers import DamagedFileError
from finetune_trainer.checkpoints.findings import Facts, Fault, Finding
from finetune_trainer.checkpoints.layout import parse_step
from finetune_trainer.checkpoints.pickles import list_tensors

STATE = "trainer_state.json"
SENTINEL = "checkpoint-is-incomplete.txt"
"""Transformers lays it into a folder while it saves on SIGTERM, and never looks for it again."""
SCHEDULER = "scheduler.pt"
RANDOM = "rng_state"
_THREADS = 8
_TORCH_FILE = re.compile(r".+\.(?:pt|pth)|(?:training_args|optimizer|scheduler|adapter_model|pytorch_model[^/]*)\.bin")
_WEIGHTS = re.compile(r"(?:model|adapter_model|pytorch_model)[^/]*\.(?:safetensors|bin)")
_PART = re.compile(r"((?:model|pytorch_model))-(\d+)-of-(\d+)\.(safetensors|bin)")
_RANDOM_STATE = re.compile(r"rng_state(?:_(\d+))?\.pth")
_FAMILIAR = re.compile(
    r"torch (?:\w+Storage|Size|Tensor|device|dtype|b?float\d+|int\d+|bool)|torch\._utils _rebuild_\w+"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.nn\.parameter Parameter|torch\.serialization _get_layout"
    r"|deepspeed\.(?:runtime\.zero\.config|runtime\.fp16\.loss_scaler|utils\.tensor_fragment) \w+"
    r"|numpy (?:dtype|ndarray)|numpy\.(?:_core|core)\.multiarray (?:_reconstruct|scalar)"
    r"|collections (?:OrderedDict|defaultdict|deque)|_codecs encode"
    r"|(?:builtins|__builtin__) (?:set|dict|list|int|float)"
)
"""Imports in the pickles that torch, DeepSpeed and the Trainer write."""
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_0")
"""Of the Trainer alone, and of FSDP with a full and with a sharded state."""


@dataclasses.dataclass(frozen=True)
class _Contents:
    """A folder's files, listed once."""

    path: pathlib.Path
    sizes: dict[str, int]
    """By path relative to the folder."""

    def has(self, name: str) -> bool:
        return name in self.sizes or (self.path / name).is_dir()


def examine_foreign(
    path: pathlib.Path, full: bool = False, usual: Collection[str] = ()
) -> tuple[tuple[Finding, ...], Facts]:
    """Return what is wrong with a folder, and what could be read of it.

    `usual` names the companions that other checkpoints of the run have: without one of them a save was cut short.
    """
    contents = _Contents(path, {name: (path / name).stat().st_size for name in list_names(path)})
    if not contents.sizes:
        return (Finding(Fault.EMPTY_FOLDER, "the folder is empty"),), Facts()
    state, findings = _read_state(contents)
    found = shards.examine_shards(path, contents.sizes, full)
    findings += found.findings
    if found.is_deepspeed:
        findings += _examine_step(path, state, found)
    elif not any(contents.has(name) for name in _OPTIMIZERS):
        text = "no optimizer state: these are weights only (save_only_model), training cannot be resumed from them"
        findings.append(Finding(Fault.OPTIMIZER_MISSING, text))
    notes = list(_list_missing_companions(contents, found))
    findings += [Finding(Fault.FILE_MISSING, note) for note in notes if note.split()[0] in usual]
    findings += _examine_random(contents, found.world_size)
    if SENTINEL in contents.sizes:
        findings.append(Finding(Fault.SAVE_UNFINISHED, f"{SENTINEL} is there: the save on SIGTERM did not finish"))
    findings += _examine_weights(contents, found.is_deepspeed)
    findings += _examine_files(contents, full)
    facts = _collect_facts(contents, state, found)
    notes = [note for note in notes if note.split()[0] not in usual]
    return tuple(_sort(findings)), dataclasses.replace(facts, notes=tuple(notes))


def list_companions(path: pathlib.Path) -> set[str]:
    """List the companions that a checkpoint has, by the first word of the note about their absence."""
    found = {SCHEDULER} if (path / SCHEDULER).exists() else set()
    return found | ({RANDOM} if any(path.glob("rng_state*.pth")) else set())


def list_names(path: pathlib.Path) -> list[str]:
    """List the files below a folder as relative paths."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def _sort(findings: Iterable[Finding]) -> list[Finding]:
    """Drop repetitions: an empty file is also a truncated one. What is missing comes first."""
    first: dict[str, Finding] = {}
    order = list(Fault)
    for finding in sorted(findings, key=lambda finding: order.index(finding.fault)):
        first.setdefault(finding.text, finding)
    return list(first.values())


def _read_state(contents: _Contents) -> tuple[dict[str, Any], list[Finding]]:
    if STATE not in contents.sizes:
        return {}, [Finding(Fault.STATE_MISSING, f"{STATE} is missing: the Trainer crashes when it resumes here")]
    if contents.sizes[STATE] == 0:
        return {}, []  # told as an empty file
    try:
        state = containers.read_json_object(contents.path / STATE)
    except DamagedFileError as error:
        return {}, [Finding(Fault.STATE_DAMAGED, f"{STATE}: {error}")]
    step, named = state.get("global_step"), parse_step(contents.path.name)
    if not isinstance(step, int):
        return state, [Finding(Fault.STATE_DAMAGED, f"{STATE}: it names no global_step")]
    if named is not None and step != named:
        text = f"{STATE} is of step {step}, the folder is {contents.path.name}"
        return state, [Finding(Fault.STEP_MISMATCH, text)]
    return state, []


def _examine_step(path: pathlib.Path, state: dict[str, Any], found: shards.ShardReport) -> list[Finding]:
    """Compare the steps of `latest` and of the shards with the checkpoint's."""
    step = state.get("global_step", parse_step(path.name))
    if not isinstance(step, int):
        return []
    findings = []
    if found.tag_step is not None and found.tag_step != step:
        text = f"latest names {found.tag}, the checkpoint is of step {step}"
        findings.append(Finding(Fault.STEP_MISMATCH, text))
    elif found.state_step is not None and found.state_step != step:
        text = f"the shards in {found.tag} are of step {found.state_step}, the checkpoint is of step {step}"
        findings.append(Finding(Fault.STEP_MISMATCH, text))
    return findings


def _list_missing_companions(contents: _Contents, found: shards.ShardReport) -> Iterator[str]:
    """List what the Trainer writes beside the optimizer and is absent."""
    if not found.is_deepspeed and not any(contents.has(name) for name in _OPTIMIZERS):
        return
    if SCHEDULER not in contents.sizes and not found.has_own_scheduler:
        yield f"{SCHEDULER} is missing: the Trainer cannot set the learning rate"
    if not any(_RANDOM_STATE.fullmatch(name) for name in contents.sizes):
        yield f"{RANDOM} files are missing: the order of the data and dropout go on differently"


def _examine_random(contents: _Contents, world_size: int | None) -> Iterator[Finding]:
    """Compare the number of random states, one for each rank, with that of the ranks."""
    found = {int(match[1] or 0) for name in contents.sizes if (match := _RANDOM_STATE.fullmatch(name))}
    missing = [rank for rank in range(max([world_size or 0, *(rank + 1 for rank in found)])) if rank not in found]
    if found and missing:
        number = f"{len(missing)} of {len(missing) + len(found)}"
        names = _shorten([f"rng_state_{rank}.pth" for rank in missing])
        yield Finding(Fault.SHARDS_MISSING, f"{number} random states are missing: {names}")


def _examine_weights(contents: _Contents, is_deepspeed: bool) -> Iterator[Finding]:
    names = [name for name in contents.sizes if _WEIGHTS.fullmatch(name)]
    if not names and not is_deepspeed and not contents.has("pytorch_model_fsdp_0"):
        yield Finding(Fault.WEIGHTS_MISSING, "no weights: neither model.safetensors nor adapter_model.safetensors")
    for name in names:
        shapes = _read_shapes(contents, name)
        empty = [tensor for tensor, shape in shapes.items() if 0 in shape]
        if empty:
            text = f"{name}: {len(empty)} of {len(shapes)} weights have shape (0,), such as {empty[0]}"
            why = "ZeRO-3 placeholders (stage3_gather_16bit_weights_on_model_save)"
            yield Finding(Fault.WEIGHTS_EMPTY, f"{text}: {why}")
    yield from _examine_indexes(contents)


def list_strange_imports(path: pathlib.Path) -> list[str]:
    """List what loading a checkpoint's state would import beyond what trainers write: resuming unpickles it."""
    strange: set[str] = set()
    for file in (*path.glob("global_step*/*.pt"), *path.glob("rng_state*.pth"), *path.glob("scheduler.pt")):
        strange |= {name for name in containers.read_imports(file) if not _FAMILIAR.fullmatch(name)}
    return sorted(strange)


def list_empty_weights(path: pathlib.Path) -> list[str]:
    """List the files of gathered weights that hold placeholders, and the indexes that name them."""
    contents = _Contents(path, {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()})
    names = [name for name in contents.sizes if _WEIGHTS.fullmatch(name)]
    empty = [name for name in names if any(0 in shape for shape in _read_shapes(contents, name).values())]
    return empty + [name for name in contents.sizes if empty and name.endswith(".index.json")]


def _read_shapes(contents: _Contents, name: str) -> dict[str, tuple[int, ...]]:
    path = contents.path / name
    try:
        if name.endswith(".safetensors"):
            return dict(containers.read_safetensors_header(path).shapes)
        described, _ = containers.read_torch_pickle(path)
        return {tensor: one.shape for tensor, one in list_tensors(described)}
    except (DamagedFileError, OSError):
        return {}  # told where files are looked at one by one


def _examine_indexes(contents: _Contents) -> Iterator[Finding]:
    """Compare weights in several files with the index that the loader reads."""
    parts = [match for name in contents.sizes if (match := _PART.fullmatch(name))]
    for base, kind in sorted({(part[1], part[4]) for part in parts}):
        if f"{base}.{kind}.index.json" not in contents.sizes:
            text = f"{base}.{kind}.index.json is missing: the weights are in several files, which it names"
            yield Finding(Fault.FILE_MISSING, text)
    for name, size in contents.sizes.items():
        if not name.endswith((".safetensors.index.json", ".bin.index.json")) or not size:
            continue
        try:
            index = containers.read_json_object(contents.path / name).get("weight_map")
        except DamagedFileError as error:
            yield Finding(Fault.FILE_DAMAGED, f"{name}: {error}")
            continue
        wanted = {str(file) for file in index.values()} if isinstance(index, dict) else set()
        missing = sorted(wanted - set(contents.sizes))
        if missing:
            text = f"{len(missing)} of {len(wanted)} files that {name} names are missing: {_shorten(missing)}"
            yield Finding(Fault.FILE_MISSING, text)


def _examine_files(contents: _Contents, full: bool) -> list[Finding]:
    """Look at every file by itself; with `full` at every byte, several files at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _examine_file(contents, name, full), contents.sizes)
        return [finding for finding in found if finding is not None]


def _examine_file(contents: _Contents, name: str, full: bool) -> Finding | None:
    path = contents.path / name
    is_torch, is_tensors = bool(_TORCH_FILE.fullmatch(name)), name.endswith(".safetensors")
    if contents.sizes[name] == 0:
        # Empty notes and READMEs do no harm.
        is_state = is_torch or is_tensors or name.endswith(".json") or name == shards.LATEST
        return Finding(Fault.FILE_EMPTY, f"{name}: is empty") if is_state else None
    try:
        if is_torch:
            containers.check_torch_file(path, full)
        elif is_tensors:
            containers.read_safetensors_header(path)
        if full and not is_torch:
            containers.read_through(path)
    except DamagedFileError as error:
        return Finding(Fault.FILE_DAMAGED, f"{name}: {error}")
    except OSError as error:
        return Finding(Fault.FILE_DAMAGED, f"{name}: cannot be read: {error.strerror or error}")
    return None


def _collect_facts(contents: _Contents, state: dict[str, Any], found: shards.ShardReport) -> Facts:
    step = state.get("global_step")
    return Facts(
        num_bytes=sum(contents.sizes.values()),
        state_step=step if isinstance(step, int) else None,
        world_size=found.world_size,
        zero_stage=found.zero_stage,
        dtype=found.dtype,
        metrics=_read_metrics(state, step),
        best_step=_read_best(state),
    )


def _read_metrics(state: dict[str, Any], step: Any) -> dict[str, float]:
    """Return what was evaluated at this step."""
    metrics: dict[str, float] = {}
    for entry in state.get("log_history") or ():
        if isinstance(entry, dict) and entry.get("step") == step:
            numbers = {name: value for name, value in entry.items() if name.startswith("eval_")}
            metrics |= {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}
    return metrics


def _read_best(state: dict[str, Any]) -> int | None:
    best = state.get("best_global_step")
    if isinstance(best, int):
        return best
    with contextlib.suppress(TypeError):
        return parse_step(pathlib.PurePath(state.get("best_model_checkpoint") or "").name)
    return None


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
