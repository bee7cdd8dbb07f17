"""The whole 16-bit weights of a model, gathered from the shards of a checkpoint; of a full fine-tune only.

Checkpoints hold each weight once. Below ZeRO-3 the shard of rank 0 has the model's own weights; under ZeRO-3 they are
the fp32 weights of all ranks' optimizers, cast as DeepSpeed casts them after each step, so that both are equal to the
bit. Memory: the 16-bit weights, and one tensor in fp32; the shards are mapped, not read.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any

from finetune_trainer.checkpoints.manifest import Manifest
from finetune_trainer.training import modeling

_MODEL_STATES = "mp_rank_00_model_states.pt"


def load_gathered(checkpoint: pathlib.Path, manifest: Manifest, dtype: str, trust_remote_code: bool) -> Any:
    """Return the model of a checkpoint, with its weights in `dtype` (a torch name).

    Raises ValueError where a tensor of the architecture is missing, or has another shape than was trained.
    """
    model = modeling.build_empty_model(checkpoint, dtype, trust_remote_code)
    shards = _map_shards(checkpoint, manifest.zero_stage)
    expected = model.state_dict()
    for name, weight in manifest.weights.items():
        shape = tuple(shards[name].shape) if name in shards else None
        if shape != weight.shape:
            raise ValueError(f"the shards give {name} the shape {shape}, the model trained had {weight.shape}")
    missing = sorted(expected.keys() - shards.keys())
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, the first is {missing[0]}")
    tensors = {}
    for name, empty in expected.items():
        shard = shards[name]
        if tuple(shard.shape) != tuple(empty.shape):
            raise ValueError(f"tensor {name} has shape {tuple(shard.shape)}, config.json says {tuple(empty.shape)}")
        # A copy for each: below ZeRO-3 all weights are views of one flat tensor.
        tensors[name] = shard.contiguous().to(dtype=empty.dtype, copy=True)
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model


def _map_shards(checkpoint: pathlib.Path, zero_stage: int) -> Mapping[str, Any]:
    """Return the tensors of a model by name; those of ZeRO-3 are put together when `contiguous` is called on them."""
    import torch
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if zero_stage == 3:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            shards: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
        return shards
    tag = (checkpoint / "latest").read_text().strip()
    # The digest of the file has been compared, and it is DeepSpeed's own: it holds more than tensors.
    state = torch.load(checkpoint / tag / _MODEL_STATES, map_location="cpu", mmap=True, weights_only=False)
    return {name: tensor for name, tensor in state["module"].items() if isinstance(tensor, torch.Tensor)}
