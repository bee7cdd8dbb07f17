"""Scores of a model: held-out rows and lm-eval tasks."""
