"""`finetune-trainer adapters`: look into LoRA adapters and their bases, compose several into one, and measure that."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.commands import adapters_measure
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from finetune_trainer.adapters.compose import Part
    from finetune_trainer.adapters.profile import Profile

_SETTINGS = ("method", "rank", "density", "seed")
"""Options that a profile stands for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="tell what adapters hold", description="Tell what adapters hold.")
    inspect.add_argument(
        "folders", metavar="DIR", nargs="+", type=pathlib.Path, help="adapter, promoted model, or base model"
    )
    compose = actions.add_parser(
        "compose", help="make one adapter of several", description="Make one adapter of several, in this order."
    )
    _add_parts(compose)
    compose.add_argument(
        "--model", metavar="DIR", type=pathlib.Path, help="their base: checked, and named in the result"
    )
    compose.add_argument("--out", metavar="DIR", type=pathlib.Path, required=True, help="folder to write; new")
    _add_settings(compose)
    measure = actions.add_parser(
        "measure",
        help="measure a composition beside its base and each part alone",
        description="Measure a composition beside its base and each part alone.",
    )
    _add_parts(measure)
    adapters_measure.add_arguments(measure)
    _add_settings(measure)
    for action in (inspect, compose, measure):
        action.add_argument("--json", action="store_true", help="print JSON")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    from finetune_trainer.adapters.compose import METHODS

    parser.add_argument(
        "--method",
        choices=METHODS,
        help="concatenate and svd are exact at the summed rank; the others are lossy (default: concatenate)",
    )
    parser.add_argument("--rank", type=int, help="largest rank of the result (default: the parts' sum)")
    parser.add_argument("--density", type=float, help="share that ties and dare keep (default: 0.5)")
    parser.add_argument("--seed", type=int, help="seed of dare (default: 0)")


def _add_parts(parser: argparse.ArgumentParser) -> None:
    parts = parser.add_mutually_exclusive_group(required=True)
    parts.add_argument("--adapter", metavar="DIR[=WEIGHT]", action="append", help="a part; its weight is 1 by default")
    parts.add_argument(
        "--profile", metavar="FILE", type=pathlib.Path, help="profile (YAML), or composition.json of an earlier run"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect, compose or measure."""
    if args.action == "measure":
        with _reading(args) as (profile, parts, expected):
            adapters_measure.run(args, profile, parts, expected)
        return ExitCode.OK
    facts = _inspect(args) if args.action == "inspect" else _compose(args)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n\n".join(_format(one) for one in facts) if isinstance(facts, list) else _format(facts))
    return ExitCode.OK


def _inspect(args: argparse.Namespace) -> list[dict[str, Any]]:
    from finetune_trainer.adapters.base import read_model_base
    from finetune_trainer.adapters.folder import CONFIG, read_adapter

    facts: list[dict[str, Any]] = []
    for folder in args.folders:
        has_adapter = (folder / CONFIG).is_file() or (folder / "adapter" / CONFIG).is_file()
        if not has_adapter and (folder / "config.json").is_file():
            facts.append({"path": str(folder), "base": read_model_base(folder).digests[0]})
        else:
            facts.append(_describe(read_adapter(folder)))
    return facts


def _describe(adapter: Any) -> dict[str, Any]:
    modules = adapter.modules
    return {
        "path": str(adapter.folder),
        "digest": adapter.digest,
        "base": adapter.base.label,
        "rank": adapter.rank,
        "modules": len(modules),
        "targets": sorted({name.rpartition(".")[2] for name in modules}),
        "parameters": sum(module.first.numel() + module.second.numel() for module in modules.values()),
        "dtype": str(next(iter(modules.values())).first.dtype).removeprefix("torch."),
        "modulesWithoutEffect": sorted(name for name, module in modules.items() if not module.second.any()),
    }


def _compose(args: argparse.Namespace) -> dict[str, Any]:
    from finetune_trainer.adapters.composition import check_base, write_composition
    from finetune_trainer.adapters.profile import COMPOSITION
    from finetune_trainer.weight_diff.tensors import invalid

    if args.out.exists():
        raise invalid("--out", f"{args.out} exists", "Name a folder that does not exist yet.")
    with _reading(args) as (profile, parts, expected):
        check_base(parts, profile, args.model)
        facts = write_composition(args.out, profile, parts, expected)
    results: dict[str, Any] = facts.pop(COMPOSITION)
    results.pop("errors")
    return {**facts, **results}


@contextlib.contextmanager
def _reading(args: argparse.Namespace) -> Iterator[tuple[Profile, list[Part], str]]:
    """Yield the profile, its adapters, and the digest that their composition has to have, if one is known."""
    from finetune_trainer.adapters.composition import read_parts

    with tempfile.TemporaryDirectory(prefix="adapters-") as downloads:
        if args.profile is None:
            yield (*_read_flags(args), "")
        else:
            _refuse_beside_profile(args)
            yield read_parts(args.profile, pathlib.Path(downloads))


def _read_flags(args: argparse.Namespace) -> tuple[Profile, list[Part]]:
    from finetune_trainer.adapters.base import read_model_base
    from finetune_trainer.adapters.compose import Settings
    from finetune_trainer.adapters.composition import make_profile
    from finetune_trainer.adapters.profile import check_settings

    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    settings = Settings(**given)
    check_settings(settings, "--")
    parts = [_read_part(text) for text in args.adapter]
    names = [_split(text)[0].name or part.adapter.folder.name for text, part in zip(args.adapter, parts, strict=True)]
    base = read_model_base(args.model).digests[0] if args.model is not None else ""
    return make_profile(parts, settings, names, base), parts


def _refuse_beside_profile(args: argparse.Namespace) -> None:
    for name in _SETTINGS:
        if getattr(args, name) is not None:
            message = f"--{name} beside --profile"
            hint = f"Write {name} in the profile, whose digest it is part of."
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)


def _read_part(text: str) -> Part:
    from finetune_trainer.adapters.compose import Part
    from finetune_trainer.adapters.folder import read_adapter

    folder, weight = _split(text)
    return Part(read_adapter(folder), weight)


def _split(text: str) -> tuple[pathlib.Path, float]:
    """Return folder and weight of `DIR=WEIGHT`."""
    folder, separator, weight = text.rpartition("=")
    try:
        return pathlib.Path(folder if separator else text), float(weight) if separator else 1.0
    except ValueError as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.USAGE,
            f"--adapter {text}: {weight!r} is no weight",
            "Write --adapter DIR=0.7.",
        ) from error


def _format(facts: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
