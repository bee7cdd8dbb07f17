"""DeepSpeed's part of a checkpoint folder: `latest`, the folder `global_stepN` it names, and the shards of the ranks.

How many ranks there were is written in three places: the file names, the states inside the files, and the Trainer's
random states beside them. They must agree.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from finetune_trainer.checkpoints import containers
from finetune_trainer.checkpoints.containers import DamagedFileError
from finetune_trainer.checkpoints.findings import Fault, Finding
from finetune_trainer.checkpoints.pickles import list_tensors

LATEST = "latest"
_TAG = re.compile(r"global_step(\d+)")
_SHARD = re.compile(r"(?:(bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_RANDOM = re.compile(r"rng_state_(\d+)\.pth")


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What was found; without DeepSpeed everything is empty."""

    is_deepspeed: bool = False
    tag: str = ""
    """Name of the folder with the shards: the one that `latest` names, or the only one there is."""
    tags: tuple[str, ...] = ()
    """Every folder of shards that is there."""
    state_step: int | None = None
    """Step that the shards give."""
    world_size: int | None = None
    zero_stage: int | None = None
    dtype: str = ""
    has_own_scheduler: bool = False
    """Whether DeepSpeed keeps the schedule; the Trainer then writes no scheduler.pt."""
    findings: tuple[Finding, ...] = ()

    @property
    def tag_step(self) -> int | None:
        """Step that the folder's name gives."""
        match = _TAG.fullmatch(self.tag)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class _Names:
    """The shards by data-parallel and model-parallel rank."""

    optimizer: frozenset[tuple[int, int]]
    model: frozenset[tuple[int, int]]
    """Under ZeRO-3 one for each rank, else (0, rank) for each model-parallel rank."""
    is_partitioned: bool
    """Whether the weights are partitioned: ZeRO-3."""
    dtype: str


@dataclasses.dataclass(frozen=True)
class _States:
    """What the states inside the shards tell; None where none tells it."""

    step: int | None = None
    data_ranks: int | None = None
    zero_stage: int | None = None
    has_own_scheduler: bool = False
    findings: tuple[Finding, ...] = ()


def examine_shards(folder: pathlib.Path, sizes: Mapping[str, int], full: bool) -> ShardReport:
    """Examine the shards of a folder whose files are listed in `sizes`; with `full` the state of each rank."""
    tags = tuple(sorted({name.split("/")[0] for name in sizes if _TAG.fullmatch(name.split("/")[0])}))
    tags += tuple(sorted(entry.name for entry in folder.glob("global_step*") if _is_empty_tag(entry, tags)))
    if not tags and LATEST not in sizes and "zero_to_fp32.py" not in sizes:
        return ShardReport()
    tag, findings = _read_tag(folder, sizes, tags)
    if not tags:
        findings.append(Finding(Fault.SHARDS_MISSING, "no folder global_stepN: the weights and the optimizer are gone"))
        return ShardReport(is_deepspeed=True, findings=tuple(findings))
    names = _read_names([name.split("/")[1] for name in sizes if name.startswith(f"{tag}/")])
    states = _read_states(folder / tag, names, full)
    random_ranks = [int(match[1]) for name in sizes if (match := _RANDOM.fullmatch(name))]
    data_ranks, model_ranks = _count_ranks(names, states, max(random_ranks, default=-1) + 1)
    if tag:
        findings += _find_missing(tag, names, data_ranks, model_ranks)
    return ShardReport(
        is_deepspeed=True,
        tag=tag,
        tags=tags,
        state_step=states.step,
        world_size=data_ranks * model_ranks or None,
        zero_stage=3 if names.is_partitioned else states.zero_stage,
        dtype=names.dtype,
        has_own_scheduler=states.has_own_scheduler,
        findings=(*findings, *states.findings),
    )


def _is_empty_tag(entry: pathlib.Path, known: tuple[str, ...]) -> bool:
    return entry.is_dir() and bool(_TAG.fullmatch(entry.name)) and entry.name not in known


def _read_tag(folder: pathlib.Path, sizes: Mapping[str, int], tags: tuple[str, ...]) -> tuple[str, list[Finding]]:
    """Return the folder of shards that a resume loads, or would if `latest` were right; "" where none stands out."""
    only = tags[0] if len(tags) == 1 else ""
    there = f"there: {', '.join(tags)}" if tags else "there is none"
    if LATEST not in sizes:
        text = f"latest is missing: DeepSpeed does not know which folder to load ({there})"
        return only, [Finding(Fault.LATEST_MISSING, text)]
    named = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if named in tags:
        return named, []
    if not named:
        return only, [Finding(Fault.LATEST_MISSING, f"latest: is empty ({there})")]
    return only, [Finding(Fault.LATEST_DANGLING, f"latest names {named[:80]!r}, which is not there ({there})")]


def _read_names(names: list[str]) -> _Names:
    optimizer: set[tuple[int, int]] = set()
    partitioned: set[tuple[int, int]] = set()
    whole: set[tuple[int, int]] = set()
    dtype = ""
    for name in names:
        if match := _SHARD.fullmatch(name):
            dtype = match[1] or dtype
            (optimizer if match[4] == "optim" else partitioned).add((int(match[2]), int(match[3])))
        elif match := _MODEL.fullmatch(name):
            whole.add((0, int(match[1])))
    return _Names(frozenset(optimizer), frozenset(partitioned or whole), bool(partitioned), dtype)


