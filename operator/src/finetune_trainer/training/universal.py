"""Makes a checkpoint loadable by another number of ranks or another ZeRO stage, in DeepSpeed's universal form.

Called by all ranks together, before there is an engine. A checkpoint holds each rank's share of the flattened weights
and Adam moments; here every parameter is put together again, as whole fp32 tensors in files of its own, which DeepSpeed
(`checkpoint.load_universal`) cuts for whoever loads them. The result lies beside the checkpoint, which is only read.

DeepSpeed's own `ds_to_universal` does the same in one process, through a folder of fragments, and for one ZeRO stage;
this reads the shards where they lie, shares the parameters among the ranks, and reads and writes 12 bytes per
parameter once.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_trainer.checkpoints import disk
from finetune_trainer.checkpoints.layout import CONVERSION_MARKER, CONVERTED
from finetune_trainer.checkpoints.manifest import Manifest, sync_folder
from finetune_trainer.checkpoints.retention import delete_conversion
from finetune_trainer.distributed import ControlGroup
from finetune_trainer.reporting import emit, write_json

CARRIED = ("trainer_state.json", "scheduler.pt", "scaler.pt", "rng_state")
"""Files beside the shards that a resuming Trainer reads, by how their names begin."""
MOMENTS = ("exp_avg", "exp_avg_sq")
_NUM_PROGRESS_LINES = 10
_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_")


@dataclasses.dataclass(frozen=True)
class Fragment:
    """What one saved rank holds of one parameter: a range of its flat tensors, by the name of the state."""

    flats: Mapping[str, Any]
    start: int
    count: int

    def read(self, state: str) -> Any:
        """Return the range of one state (fp32, exp_avg or exp_avg_sq), not copied."""
        return self.flats[state].narrow(0, self.start, self.count)


@dataclasses.dataclass(frozen=True)
class Shards:
    """The saved state of all ranks, mapped into memory and read where it is used."""

    shapes: Mapping[str, Any]
    """Shape of each trained parameter."""
    fragments: Mapping[str, list[Fragment]]
    """By parameter, in the order of ranks."""
    model_state: dict[str, Any]
    """What DeepSpeed saved beside the weights."""
    optimizer: dict[str, Any]
    """The settings and counters of the optimizer."""


def convert(checkpoint: pathlib.Path, manifest: Manifest, group: ControlGroup) -> pathlib.Path:
    """Return the folder of the converted checkpoint; one that was made before and is whole is used again.

    Raises TrainerError (StorageFull) where it does not fit.
    """
    folder = checkpoint.parent / CONVERTED / checkpoint.name
    if group.decide(lambda: _prepare_once(folder, manifest)):
        return folder
    target = folder / f"global_step{manifest.step}"
    shards = read_shards(checkpoint / f"global_step{manifest.step}")
    names = sorted(shards.shapes)
    share = names[group.rank :: group.size]
    for index, name in enumerate(share):
        _write_parameter(target / "zero" / name, shards, name)
        if group.rank == 0 and (index + 1) % max(1, len(share) // _NUM_PROGRESS_LINES) == 0:
            emit("checkpoint being converted", checkpoint=checkpoint.name, share=f"{100 * (index + 1) // len(share)} %")
    group.barrier()
    group.decide(lambda: _finish_once(checkpoint, folder, manifest, shards))
    return folder


def _prepare_once(folder: pathlib.Path, manifest: Manifest) -> bool:
    """Return whether a whole conversion of this checkpoint is there; if not, make room for one."""
    if _read_marker(folder) == _identify(manifest):
        emit("checkpoint was converted before", checkpoint=folder.name)
        return True
    root = folder.parent.parent
    delete_conversion(root)
    needed = sum(entry.size for name, entry in manifest.files.items() if name.endswith("optim_states.pt"))
    disk.require_room(root, needed, f"converting {folder.name} for other ranks")
    folder.mkdir(parents=True)
    return False


def _read_marker(folder: pathlib.Path) -> Any:
    try:
        return json.loads((folder / CONVERSION_MARKER).read_text())
    except (OSError, ValueError):
        return None


def _identify(manifest: Manifest) -> dict[str, Any]:
    """Return what tells this checkpoint from another of the same step."""
    return {
        "step": manifest.step,
        "created_at": manifest.created_at,
        "digests": sorted(entry.sha256 for name, entry in manifest.files.items() if name.endswith("states.pt")),
    }


def read_shards(folder: pathlib.Path) -> Shards:
    """Open the shards of a `global_stepN` folder that DeepSpeed wrote, of any ZeRO stage."""
    found = {int(match[1]): path for path in folder.glob("*optim_states.pt") if (match := _RANK.search(path.name))}
    saved = [_load(found[rank])["optimizer_state_dict"] for rank in sorted(found)]
    is_partitioned = int(saved[0].get("zero_stage", 1)) == 3
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if is_partitioned else "mp_rank_00_model_states.pt"
    model_state = _load(folder / name)
    groups = model_state["param_shapes"]
    fragments = _list_partitioned(saved, groups) if is_partitioned else _list_sliced(saved)
    base = saved[0]["optimizer_state_dict" if is_partitioned else "base_optimizer_state"]
    return Shards(
        {name: shape for group in groups for name, shape in group.items()},
        fragments,
        {key: value for key, value in model_state.items() if key != "module"} | {"module": {}},
        _build_optimizer(saved[0], base, model_state["ds_version"]),
    )


def _load(path: pathlib.Path) -> dict[str, Any]:
    import torch

    # DeepSpeed pickles objects of its own beside the tensors; the checkpoint is this job's, its digests verified.
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return loaded


def _list_sliced(saved: Sequence[Mapping[str, Any]]) -> dict[str, list[Fragment]]:
    """List the fragments of ZeRO-1 and 2: a rank holds a range of all parameters laid end to end, and says which."""
    fragments: dict[str, list[Fragment]] = {}
    for optimizer in saved:
        states = optimizer["base_optimizer_state"]["state"]
        for group, addresses in enumerate(optimizer["param_slice_mappings"]):
            flats = {"fp32": optimizer["single_partition_of_fp32_groups"][group]}
            flats |= {moment: states[group][moment] for moment in MOMENTS}
            for name, address in addresses.items():
                fragments.setdefault(name, []).append(Fragment(flats, address.start, address.numel))
    return fragments


def _list_partitioned(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> dict[str, list[Fragment]]:
    """List the fragments of ZeRO-3: a rank holds an equal part of each parameter; the last ones may be padding."""
    fragments: dict[str, list[Fragment]] = {}
    for rank, optimizer in enumerate(saved):
        states = optimizer["optimizer_state_dict"]["state"]
        for group, shapes in enumerate(groups):
            flats = {"fp32": optimizer["fp32_flat_groups"][group]}
            flats |= {moment: states[group][moment] for moment in MOMENTS}
            start = 0
            for name, shape in shapes.items():
                part = math.ceil(shape.numel() / len(saved))
                count = min(part, max(0, shape.numel() - rank * part))
                fragments.setdefault(name, []).append(Fragment(flats, start, count))
                start += part
    return fragments


def _build_optimizer(saved: Mapping[str, Any], base: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Return what all stages read of the optimizer besides its tensors: ZeRO-3 looks for it one level deeper."""
    kept = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
    steps = {index: {"step": state["step"]} for index, state in base["state"].items()}
    groups = base["param_groups"]
    return {
        **{key: saved[key] for key in kept if key in saved},
        "ds_version": version,
        "param_groups": groups,
        "optimizer_state_dict": {"state": steps, "param_groups": groups},
    }


