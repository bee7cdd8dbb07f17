"""A composed adapter on disk: PEFT's two files, and the profile that says what it was composed of.

`composition.json` is the profile with `composition` added: `profileDigest`, the `digest` of the adapter, its `rank`,
`largestError`, and `errors` by module. Composed again from it, the adapter has to come out equal to the byte.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from typing import TYPE_CHECKING, Any

from finetune_trainer.adapters.base import Base, read_model_base
from finetune_trainer.adapters.compose import Part, compose
from finetune_trainer.adapters.folder import CONFIG, WEIGHTS, Adapter, read_adapter, refuse
from finetune_trainer.adapters.profile import COMPOSITION, Entry, Profile, read_profile
from finetune_trainer.adapters.sources import fetch_adapter
from finetune_trainer.reporting import write_json
from finetune_trainer.storage import Access
from finetune_trainer.weight_diff.files import fresh_folder
from finetune_trainer.weight_diff.tensors import invalid

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Sequence

    from finetune_trainer.adapters.compose import Composition, Settings

PROFILE = "composition.json"


def make_profile(parts: Sequence[Part], settings: Settings, names: Sequence[str], base: str = "") -> Profile:
    """Return the profile of adapters that lie on this machine. A base that nobody names is what they say it is."""
    known = next((part.adapter.base.digests[0] for part in parts if part.adapter.base.digests), "")
    entries: list[Entry] = []
    for name, part in zip(names, parts, strict=True):
        taken = {entry.name for entry in entries}
        own = next(each for each in itertools.chain([name], _number(name)) if each not in taken)
        entries.append(Entry(own, str(part.adapter.folder), part.adapter.digest, part.weight))
    return Profile(base or known, tuple(entries), settings)


def _number(name: str) -> Iterator[str]:
    return (f"{name}-{number}" for number in itertools.count(2))


def read_parts(path: pathlib.Path, downloads: pathlib.Path) -> tuple[Profile, list[Part], str]:
    """Return the profile of a file, its adapters, and the digest that the result has to have, if one is written.

    Raises TrainerError naming the file and the entry whose source does not hold what its digest says.
    """
    profile, results = read_profile(path)
    parts = []
    for index, entry in enumerate(profile.entries):
        label = f"--profile {path}: adapters[{index}] ({entry.name})"
        access = Access(label, "model")
        source = entry.source if "://" in entry.source else str(path.parent / entry.source)
        adapter = read_adapter(fetch_adapter(source, entry.revision, access, downloads / entry.name), label)
        check_digest(adapter, entry)
        parts.append(Part(adapter, entry.weight))
    return profile, parts, str(results.get("digest") or "")


def check_digest(adapter: Adapter, entry: Entry) -> None:
    """Raise TrainerError when the adapter is not the one that the entry pins."""
    if adapter.digest != entry.digest:
        why = f"its digest is {adapter.digest}, expected {entry.digest}"
        raise refuse(adapter.label, why, "Bring back the adapter that was meant, or write the new digest.")


def check_base(parts: Sequence[Part], profile: Profile, model: pathlib.Path | None) -> None:
    """Raise TrainerError for an adapter of another base than the profile's, and for a model that is not that base."""
    wanted = Base((profile.base,)) if profile.base else Base()
    if model is not None:
        base = read_model_base(model)
        if wanted.differs_from(base):
            why = f"{model} is {base.label}, the profile's base is {profile.base}"
            raise invalid("--model", why, "Name the model that the adapters were trained on.")
        wanted = base
    for part in parts:
        if part.adapter.base.differs_from(wanted):
            why = f"its base is {part.adapter.base.label}, not {wanted.label}"
            raise refuse(part.adapter.label, why, "Train it on this base, or leave it out.")
        if model is not None:
            check_shapes(part.adapter, model)


def check_shapes(adapter: Adapter, model: pathlib.Path) -> None:
    """Raise TrainerError when a module of the adapter is not in the model, or has another shape there."""
    from finetune_trainer.training.modeling import build_empty_model

    modules = dict(build_empty_model(model, "bfloat16").named_modules())
    for name, module in adapter.modules.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise refuse(adapter.label, f"{name} is no module of {model}", "Train it on this base, or leave it out.")
        # GPT-2's linear layers keep their weight the other way round.
        if module.shape not in (tuple(weight.shape), tuple(weight.shape)[::-1]):
            why = f"{name} is {module.shape}, in {model} it is {tuple(weight.shape)}"
            raise refuse(adapter.label, why, "Train it on this base, or leave it out.")


def write_composition(out: pathlib.Path, profile: Profile, parts: Sequence[Part], expected: str = "") -> dict[str, Any]:
    """Compose into a folder that does not exist yet, and return what `composition.json` says.

    `expected` is the digest that the result has to have; empty: any. Raises TrainerError.
    """
    composition = compose(parts, profile.settings)
    with fresh_folder(out) as beside:
        _write_adapter(beside, profile, parts, composition)
        digest = read_adapter(beside).digest
        if expected and digest != expected:
            why = f"the composed adapter's digest is {digest}, the profile says {expected}"
            hint = f"Another machine or library rounds {profile.settings.method} differently: remove `{COMPOSITION}`."
            raise invalid("--profile", why, hint)
        results = {
            "profileDigest": profile.digest,
            "digest": digest,
            "rank": composition.rank,
            "largestError": composition.largest_error,
            "errors": dict(composition.errors),
        }
        facts = {**_relative(profile, out).to_dict(), COMPOSITION: results}
        write_json(beside / PROFILE, facts)
    return facts


def _relative(profile: Profile, out: pathlib.Path) -> Profile:
    """Return the profile with the paths of its sources as seen from the folder that it is written to."""
    entries = [
        entry if "://" in entry.source else dataclasses.replace(entry, source=os.path.relpath(entry.source, out))
        for entry in profile.entries
    ]
    return dataclasses.replace(profile, entries=tuple(entries))


def _write_adapter(folder: pathlib.Path, profile: Profile, parts: Sequence[Part], composition: Composition) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, module in composition.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.first.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.second.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": profile.base or parts[0].adapter.base.name,
        "r": composition.rank,
        # Alpha over rank is the scale, which the factors already carry.
        "lora_alpha": composition.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in composition.modules}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
