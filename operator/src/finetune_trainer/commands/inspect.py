"""`inspect`: sizes, parameters and revisions of the model and the data, from headers alone and without a volume."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitReport, Phase, Reason
from finetune_contract.run_config import DatasetConfig, JudgeConfig, RunConfig, Source
from finetune_trainer.commands.common import add_run_config_argument, load_run_config
from finetune_trainer.reporting import emit, write_exit_report

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_run_config_argument(parser)
    parser.add_argument("--model", metavar="URL", help="inspect this model instead of a run's")
    parser.add_argument("--dataset", metavar="URL", help="inspect this data set instead of a run's")


def run(args: argparse.Namespace) -> int:
    """Read headers, print what they tell, and report it."""
    settings = _read_settings(args)
    # No workspace is mounted; the report goes to the termination log only.
    args.workspace_root = None
    root = pathlib.Path(settings.workspace)
    details = _inspect_model(settings, root) if settings.model.source else {}
    if settings.dataset.sources:
        details |= _inspect_dataset(settings, root)
    if settings.dataset.judge.source:
        details["judge_bytes"] = _inspect_judge(settings.dataset.judge, root)
    if settings.evaluation.models:
        details["evaluated_bytes"] = _inspect_evaluated(settings, root)
    print(json.dumps(details, indent=1))
    message = ", ".join(f"{name} {value}" for name, value in details.items() if not isinstance(value, list))
    write_exit_report(ExitReport(Phase.INSPECT, Reason.COMPLETED, message, details=details))
    return 0


def _read_settings(args: argparse.Namespace) -> RunConfig:
    if not args.model and not args.dataset:
        return load_run_config(args)
    sources = (Source(args.dataset),) if args.dataset else ()
    return RunConfig(Source(args.model or ""), DatasetConfig(sources), workspace=".")


def _inspect_model(settings: RunConfig, root: pathlib.Path) -> dict[str, Any]:
    from finetune_trainer.fetch import RemoteModel

    if _is_out_of_sight(settings.model, root):
        unknown = ("model_bytes", "model_parameters", "model_type", "model_revision")
        return dict.fromkeys(unknown)
    model = RemoteModel(settings, root)
    facts = model.read_facts()
    if facts.is_pickled:
        emit("the weights are pickled; they will be opened without running code", source=settings.model.source)
    return {
        "model_bytes": facts.num_bytes,
        "model_parameters": facts.num_parameters,
        "model_type": facts.model_type,
        "model_revision": model.revision,
    }


def _inspect_judge(judge: JudgeConfig, root: pathlib.Path) -> int:
    """Return the size of the judge where it is to be downloaded; it must be there."""
    from finetune_trainer.fetch import measure_judge

    return 0 if judge.source.startswith("pvc://") else measure_judge(judge, root)


def _inspect_evaluated(settings: RunConfig, root: pathlib.Path) -> int:
    """Return the size of the further models that are to be downloaded and scored; each must be one."""
    from finetune_trainer.evaluation.models import open_model

    total = 0
    for index, model in enumerate(settings.evaluation.models):
        if not model.source.startswith("pvc://"):
            total += open_model(settings, index).read_facts().num_bytes
    return total


def _inspect_dataset(settings: RunConfig, root: pathlib.Path) -> dict[str, Any]:
    from finetune_trainer.fetch import list_remote_rows

    num_bytes, revisions = 0, []
    for index, source in enumerate(settings.dataset.sources):
        if _is_out_of_sight(source, root):
            revisions.append("")
            continue
        rows = list_remote_rows(settings.dataset, root, index)
        num_bytes += rows.num_bytes
        revisions.append(rows.revision)
    return {"dataset_bytes": num_bytes, "dataset_revisions": revisions}


def _is_out_of_sight(source: Source, root: pathlib.Path) -> bool:
    """Whether the source is on the workspace, which is not mounted while a job is planned.

    A path that is missing there is then no error yet: `prepare`, which mounts the workspace, will say so.
    """
    scheme, _, path = source.source.partition("://")
    return scheme == "pvc" and not (root / path.lstrip("/")).exists()
