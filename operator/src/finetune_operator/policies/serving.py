"""What keeps a version from being served, in words for its owner: a model too large for its GPUs, a crashing server.

Called by `deployment`. Pure.
"""

from __future__ import annotations

import math

from finetune_contract.reports import Phase
from finetune_operator.observed import Pod
from finetune_operator.placement import PRESETS
from finetune_operator.plan import Plan
from finetune_operator.record import Record

USABLE_SHARE = 0.9
"""Share of a GPU's memory that vLLM takes; weights, activations and its cache all lie in there."""


def find_oversize(plan: Plan, record: Record) -> str:
    """Return why the model cannot fit into its GPUs, with the numbers; empty when it can, or nothing is known."""
    preset = PRESETS.get(plan.placement.preset)
    promoted = record.details(Phase.PROMOTE)
    size, gpus = int(promoted.get("bytes") or 0), plan.serving.gpus
    if preset is None or not gpus or plan.serving.version or size <= gpus * preset.gpu_memory_bytes * USABLE_SHARE:
        return ""
    # Tensors are cut evenly: powers of two divide every model's heads.
    wanted = 2 ** math.ceil(math.log2(size / (preset.gpu_memory_bytes * USABLE_SHARE)))
    parameters = int(promoted.get("parameters") or 0)
    each = (
        f", {size / parameters:.1f} bytes for each of {parameters / 1e9:.1f} billion parameters" if parameters else ""
    )
    room = gpus * preset.gpu_memory_bytes * USABLE_SHARE
    return (
        f"inference.gpusPerReplica: the weights take {size / 1e9:.0f} GB{each}; {gpus} of the GPUs of "
        f"{plan.placement.preset}, with {preset.gpu_memory_bytes / 1e9:.0f} GB, have room for {room / 1e9:.0f} GB: "
        f"write at least {wanted}"
    )


def explain_crash(pod: Pod) -> str:
    """Return what a server that crashes again and again said last, and what to do about it."""
    told, ended = f"pod {pod.name} crashes again and again", pod.last_exit or pod.exit
    if ended is None:
        return f"{told}: see kubectl logs {pod.name} --previous"
    if ended.reason == "OOMKilled":
        return f"{told}: it is killed for memory: raise inference.pod.resources.limits.memory"
    if ended.report is not None:
        return f"{told}: {ended.report.message}: {ended.report.hint or f'see kubectl logs {pod.name} --previous'}"
    last = next((line for line in reversed(ended.message.splitlines()) if line.strip()), "")
    return f"{told} with code {ended.code}: {last[:300]}: see kubectl logs {pod.name} --previous"