def _write_parameter(folder: pathlib.Path, shards: Shards, name: str) -> None:
    """Write one parameter's weights and moments, whole."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for state in ("fp32", *MOMENTS):
        flat = torch.cat([fragment.read(state) for fragment in shards.fragments[name]])
        _save(folder / f"{state}.pt", {"param": flat.view(shards.shapes[name]), "cat_dim": 0})
    _save(folder / "step.pt", shards.optimizer["optimizer_state_dict"]["state"][0]["step"])
    sync_folder(folder)


def _finish_once(checkpoint: pathlib.Path, folder: pathlib.Path, manifest: Manifest, shards: Shards) -> None:
    """Write what is there once, then the marker."""
    target = folder / f"global_step{manifest.step}"
    _save(target / "zero" / "optimizer_state.pt", shards.optimizer)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(target / name, shards.model_state)
    for name in _select_carried(manifest.files):
        shutil.copyfile(checkpoint / name, folder / name)
    (folder / "latest_universal").write_text(target.name)
    for each in (target / "zero", target, folder):
        sync_folder(each)
    write_json(folder / CONVERSION_MARKER, _identify(manifest))
    emit("checkpoint converted", checkpoint=checkpoint.name, saved_by=manifest.world_size)


def _select_carried(names: Iterable[str]) -> list[str]:
    return [name for name in names if "/" not in name and name.startswith(CARRIED)]


def _save(path: pathlib.Path, value: Any) -> None:
    import torch

    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
