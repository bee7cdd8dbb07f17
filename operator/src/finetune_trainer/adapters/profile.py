"""A composed adapter on disk: PEFT's two files, and the profile that says what it was composed of.

`composition.json` holds `version`, `base`, `method`, `rank`, `density`, `seed`, `parts` (in order: `name`, `digest`,
`weight`), `digest` of the result, `largestError`, and `errors` by module. Kept in Git, its `parts` and settings are
enough to compose the same adapter again.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from finetune_trainer.adapters.folder import CONFIG, WEIGHTS, read_adapter
from finetune_trainer.reporting import write_json
from finetune_trainer.weight_diff.files import fresh_folder

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Sequence

    from finetune_trainer.adapters.compose import Composition, Part, Settings

PROFILE = "composition.json"
VERSION = 1


def write_composition(
    out: pathlib.Path, parts: Sequence[Part], settings: Settings, composition: Composition
) -> dict[str, Any]:
    """Write the composed adapter into a folder that does not exist yet, and return its profile. Raises TrainerError."""
    with fresh_folder(out) as beside:
        _write_adapter(beside, parts, composition)
        profile = {
            "version": VERSION,
            "base": parts[0].adapter.base,
            **dataclasses.asdict(settings),
            "rank": composition.rank,
            "parts": [
                {"name": part.adapter.folder.name, "digest": part.adapter.digest, "weight": part.weight}
                for part in parts
            ],
            "digest": read_adapter(beside).digest,
            "largestError": composition.largest_error,
            "errors": dict(composition.errors),
        }
        write_json(beside / PROFILE, profile)
    return profile


def _write_adapter(folder: pathlib.Path, parts: Sequence[Part], composition: Composition) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, module in composition.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.first.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.second.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parts[0].adapter.config.get("base_model_name_or_path"),
        "r": composition.rank,
        # Alpha over rank is the scale, which the factors already carry.
        "lora_alpha": composition.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in composition.modules}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
