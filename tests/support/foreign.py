"""Checkpoint folders in the layout of Trainer and DeepSpeed, written byte by byte: no torch, no pickle of ours inside.

The torch files are zip files with a `data.pkl` of the opcodes that torch writes, one storage per tensor.
"""

from __future__ import annotations

import json
import pathlib
import struct
import zipfile
from typing import Any

from tests.support.model_bytes import build_safetensors

SHAPES = {"embed.weight": (16, 8), "head.weight": (16, 8)}
NUM_PARAMETERS = 256


class Shape(tuple):
    """Stands for a bf16 tensor of that shape in what `write_torch_file` writes."""

    __slots__ = ()


def write_foreign(
    root: pathlib.Path,
    step: int,
    *,
    ranks: int = 2,
    zero_stage: int = 3,
    name: str = "",
    history: list[dict[str, Any]] | None = None,
    best: int | None = None,
) -> pathlib.Path:
    """Write a whole checkpoint as the stock Trainer with DeepSpeed does, and return its folder."""
    folder = root / (name or f"checkpoint-{step}")
    shards = folder / f"global_step{step}"
    shards.mkdir(parents=True)
    for rank in range(ranks):
        write_torch_file(shards / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", build_optimizer(rank, ranks))
        if zero_stage == 3:
            model = build_model_state(step, ranks, zero_stage, dict.fromkeys(SHAPES, (0,)))
            write_torch_file(shards / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", model)
    if zero_stage < 3:
        write_torch_file(shards / "mp_rank_00_model_states.pt", build_model_state(step, ranks, zero_stage, SHAPES))
    (folder / "latest").write_text(shards.name)
    write_companions(folder, step, ranks, history, best)
    return folder


def write_plain(root: pathlib.Path, step: int) -> pathlib.Path:
    """Write a whole checkpoint as the Trainer without DeepSpeed does."""
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    write_torch_file(folder / "optimizer.pt", {"state": {"exp_avg": Shape((16, 8))}})
    write_companions(folder, step, 1, None, None)
    return folder


def write_companions(
    folder: pathlib.Path, step: int, ranks: int, history: list[dict[str, Any]] | None, best: int | None
) -> None:
    """Write what the Trainer lays beside the state of the optimizer."""
    (folder / "model.safetensors").write_bytes(build_safetensors(SHAPES))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for rank in range(ranks):
        write_torch_file(folder / (f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth"), {"cpu": Shape((4,))})
    write_torch_file(folder / "scheduler.pt", {"last_epoch": step, "base_lrs": [0.001]})
    write_torch_file(folder / "training_args.bin", {"output_dir": str(folder.parent)})
    state = {
        "global_step": step,
        "epoch": 1.0,
        "log_history": history or [{"step": step, "loss": 1.0}],
        "best_global_step": best,
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))


def build_model_state(step: int, ranks: int, zero_stage: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the state in a `*_model_states.pt`."""
    return {
        "module": {name: Shape(shape) for name, shape in shapes.items()},
        "lr_scheduler": {"last_epoch": step},
        "global_steps": step,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": zero_stage}},
    }


def build_optimizer(rank: int, ranks: int) -> dict[str, Any]:
    """Return the state in one rank's `*_optim_states.pt`."""
    flat = Shape((NUM_PARAMETERS // ranks,))
    state = {"partition_count": ranks, "fp32_flat_groups": [flat], "optimizer_state_dict": {"exp_avg": flat}}
    return {"optimizer_state_dict": state, "ds_config": {"zero_optimization": {"stage": 3}}}


def write_torch_file(path: pathlib.Path, content: Any, *, pickled: bytes | None = None) -> None:
    """Write `content` as `torch.save` does; `pickled` replaces what would be in its data.pkl."""
    storages: list[int] = []
    pickle = b"\x80\x02" + _pickle(content, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", pickle if pickled is None else pickled)
        for number, size in enumerate(storages):
            archive.writestr(f"{path.stem}/data/{number}", bytes([number % 251 + 1]) * size)
        archive.writestr(f"{path.stem}/version", "3\n")


def _pickle(value: Any, storages: list[int]) -> bytes:
    match value:
        case Shape():
            return _pickle_tensor(value, storages)
        case dict():
            items = b"".join(_pickle(key, storages) + _pickle(item, storages) for key, item in value.items())
            return b"}(" + items + b"u"
        case list():
            return b"](" + b"".join(_pickle(item, storages) for item in value) + b"e"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case _:
            text = str(value).encode()
            return b"X" + struct.pack("<I", len(text)) + text


def _pickle_tensor(shape: Shape, storages: list[int]) -> bytes:
    count = 1
    for length in shape:
        count *= length
    number = len(storages)
    storages.append(2 * count)
    size = b"(" + b"".join(_pickle(int(length), storages) for length in shape) + b"t"
    words = (_pickle("storage", []), b"ctorch\nBFloat16Storage\n", _pickle(str(number), []), _pickle("cpu", []))
    storage = b"(" + b"".join(words) + _pickle(count, []) + b"tQ"
    arguments = b"(" + storage + _pickle(0, []) + size + size + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
