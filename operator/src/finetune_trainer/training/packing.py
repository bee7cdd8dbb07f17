"""Whether packed rows are safe for a model: only where its code honours position ids. Pure."""

from __future__ import annotations

PACKABLE = frozenset({"gemma", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3"})
"""Model types tested to give each packed example the logits it has alone. Others ignore position ids (MPT's ALiBi), or
nobody has looked."""


def is_packable(model_type: str) -> bool:
    """Return whether examples in one row do not see each other in this architecture."""
    return model_type in PACKABLE


def choose_accumulation(wanted: int, rows_per_micro_step: int, examples_per_row: float, recipe_rows: int) -> int:
    """Return the accumulation steps: `wanted`, or for 0 what keeps the recipe's real examples per optimizer step."""
    if wanted > 0:
        return wanted
    return max(1, round(recipe_rows / (rows_per_micro_step * max(examples_per_row, 1.0))))
