"""Settings for the torch commands: the run's JSON in a pod, or flags on plain files, with any field set by its name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import typing
from collections.abc import Sequence
from typing import Any

from finetune_contract.parsing import RunConfigError
from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import DatasetConfig, RunConfig, Source
from finetune_trainer.commands.common import add_run_config_argument, load_run_config
from finetune_trainer.errors import TrainerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--run-config`, and the flags that stand in for it."""
    add_run_config_argument(parser)
    parser.add_argument("--model", metavar="DIR", help="base model in Hugging Face layout, instead of a run config")
    parser.add_argument("--data", metavar="DIR", help="prepared data: a folder with train.jsonl and holdout.jsonl")
    parser.add_argument("--workspace", metavar="DIR", help="folder for checkpoints, output and reports")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="set a field of the run's settings, as in training.max_steps=10; values are JSON or plain text",
    )


def load_settings(args: argparse.Namespace) -> RunConfig:
    """Return the run's settings, and note on `args` where the exit report belongs."""
    settings = load_run_config(args) if args.model is None else _build_settings(args)
    settings = apply_overrides(settings, args.set)
    args.workspace_root = settings.workspace
    return settings


def _build_settings(args: argparse.Namespace) -> RunConfig:
    if args.workspace is None:
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, "--model without --workspace", "Add --workspace DIR.")
    sources = (Source(str(pathlib.Path(args.data).resolve())),) if args.data else ()
    return RunConfig(
        model=Source(str(pathlib.Path(args.model).resolve())),
        dataset=DatasetConfig(sources=sources),
        workspace=str(pathlib.Path(args.workspace).resolve()),
    )


def prepare_libraries(reads_shards: bool = False) -> None:
    """Make the torch libraries start fast and stay quiet in commands that do not train.

    DeepSpeed stays importable for a command that reads the shards of its checkpoints.
    """
    from finetune_trainer.training.stack import UNUSED, block_modules

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    block_modules(UNUSED if reads_shards else (*UNUSED, "deepspeed"))
    from transformers.utils import logging

    logging.disable_progress_bar()


def apply_overrides(settings: RunConfig, assignments: Sequence[str]) -> RunConfig:
    """Return the settings with `section.field=value` applied. Raises TrainerError that names the assignment."""
    # Not as it is sent: that leaves out what has its default.
    data = json.loads(json.dumps(dataclasses.asdict(settings)))
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        *path, last = name.split(".")
        try:
            target = data
            for part in path:
                target = target[part]
            target[last]
            if not separator:
                raise KeyError(name)
        except (KeyError, TypeError) as error:
            raise TrainerError(
                Reason.INVALID_CONFIG,
                ExitCode.USAGE,
                f"--set {assignment}: no such field",
                f"Sections and fields: {', '.join(list_fields(RunConfig))}.",
            ) from error
        target[last] = _parse_value(text)
    try:
        return RunConfig.from_json(json.dumps(data))
    except RunConfigError as error:
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, f"--set: {error}") from error


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def list_fields(kind: Any, prefix: str = "") -> list[str]:
    """List the dotted names of all settings."""
    hints = typing.get_type_hints(kind)
    names: list[str] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        nested = dataclasses.is_dataclass(hint)
        names += list_fields(hint, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return names
