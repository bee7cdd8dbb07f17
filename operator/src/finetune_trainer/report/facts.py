"""Everything a run report says, gathered from a workspace into one JSON object. No torch.

What the operator knows comes with the run's settings. Without a cluster the log of metrics stands in for it; whatever
is not there is left out, and `missing` says so.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.data.output import PAGE
from finetune_trainer.errors import redact
from finetune_trainer.promotion.promoted import MANIFEST
from finetune_trainer.report import work
from finetune_trainer.report.curves import build_curves
from finetune_trainer.report.history import read_history
from finetune_trainer.report.scores import list_gates, list_scores
from finetune_trainer.reporting import now_text, read_object
from finetune_trainer.storage.publish import PROVENANCE

VERSION = 1
"""Of the JSON."""
_DATA = (
    *("digest", "rowsRead", "rowsKept", "rowsRemoved", "rowsEdited", "rowsFlagged", "rowsBad", "rowsTrain"),
    *("rowsHoldout", "tokens", "removedPerCategory", "removedPerRule", "removedPerLanguage"),
)
"""What is taken from the data's own report."""
_TRAINED = ("packing", "examples_truncated", "examples_dropped", "real_token_share")


def build_report(workspace: Workspace, run: RunConfig | None, digest: str) -> dict[str, Any]:
    """Return the report of the promoted model with this digest; of the training alone where it is empty."""
    model = read_object(workspace.promoted_model(digest) / PROVENANCE) if digest else {}
    history = read_history(workspace.metrics_log)
    report: dict[str, Any] = {
        "version": VERSION,
        "createdAt": now_text(),
        "job": model.get("job") or (dataclasses.asdict(run.job) if run else {}),
        "model": _describe_model(workspace, model, digest),
        "base": (model.get("base_model") or _describe_base(workspace, run)) | _describe_license(workspace),
        "checkpoint": model.get("checkpoint") or {},
        "data": _describe_data(workspace, model, run),
        "training": model.get("training") or (dataclasses.asdict(run.training) if run else {}),
        "topology": model.get("topology") or (dataclasses.asdict(run.topology) if run else {}),
        "versions": model.get("versions") or {},
        "images": dict(run.history.images) if run else {},
        "examples": _describe_examples(workspace),
    }
    report["work"], report["attempts"] = work.describe_work(history, run, report["topology"])
    report["curves"] = build_curves(history)
    report["summary"] = work.summarise(history)
    scores = _read_of(workspace.reports / "scores.json", digest)
    report["scores"] = list_scores(scores)
    report["gates"] = list_gates(run.evaluation.gates if run else (), scores)
    report["samples"] = _list_samples(workspace, digest)
    report["missing"] = _list_missing(report, digest)
    cleaned: dict[str, Any] = json.loads(redact(json.dumps(report)))
    return cleaned


def _describe_model(workspace: Workspace, model: Mapping[str, Any], digest: str) -> dict[str, Any]:
    if not digest:
        return {}
    folder = workspace.promoted_model(digest)
    files = read_object(folder / MANIFEST).get("files") or {}
    return {
        "digest": digest,
        "path": str(folder),
        "createdAt": model.get("created_at"),
        "parameters": model.get("parameters"),
        "bytes": sum(entry["size"] for entry in files.values()),
    }


def _describe_base(workspace: Workspace, run: RunConfig | None) -> dict[str, Any]:
    source = {"source": run.model.source, "revision": run.model.revision} if run else {}
    return source | read_object(workspace.base_model_manifest)


def _describe_license(workspace: Workspace) -> dict[str, str]:
    """Return what the base model's own card says of its licence; a tuned model cannot have less."""
    # Here: the hub's library reads its environment when it is imported, which the torch commands still set.
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(workspace.base_model / "README.md")
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found, dict) and isinstance(found.get(name), str)}


def _describe_data(workspace: Workspace, model: Mapping[str, Any], run: RunConfig | None) -> dict[str, Any]:
    known: Mapping[str, Any] = model.get("dataset") or {}
    digest = known.get("digest") or read_object(workspace.current_dataset).get("digest") or ""
    folder = workspace.dataset(digest) if digest else None
    full = known.get("report") or (read_object(folder / "report.json") if folder else {})
    data: dict[str, Any] = {name: full[name] for name in _DATA if name in full}
    sources = known.get("sources") or ([source.source for source in run.dataset.sources] if run else [])
    template = known.get("prompt_template") or (run.dataset.prompt_template if run else "")
    data |= {"digest": digest, "sources": sources, "promptTemplate": template}
    if folder is not None and (folder / PAGE).exists():
        data["page"] = (folder / PAGE).relative_to(workspace.root).as_posix()
    return data


def _describe_examples(workspace: Workspace) -> dict[str, Any]:
    details = read_object(workspace.reports / "train.json").get("details") or {}
    return {name: details[name] for name in _TRAINED if name in details}


def _list_samples(workspace: Workspace, digest: str) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = _read_of(workspace.samples, digest).get("samples") or []
    return samples


def _read_of(path: pathlib.Path, digest: str) -> Mapping[str, Any]:
    """Return what was made with this model, else nothing. Files that do not say so are taken at their place."""
    found = read_object(path)
    return found if digest and found.get("digest") in (None, "", digest) else {}


def _list_missing(report: Mapping[str, Any], digest: str) -> list[str]:
    checks = (
        (digest, "No model has been promoted yet: there are no scores, no sample answers and no digest."),
        (report["curves"], "The log of metrics (reports/metrics.jsonl) is not there: no curves, no throughput."),
        (
            report["work"].get("source") != "log",
            "Times of attempts come from the log of metrics: an operator knows more.",
        ),
        (report["data"].get("rowsRead"), "The data set was not prepared on this workspace: no filter summary."),
        (report["scores"] or not digest, "The model has not been scored."),
        (not report["scores"] or any("base" in one for one in report["scores"]), "The base model was not scored."),
        (report["samples"] or not digest, "No sample answers were made: the evaluation makes them from held-out rows."),
    )
    return [text for is_there, text in checks if not is_there]
