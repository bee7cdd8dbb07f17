"""Instruction data: formats, the refusal filter, prompts, the split, and the prepared data set. Needs no torch."""
