"""A loaded model as lm-eval sees it: log-likelihoods are computed in rows that share beginnings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from finetune_trainer.evaluation import shared_prefix
from finetune_trainer.reporting import ProgressBar

BATCH_SIZE = 16
"""Generations at once, and requests of models that cannot share; the harness sorts them by length."""


class SharingModel(HFLM):  # type: ignore[misc]
    """What `HFLM` is, with shared beginnings where the architecture allows it."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE, device=str(model.device))

    @functools.cached_property
    def _is_exact(self) -> bool:
        return shared_prefix.is_exact(self.model)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
        if not (shared_prefix.fits_windows(self.model, min(longest, self.max_length)) and self._is_exact):
            scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return scored
        rows = [shared_prefix.Request(context, continuation) for _, context, continuation in requests]
        with ProgressBar("scoring requests", len(rows), "requests") as bar:
            return shared_prefix.score(self.model, rows, self.max_length, bar.advance)
