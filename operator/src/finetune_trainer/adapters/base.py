"""Which model an adapter belongs to, by digests: of a promoted model, or of any model's files of weights. No torch.

A model goes by several digests: a promoted one by that of its content, one that a job downloaded by that of all its
files, and every one by that of its weights. An adapter names its base by what its provenance or its configuration
says; the two belong together when one digest is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_trainer.promotion.promoted import MANIFEST
from finetune_trainer.reporting import read_object
from finetune_trainer.storage.publish import PROVENANCE
from finetune_trainer.storage.transfer import hash_file
from finetune_trainer.weight_diff.tensors import invalid

_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{32}")
_WEIGHTS = re.compile(r"[^/]+\.(?:safetensors|bin)")


@dataclasses.dataclass(frozen=True)
class Base:
    """A model, as far as it can be told from others."""

    digests: tuple[str, ...] = ()
    """The best known one first; any of them names it."""
    name: str = ""
    """What its folder or repository was called where the adapter was trained."""

    @property
    def label(self) -> str:
        """How messages call it."""
        return (self.digests[0] if self.digests else self.name) or "not known"

    def differs_from(self, other: Base) -> bool:
        """Return whether the two are known to be different; names count only where no digest is known."""
        if self.digests and other.digests:
            return not set(self.digests) & set(other.digests)
        if self.digests or other.digests:
            return False
        return bool(self.name and other.name and self.name != other.name)


def is_digest(text: str) -> bool:
    """Return whether a text is a digest of a model, as written by us."""
    return _DIGEST.fullmatch(text) is not None


def read_model_base(folder: pathlib.Path) -> Base:
    """Return what a model folder goes by. Files of weights are read only where nothing has recorded their digests.

    Raises TrainerError for a folder without weights.
    """
    promoted = read_object(folder / MANIFEST)
    downloaded = read_object(folder.with_name(f"{folder.name}.json"))
    known = [str(each["digest"]) for each in (promoted, downloaded) if isinstance(each.get("digest"), str)]
    if isinstance(promoted.get("files"), dict):
        files = [{"name": name, **entry} for name, entry in promoted["files"].items()]
    elif isinstance(downloaded.get("files"), list):
        files = downloaded["files"]
    else:
        files = [
            {"name": path.name, "size": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(folder.glob("*"))
            if _WEIGHTS.fullmatch(path.name)
        ]
    weights = make_weights_digest(files)
    if not weights:
        raise invalid("--model", f"{folder} holds no weights", "Name a model folder in Hugging Face layout.")
    return Base((*known, weights), folder.name)


def find_adapter_base(folder: pathlib.Path, config: Mapping[str, Any]) -> Base:
    """Return the model that an adapter says it was trained on: by its provenance, beside it or above, or its config."""
    name = str(config.get("base_model_name_or_path") or "")
    for place in (folder, folder.parent):
        base = read_object(place / PROVENANCE).get("base_model")
        if isinstance(base, dict) and base.get("digest"):
            weights = make_weights_digest(base.get("files") or ())
            return Base(tuple(each for each in (str(base["digest"]), weights) if each), str(base.get("source") or name))
    # PEFT writes the path that the base was loaded from; a promoted model's folder is named by its digest.
    last = name.rstrip("/").rpartition("/")[2]
    return Base((last,) if is_digest(last) else (), name)


def make_weights_digest(files: Iterable[Mapping[str, Any]]) -> str:
    """Return the digest of a model's files of weights, given as `name`, `size`, `sha256`; empty without any."""
    listed = [each for each in files if _WEIGHTS.fullmatch(str(each.get("name")))]
    safe = [each for each in listed if str(each["name"]).endswith(".safetensors")]
    lines = sorted(f"{each['sha256']} {each['size']} {each['name']}\n" for each in safe or listed)
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""
