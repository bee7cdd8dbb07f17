"""`finetune-trainer adapters`: look into LoRA adapters, and compose several over one base into one."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import argparse

    from finetune_trainer.adapters.compose import Part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    from finetune_trainer.adapters.compose import METHODS

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="tell what adapters hold", description="Tell what adapters hold.")
    inspect.add_argument("folders", metavar="DIR", nargs="+", type=pathlib.Path, help="adapter or promoted model")
    compose = actions.add_parser(
        "compose", help="make one adapter of several", description="Make one adapter of several, in this order."
    )
    compose.add_argument(
        "--adapter", metavar="DIR[=WEIGHT]", action="append", required=True, help="a part; its weight is 1 by default"
    )
    compose.add_argument("--out", metavar="DIR", type=pathlib.Path, required=True, help="folder to write; new")
    compose.add_argument(
        "--method",
        choices=METHODS,
        default="concatenate",
        help="concatenate and svd are exact at the summed rank; the others are lossy (default: concatenate)",
    )
    compose.add_argument("--rank", type=int, default=0, help="largest rank of the result (default: the parts' sum)")
    compose.add_argument("--density", type=float, default=0.5, help="share that ties and dare keep (default: 0.5)")
    compose.add_argument("--seed", type=int, default=0, help="seed of dare")
    for action in (inspect, compose):
        action.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect or compose."""
    facts = _inspect(args) if args.action == "inspect" else _compose(args)
    if args.json:
        print(json.dumps(facts))
    else:
        print("\n\n".join(_format(one) for one in facts) if isinstance(facts, list) else _format(facts))
    return ExitCode.OK


def _inspect(args: argparse.Namespace) -> list[dict[str, Any]]:
    from finetune_trainer.adapters.folder import read_adapter

    return [_describe(read_adapter(folder)) for folder in args.folders]


def _describe(adapter: Any) -> dict[str, Any]:
    modules = adapter.modules
    return {
        "path": str(adapter.folder),
        "digest": adapter.digest,
        "base": adapter.base,
        "rank": adapter.rank,
        "modules": len(modules),
        "targets": sorted({name.rpartition(".")[2] for name in modules}),
        "parameters": sum(module.first.numel() + module.second.numel() for module in modules.values()),
        "dtype": str(next(iter(modules.values())).first.dtype).removeprefix("torch."),
        "modulesWithoutEffect": sorted(name for name, module in modules.items() if not module.second.any()),
    }


def _compose(args: argparse.Namespace) -> dict[str, Any]:
    from finetune_trainer.adapters.compose import Settings, compose
    from finetune_trainer.adapters.profile import write_composition
    from finetune_trainer.weight_diff.tensors import invalid

    if args.out.exists():
        raise invalid("--out", f"{args.out} exists", "Name a folder that does not exist yet.")
    if args.rank < 0 or not 0 < args.density <= 1:
        message = f"--rank {args.rank}, --density {args.density}"
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.USAGE, message, "A rank is not negative, a density above 0 and at most 1."
        )
    parts = [_read_part(text) for text in args.adapter]
    settings = Settings(args.method, args.rank, args.density, args.seed)
    profile = write_composition(args.out, parts, settings, compose(parts, settings))
    profile.pop("errors")
    return profile


def _read_part(text: str) -> Part:
    from finetune_trainer.adapters.compose import Part
    from finetune_trainer.adapters.folder import read_adapter

    folder, separator, weight = text.rpartition("=")
    try:
        return Part(read_adapter(pathlib.Path(folder if separator else text)), float(weight) if separator else 1.0)
    except ValueError as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.USAGE,
            f"--adapter {text}: {weight!r} is no weight",
            "Write --adapter DIR=0.7.",
        ) from error


def _format(facts: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())
