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

_UNUSED = ("mlflow", "wandb", "scipy", "sklearn", "av", "librosa", "torchvision", "torchaudio", "soundfile")
"""Optional packages that cost import time and that training needs only as trackers, if at all."""


def import_stack(tracking: Sequence[str] = (), uses_lora: bool = False) -> None:
    """Import everything a rank needs."""
    started = time.monotonic()
    # Asking the driver's library for GPUs, not the runtime: CUDA that has been initialised does not survive a fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    hidden = [name for name in _UNUSED if name not in tracking]
    if not uses_lora:
        hidden.append("peft")
    with hide_modules(hidden):
        import deepspeed  # noqa: F401
        import torch
        import transformers.integrations.deepspeed
        import transformers.models.auto.modeling_auto  # noqa: F401
        import trl.trainer.sft_trainer  # noqa: F401

        import finetune_trainer.training.callbacks
        import finetune_trainer.training.collate
        import finetune_trainer.training.trainer  # noqa: F401
    if torch.cuda.is_initialized():
        raise RuntimeError("an import initialised CUDA; the ranks cannot be forked")
    # Objects made so far are never collected: a collection would copy the pages that the ranks share.
    gc.freeze()
    emit("stack imported", seconds=round(time.monotonic() - started, 1))


@contextlib.contextmanager
def hide_modules(names: Sequence[str]) -> Iterator[None]:
    """Make imports of packages fail, as if they were not installed; those already imported stay."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
