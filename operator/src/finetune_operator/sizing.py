"""Arithmetic of sizes: quantities, what a workspace must hold, which ZeRO stage fits, how large a step is.

Pure; used by `plan`, `policies` and `manifests`. Nothing here knows Kubernetes objects.
"""

from __future__ import annotations

import dataclasses
import math
import re

from finetune_contract.checkpoint_sizes import estimate_checkpoint_bytes, estimate_share_bytes, peak_bytes
from finetune_contract.run_config import RunConfig, TrainingConfig

GIB = 1024**3
_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_UNITS |= {f"{letter}i": 1024.0 ** (power + 1) for power, letter in enumerate("KMGTPE")}

LORA_SHARE_PER_RANK = 0.01 / 16
"""Adapters of rank 16 on every linear layer hold about one hundredth of the parameters."""
BYTES_PER_PARAMETER_OUTPUT = 2
BYTES_PER_PARAMETER_QUANTIZED = 0.65
"""Of a base in nf4: 4.13 bits of each weight in a linear layer, and 16 of the others, which are taken to be a tenth."""
BYTES_PER_PARAMETER_STATES = 16
"""Of an optimizer in host memory: fp32 weights, their gradients, and the two moments of Adam."""
GPU_MEMORY_BYTES = 80_000_000_000
"""What a GPU is taken to have where nothing says otherwise: an A100 with 80 GB."""
USABLE_SHARE = 0.6
"""Share of a GPU's memory that may hold weights, gradients and optimizer; activations take the rest."""


def to_number(quantity: str | float) -> float:
    """Return a Kubernetes quantity as a number. Raises ValueError when it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)([a-zA-Z]*)", str(quantity))
    if not found or found.group(2) not in _UNITS:
        raise ValueError(f"not a quantity: {quantity!r}")
    return float(found.group(1)) * _UNITS[found.group(2)]


def to_gibibytes(num_bytes: float) -> str:
    """Return a size rounded up to whole GiB, as a quantity."""
    return f"{max(1, math.ceil(num_bytes / GIB))}Gi"


def to_words(num_bytes: float) -> str:
    """Return a size for a message, with the unit that keeps it short."""
    for unit, size in (("GiB", GIB), ("MiB", 1024**2), ("KiB", 1024)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{int(num_bytes)} bytes"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What will lie on the workspace."""

    model_bytes: int
    dataset_bytes: int
    parameters: int
    checkpoints_kept: int
    zero_stage: int
    lora_rank: int
    """0: all weights are trained."""
    has_weight_diff: bool = False
    further_bytes: int = 0
    """Further models that are downloaded: to be scored, or to judge the data."""


def count_trained(parameters: int, lora_rank: int) -> int:
    """Return how many parameters are trained: all, or with a rank those of an adapter."""
    return math.ceil(parameters * min(1.0, LORA_SHARE_PER_RANK * lora_rank)) if lora_rank else parameters


def find_lora_rank(training: TrainingConfig) -> int:
    """Return the rank of the adapter that is trained; 0: all weights are."""
    return training.lora_rank if training.method == "lora" else 0


def checkpoint_bytes(contents: Contents) -> int:
    """Return the size of one checkpoint with gathered weights: what the stock Trainer writes, and a margin for ours."""
    trained = count_trained(contents.parameters, contents.lora_rank)
    return estimate_checkpoint_bytes(trained, trained, contents.zero_stage)


def training_memory_bytes(parameters: int, run: RunConfig) -> int:
    """Return the host memory that a training pod takes for certain: the buffers of its saves, and offloaded states.

    With less the trainer makes the buffers smaller, and training waits for a part of the writing.
    """
    training, nodes = run.training, run.topology.nodes
    trained = count_trained(parameters, find_lora_rank(training))
    buffers = estimate_share_bytes(trained, trained, training.zero_stage, nodes, is_first=True)
    is_on_host = run.topology.gpus_per_node == 0 or training.offload != "none"
    return buffers + (math.ceil(BYTES_PER_PARAMETER_STATES * trained / nodes) if is_on_host else 0)


def needed_bytes(contents: Contents) -> int:
    """Return what the workspace must hold at its fullest; the data set lies there as it came and as it was prepared."""
    output = max(contents.model_bytes, contents.parameters * BYTES_PER_PARAMETER_OUTPUT)
    checkpoints = peak_bytes(checkpoint_bytes(contents), contents.checkpoints_kept)
    # How far a difference can be compressed is known only when it is made.
    outputs = 2 * output if contents.has_weight_diff else output
    inputs = contents.model_bytes + 2 * contents.dataset_bytes + contents.further_bytes
    return inputs + checkpoints + outputs


def choose_size(contents: Contents) -> str:
    """Return the size to ask for: what is needed, a fifth more, and room for reports."""
    return to_gibibytes(needed_bytes(contents) * 1.2 + GIB / 2)


def choose_zero_stage(training: TrainingConfig, parameters: int, processes: int) -> int:
    """Return the ZeRO stage that is written, or the lowest of 2 and 3 whose share of the model fits into a GPU.

    3 where the number of parameters is not known (0).
    """
    if training.zero_stage or parameters <= 0:
        return training.zero_stage or 3
    per_weight = BYTES_PER_PARAMETER_QUANTIZED if training.lora_quantization else 2
    stage_2 = per_weight * parameters + 14 * count_trained(parameters, find_lora_rank(training)) / processes
    return 2 if stage_2 <= GPU_MEMORY_BYTES * USABLE_SHARE else 3


def choose_gpus_to_evaluate(parameters: int, gpus: int) -> int:
    """Return how many GPUs hold the promoted model with room for its caches."""
    if gpus == 0:
        return 0
    wanted = math.ceil(parameters * BYTES_PER_PARAMETER_OUTPUT / (GPU_MEMORY_BYTES * USABLE_SHARE))
    return max(1, min(gpus, wanted))


def choose_accumulation(per_device: int, max_length: int, tokens: int, rows: int, wanted: int = 4) -> int:
    """Return the accumulation with which packed sequences carry as many real tokens per step as padded ones would.

    A padded sequence carries one row, a packed one as many rows as fit.
    """
    if tokens <= 0 or rows <= 0:
        return wanted
    rows_per_sequence = max(1.0, max_length / min(max_length, max(1.0, tokens / rows)))
    return max(1, round(wanted / rows_per_sequence))
