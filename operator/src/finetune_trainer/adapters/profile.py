"""A profile: which adapters are composed over which base, with which weights, by which method. No torch.

A profile is a YAML file, kept in Git like jobs, with comments where they help; JSON is YAML, so that the
`composition.json` beside a composed adapter is a profile, too:

    version: 1
    base: 3f2a...             # a digest of the base model, as `adapters inspect` prints it
    method: concatenate       # and where they are not the defaults: rank, density, seed
    adapters:
      - name: polite
        source: adapters/polite   # beside this file, or hf://, s3://, https://
        digest: 9c01...           # what the source has to hold
        weight: 1

What is composed and what it is called decide its digest; where the parts lie does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import yaml

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.adapters.base import is_digest
from finetune_trainer.adapters.compose import LOSSY, METHODS, Settings
from finetune_trainer.errors import TrainerError, first_line

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Mapping

VERSION = 1
COMPOSITION = "composition"
"""Key of what a composition adds to its profile: the results; and what it is called where it is measured."""
BASE = "base"
"""What the model without adapters is called where a composition is measured."""
_KEYS = {"version", "base", "method", "rank", "density", "seed", "adapters", COMPOSITION}
_ENTRY_KEYS = {"name", "source", "revision", "digest", "weight"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One adapter of a profile."""

    name: str
    source: str
    """Path, in a file relative to it, or URL."""
    digest: str
    """Of the adapter; empty: whatever the source holds."""
    weight: float = 1.0
    revision: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What is composed."""

    base: str
    """A digest of the base model; empty when nobody knows it."""
    entries: tuple[Entry, ...]
    settings: Settings

    @property
    def digest(self) -> str:
        """Digest of everything that decides the composed adapter and its name; 32 hexadecimal digits."""
        settings: dict[str, Any] = {"method": self.settings.method, "rank": self.settings.rank}
        if self.settings.method in LOSSY and self.settings.method != "linear":
            settings |= {"density": self.settings.density, "seed": self.settings.seed}
        parts = [[entry.name, entry.digest, entry.weight] for entry in self.entries]
        facts = {"version": VERSION, "base": self.base, **settings, "adapters": parts}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def name(self) -> str:
        """What the composition is called: `polite+brief`."""
        return "+".join(entry.name for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the profile as it stands in a file."""
        entries = [
            {name: value for name, value in dataclasses.asdict(entry).items() if value != ""} for entry in self.entries
        ]
        return {"version": VERSION, "base": self.base, **dataclasses.asdict(self.settings), "adapters": entries}


def read_profile(path: pathlib.Path) -> tuple[Profile, dict[str, Any]]:
    """Return a profile and the results that a composition has written to it, if it has. Raises TrainerError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _refuse(path, f"cannot be read: {first_line(error)}", "Name a profile in YAML or JSON.") from error
    if not isinstance(data, dict):
        raise _refuse(path, "holds no profile", "Write version, base, method and adapters.")
    _check_keys(path, "", data, _KEYS)
    if data.get("version") != VERSION:
        raise _refuse(path, f"version: {data.get('version')!r}", f"This release reads version {VERSION}.")
    base = data.get("base")
    if not isinstance(base, str) or not is_digest(base):
        hint = "Write the digest that `finetune-trainer adapters inspect MODEL` prints as base."
        raise _refuse(path, f"base: {base!r} is no digest of a model", hint)
    entries = data.get("adapters")
    if not isinstance(entries, list) or not entries:
        raise _refuse(path, "adapters: no list of adapters", "Write at least one, with name, source and digest.")
    parsed = tuple(_parse_entry(path, index, entry) for index, entry in enumerate(entries))
    names = [entry.name for entry in parsed]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise _refuse(path, f"adapters: {twice} stands there twice", "Give every adapter a name of its own.")
    if taken := next((name for name in names if name in (BASE, COMPOSITION)), ""):
        raise _refuse(path, f"adapters: the name {taken} stands for something else", "Give it another name.")
    results = data.get(COMPOSITION)
    return Profile(base, parsed, _parse_settings(path, data)), results if isinstance(results, dict) else {}


def check_settings(settings: Settings, label: str) -> None:
    """Raise TrainerError, beginning with `label`, for settings that no method takes."""
    if settings.method not in METHODS:
        hint = f"Use one of {', '.join(METHODS)}."
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.USAGE, f"{label}method: {settings.method!r} is not known", hint
        )
    if settings.rank < 0 or not 0 < settings.density <= 1:
        message = f"{label}rank {settings.rank}, density {settings.density}"
        hint = "A rank is not negative, a density above 0 and at most 1."
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)


def _parse_settings(path: pathlib.Path, data: Mapping[str, Any]) -> Settings:
    given = {}
    for field, kinds in (("method", (str,)), ("rank", (int,)), ("density", (int, float)), ("seed", (int,))):
        if field not in data:
            continue
        if not isinstance(data[field], kinds) or isinstance(data[field], bool):
            hint = f"Write a {'text' if str in kinds else 'number'}."
            raise _refuse(path, f"{field}: {data[field]!r}", hint)
        given[field] = data[field]
    settings = Settings(**given)
    check_settings(settings, f"--profile {path}: ")
    return settings


def _parse_entry(path: pathlib.Path, index: int, data: Any) -> Entry:
    where = f"adapters[{index}]"
    if not isinstance(data, dict):
        raise _refuse(path, f"{where}: {data!r}", "Write name, source and digest.")
    _check_keys(path, f"{where}.", data, _ENTRY_KEYS)
    for field in ("name", "source", "digest"):
        if not isinstance(data.get(field), str) or not data[field]:
            hint = "Write it; `finetune-trainer adapters inspect DIR` prints an adapter's digest."
            raise _refuse(path, f"{where}.{field}: missing or no text", hint)
    weight = data.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise _refuse(path, f"{where}.weight: {weight!r} is no weight", "Write a number, as in 0.7.")
    return Entry(data["name"], data["source"], data["digest"], float(weight), str(data.get("revision") or ""))


def _check_keys(path: pathlib.Path, where: str, data: Mapping[Any, Any], known: set[str]) -> None:
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise _refuse(path, f"{where}{unknown[0]}: unknown", f"Known are {', '.join(sorted(known))}.")


def _refuse(path: pathlib.Path, why: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, f"--profile {path}: {why}", hint)