def _count_ranks(names: _Names, states: _States, num_random: int) -> tuple[int, int]:
    """Return how many data-parallel and model-parallel ranks there must have been."""
    every = names.optimizer | names.model
    model_ranks = max((rank for _, rank in every), default=0) + 1
    if states.data_ranks:
        return states.data_ranks, model_ranks
    seen = max((rank for rank, _ in every), default=-1) + 1
    return max(seen, num_random // model_ranks), model_ranks


def _find_missing(tag: str, names: _Names, data_ranks: int, model_ranks: int) -> Iterator[Finding]:
    everyone = {(data, model) for data in range(data_ranks) for model in range(model_ranks)}
    wanted = {
        "optimizer": everyone,
        "model": everyone if names.is_partitioned else {(0, m) for m in range(model_ranks)},
    }
    if not names.optimizer and not names.is_partitioned and names.model:
        wanted["optimizer"] = set()  # without ZeRO the optimizer is in the model's file
    for kind, there in (("optimizer", names.optimizer), ("model", names.model)):
        missing, surplus = sorted(wanted[kind] - there), sorted(there - wanted[kind])
        if missing:
            number = f"{len(missing)} of {len(wanted[kind])}"
            ranks = ", ".join(str(data if model_ranks == 1 else (data, model)) for data, model in missing[:4])
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            yield Finding(Fault.SHARDS_MISSING, f"{tag}: {number} {kind} shards are missing: rank {ranks}{more}")
        if surplus:
            text = f"{tag}: {len(there)} {kind} shards, but the state inside is of {len(wanted[kind])} ranks"
            yield Finding(Fault.SHARDS_MISSING, text)


def _read_states(folder: pathlib.Path, names: _Names, full: bool) -> _States:
    """Read the states inside: of the first rank, or of every rank; their storages must have the size they claim."""
    optimizer, model = (_list_files(folder, kind) for kind in ("optim", "model"))
    if not full:
        optimizer, model = optimizer[:1], model[:1]
    merged, findings = _States(), []
    for path in (*model, *optimizer):
        try:
            content, sizes = containers.read_torch_pickle(path)
        except (DamagedFileError, OSError):
            continue  # told where files are looked at one by one
        name = f"{folder.name}/{path.name}"
        findings += _examine_storages(name, content, sizes)
        if not names.is_partitioned and path in model:
            findings += _find_empty_weights(name, content)
        state = _read_state(content)
        if state.step is not None and merged.step is not None and state.step != merged.step:
            text = f"{name} is of step {state.step}, other shards are of step {merged.step}"
            findings.append(Finding(Fault.STEP_MISMATCH, text))
        merged = _merge(merged, state)
    return dataclasses.replace(merged, findings=tuple(findings))


def _list_files(folder: pathlib.Path, kind: str) -> list[pathlib.Path]:
    return sorted(path for path in folder.glob(f"*_{kind}_states.pt") if path.stat().st_size)


def _merge(first: _States, second: _States) -> _States:
    return _States(
        step=second.step if first.step is None else first.step,
        data_ranks=first.data_ranks or second.data_ranks,
        zero_stage=second.zero_stage if first.zero_stage is None else first.zero_stage,
        has_own_scheduler=first.has_own_scheduler or second.has_own_scheduler,
    )


def _read_state(content: Any) -> _States:
    """Read one shard's state; what it does not hold is None."""
    if not isinstance(content, dict):
        return _States()
    optimizer = content.get("optimizer_state_dict")
    optimizer = optimizer if isinstance(optimizer, dict) else {}
    partitions = optimizer.get("partition_count")
    partitions = max(partitions, default=None) if isinstance(partitions, list | tuple) else partitions
    config = content.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    scheduler = content.get("lr_scheduler")
    return _States(
        step=_as_number(content.get("global_steps")),
        data_ranks=_as_number(content.get("dp_world_size")) or _as_number(partitions),
        zero_stage=_as_number(zero.get("stage")) if isinstance(zero, dict) else None,
        has_own_scheduler=isinstance(scheduler, dict) and "last_batch_iteration" in scheduler,
    )


def _as_number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _examine_storages(name: str, content: Any, sizes: Mapping[str, int]) -> list[Finding]:
    wrong = {one.record for _, one in list_tensors(content) if sizes.get(one.record, -1) != one.num_bytes}
    if not wrong:
        return []
    text = f"{name}: {len(wrong)} of its {len(sizes)} tensors do not have the size that it gives them"
    return [Finding(Fault.FILE_DAMAGED, text)]


def _find_empty_weights(name: str, content: Any) -> list[Finding]:
    """Find placeholders where the whole weights should be; under ZeRO-3 they belong there."""
    weights = list_tensors(content.get("module")) if isinstance(content, dict) else []
    empty = [tensor for tensor, one in weights if 0 in one.shape]
    if not empty:
        return []
    text = f"{name}: {len(empty)} of {len(weights)} weights have shape (0,), such as {empty[0]}"
    return [Finding(Fault.WEIGHTS_EMPTY, text)]
