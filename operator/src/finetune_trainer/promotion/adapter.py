"""The LoRA adapter of a promoted model as it is published alone: its files, and what they say of its base. No torch.

Called by `publish`. Everything comes from the promoted folder, which is not changed: what has to be said anew is
written beside it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.adapters.folder import CONFIG, WEIGHTS
from finetune_trainer.checkpoints.manifest import FileEntry
from finetune_trainer.data.prompts import TOKENIZER_TEMPLATE
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion.promoted import ADAPTER, list_content, make_digest
from finetune_trainer.reporting import emit_warning, read_object, write_json
from finetune_trainer.storage.publish import ACCOUNTS, MODEL_CARD, PROVENANCE, REPORT_JSON, LocalFile, describe_file

_OF_THE_MODEL = ("config.json", "generation_config.json")
"""Files beside a promoted model's tokenizer, besides its weights."""


def list_adapter_files(model: pathlib.Path, beside: pathlib.Path, field: str) -> tuple[str, tuple[LocalFile, ...]]:
    """Return the files of a promoted model's adapter, and the digest of their content.

    Configuration and model card are written into the empty folder `beside`. Raises TrainerError, in the words of the
    destination `field`, for a model without an adapter.
    """
    if not (model / ADAPTER / CONFIG).is_file():
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            f"{field}.content: Adapter, but {model.name} was trained whole: there is no adapter",
            "Write content: Model, or train with training.method: lora.",
        )
    provenance = read_object(model / PROVENANCE)
    config = _name_base(read_object(model / ADAPTER / CONFIG), provenance.get("base_model") or {})
    write_json(beside / CONFIG, config)
    paths = {CONFIG: beside / CONFIG, WEIGHTS: model / ADAPTER / WEIGHTS}
    # A prompt of ours is a chat template that the base's tokenizer does not have.
    if (provenance.get("dataset") or {}).get("prompt_template") != TOKENIZER_TEMPLATE:
        paths |= {name: model / name for name in list_content(model) if _is_of_tokenizer(name)}
    if (model / PROVENANCE).is_file():
        paths[PROVENANCE] = model / PROVENANCE
    if _write_card(model, config, has_tokenizer="tokenizer_config.json" in paths, path=beside / MODEL_CARD):
        paths[MODEL_CARD] = beside / MODEL_CARD
    files = tuple(describe_file(path, name) for name, path in sorted(paths.items()))
    return make_digest({each.name: FileEntry(each.size, each.sha256) for each in files if _is_content(each)}), files


def _is_content(file: LocalFile) -> bool:
    return file.name not in ACCOUNTS


def _is_of_tokenizer(name: str) -> bool:
    is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
    return not (is_weights or name in _OF_THE_MODEL or name.startswith(f"{ADAPTER}/"))


def _name_base(config: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration with the base model in it: a hub's at its commit, another by where it came from."""
    from finetune_trainer.report.card import name_on_hub

    source = str(base.get("source") or "")
    name = name_on_hub(source)
    revision = base.get("resolvedRevision") or base.get("revision") if name else None
    return {**config, "base_model_name_or_path": name or source, "revision": revision or None}


def _write_card(model: pathlib.Path, config: Mapping[str, Any], *, has_tokenizer: bool, path: pathlib.Path) -> bool:
    """Write the model card of the adapter; False where the model has no report to make it of."""
    from finetune_trainer.report.card import AdapterFacts, build_card

    report = read_object(model / REPORT_JSON)
    if not report:
        emit_warning("the adapter has no model card: the model has no run report", model=model.name[:12])
        return False
    facts = AdapterFacts(config["base_model_name_or_path"], config["revision"] or "", config["r"], has_tokenizer)
    path.write_text(build_card(report, facts), encoding="utf-8", errors="backslashreplace")
    return True
