"""Where a promoted model comes from, as one machine-readable record. No torch.

Base, data with the report of its filter, recipe, checkpoint, restarts and code.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.manifest import Manifest
from finetune_trainer.reporting import now_text, read_object
from finetune_trainer.versions import read_version

_PACKAGES = ("finetune-operator", "torch", "transformers", "trl", "deepspeed", "accelerate", "peft")


def build_provenance(run: RunConfig, checkpoint: Manifest, digest: str, num_parameters: int) -> dict[str, Any]:
    """Return the record of one promotion."""
    workspace = Workspace(pathlib.Path(run.workspace))
    data = read_object(workspace.current_dataset)
    return {
        "digest": digest,
        "parameters": num_parameters,
        "created_at": now_text(),
        "job": dataclasses.asdict(run.job),
        "base_model": {
            "source": run.model.source,
            "revision": run.model.revision,
            **read_object(workspace.base_model_manifest),
        },
        "dataset": {
            "sources": [source.source for source in run.dataset.sources],
            "prompt_template": run.dataset.prompt_template,
            "digest": data.get("digest", ""),
            "report": read_object(workspace.dataset(data["digest"]) / "report.json") if data.get("digest") else {},
        },
        "training": dataclasses.asdict(run.training),
        "topology": dataclasses.asdict(run.topology),
        "restarts": {
            "total": run.history.restarts,
            "by_reason": dict(run.history.restarts_by_reason),
            "steps_lost": run.history.steps_lost,
        },
        "checkpoint": {
            "step": checkpoint.step,
            "attempt": checkpoint.attempt,
            "created_at": checkpoint.created_at,
            "world_size": checkpoint.world_size,
            "metrics": dict(checkpoint.metrics),
        },
        "images": dict(run.history.images),
        "versions": {name: read_version(name) for name in _PACKAGES},
    }
