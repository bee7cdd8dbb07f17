"""Imports the training stack once, in the supervisor, without touching the accelerator, so that ranks can be forked.

The imports are most of a short run's time. Packages that the libraries import only because they are installed, and this
run does not use, are hidden from them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence

from finetune_trainer.reporting import emit

UNUSED = (
    *("mlflow", "wandb", "boto3", "scipy", "sklearn", "av", "librosa", "torchvision", "torchaudio", "soundfile"),
    "bitsandbytes",
)
"""Optional packages that cost import time and that training needs only as trackers, if at all; and one that initialises
CUDA when it is imported, so that ranks import it themselves (`quantization.py`)."""


def import_stack(tracking: Sequence[str] = (), uses_gpus: bool = False) -> None:
    """Import everything a rank needs."""
    started = time.monotonic()
    # Asking the driver's library for GPUs, not the runtime: CUDA that has been initialised does not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hidden = [name for name in UNUSED if name not in tracking]
    hidden += [] if uses_gpus else ["triton"]
    with hide_modules(hidden):
        import deepspeed  # noqa: F401
        import peft  # noqa: F401
        import torch
        import trl.trainer.sft_trainer  # noqa: F401

        _import_muon()
        import finetune_trainer.training.attention
        import finetune_trainer.training.callbacks
        import finetune_trainer.training.collate
        import finetune_trainer.training.trainer  # noqa: F401
    if torch.cuda.is_initialized():
        raise RuntimeError("an import initialised CUDA; the ranks cannot be forked")
    # Objects made so far are never collected: a collection would copy the pages that the ranks share.
    gc.freeze()
    emit("stack imported", seconds=round(time.monotonic() - started, 1))


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without the compiler.

    DeepSpeed imports it in every run, to compare types; its one decorator would load all of `torch.compile` for it,
    which takes longer than the rest of a rank's start.
    """
    import torch

    compile_function = torch.compile
    torch.compile = lambda model=None, **_options: model if model is not None else lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compile_function


@contextlib.contextmanager
def hide_modules(names: Sequence[str]) -> Iterator[None]:
    """Make imports of packages fail inside the block, as if they were not installed."""
    hidden = block_modules(names)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def block_modules(names: Sequence[str]) -> list[str]:
    """Make imports of packages fail from here on; those already imported stay. Return the names that were blocked."""
    blocked = [name for name in names if name not in sys.modules]
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    return blocked
