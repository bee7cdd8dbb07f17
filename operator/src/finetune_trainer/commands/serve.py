"""`finetune-trainer serve`: answer OpenAI-compatible requests with a promoted model, on CPUs or one GPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import time

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import BASE_SUFFIX, RunConfig
from finetune_trainer.commands import plain
from finetune_trainer.errors import StopRequested, TrainerError
from finetune_trainer.promotion import promoted
from finetune_trainer.promotion.copied import fetch_copy
from finetune_trainer.reporting import emit

DOWNLOADS = pathlib.Path("/tmp/models")
"""Where a model is put that is read from object storage; in a pod it lives as long as that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a server in a pod and of one on plain files."""
    plain.add_arguments(parser)
    parser.add_argument("--promoted", metavar="DIR", help="model to serve (default: the promoted one)")
    parser.add_argument(
        "--adapter", metavar="DIR", type=pathlib.Path, help="LoRA adapter on it; the model alone answers as NAME-base"
    )
    parser.add_argument("--name", help="model name in requests (default: the job's endpoint, or the folder's name)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")


@dataclasses.dataclass(frozen=True)
class _Served:
    """What is served, and how."""

    promoted: pathlib.Path
    model: pathlib.Path
    """Folder of the weights: the promoted model's own, or the base of a LoRA job where adapters go onto that."""
    adapter: pathlib.Path | None
    version: str
    name: str
    port: int
    trust_remote_code: bool = False


def run(args: argparse.Namespace) -> int:
    """Serve until asked to stop."""
    started = time.monotonic()
    served = _choose(args)
    plain.prepare_libraries()

    from finetune_trainer.serving.generate import Generator
    from finetune_trainer.serving.server import serve

    emit("stack imported", seconds=round(time.monotonic() - started, 2))
    promoted_folder = served.promoted if served.adapter is not None else None
    base = Generator(served.model, trust_remote_code=served.trust_remote_code, promoted=promoted_folder)
    generators = {served.name: base}
    if served.adapter is not None:
        generators = {served.name: base.share_with_adapter(served.adapter), f"{served.name}{BASE_SUFFIX}": base}
    emit("serving", models=" ".join(generators), folder=str(served.model), version=served.version, port=served.port)
    with contextlib.suppress(StopRequested):
        serve(generators, served.port, served.version)
    return ExitCode.OK


def _choose(args: argparse.Namespace) -> _Served:
    """Return what to serve, from the flags or the run's settings."""
    if args.promoted:
        folder = pathlib.Path(args.promoted)
        digest = str(promoted.read_manifest(folder)["digest"])
        if args.adapter is None:
            return _Served(folder, folder, None, digest, args.name or folder.name, args.port or 8000)
        from finetune_trainer.adapters.folder import read_adapter

        adapter = read_adapter(args.adapter)
        version = f"{digest}.{adapter.digest[:32]}"
        return _Served(folder, folder, adapter.folder, version, args.name or folder.name, args.port or 8000)
    if args.adapter is not None:
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, "--adapter without --promoted", "Add --promoted DIR.")
    settings: RunConfig = plain.load_settings(args)
    # Before anything is imported that takes seconds: a folder that is damaged is told of at once.
    folder = fetch_copy(settings, DOWNLOADS) if settings.serving.source else promoted.find_promoted(settings)
    model, adapter_folder = folder, None
    if settings.composition.digest:
        from finetune_trainer.adapters.job import find_served

        model, adapter_folder = find_served(settings)
    version = str(promoted.read_manifest(folder)["digest"])
    version += f".{settings.composition.digest}" if adapter_folder is not None else ""
    name = args.name or settings.serving.model_name or folder.name
    port = args.port or settings.serving.port
    return _Served(folder, model, adapter_folder, version, name, port, settings.trust_remote_code)
