"""`finetune-trainer serve`: answer OpenAI-compatible requests with a promoted model, on CPUs or one GPU."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import time

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import RunConfig
from finetune_trainer.commands import plain
from finetune_trainer.errors import StopRequested
from finetune_trainer.promotion import promoted
from finetune_trainer.reporting import emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a server in a pod and of one on plain files."""
    plain.add_arguments(parser)
    parser.add_argument("--promoted", metavar="DIR", help="model to serve (default: the promoted one)")
    parser.add_argument("--name", help="model name in requests (default: the job's endpoint, or the folder's name)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")


def run(args: argparse.Namespace) -> int:
    """Serve until asked to stop."""
    started = time.monotonic()
    folder, name, port, trust = _choose(args)
    digest = str(promoted.read_manifest(folder)["digest"])
    plain.prepare_libraries()

    from finetune_trainer.serving.generate import Generator
    from finetune_trainer.serving.server import serve

    emit("stack imported", seconds=round(time.monotonic() - started, 2))
    generator = Generator(folder, trust_remote_code=trust)
    emit("serving", model=name, folder=str(folder), port=port)
    with contextlib.suppress(StopRequested):
        serve(name, generator, port, digest)
    return ExitCode.OK


def _choose(args: argparse.Namespace) -> tuple[pathlib.Path, str, int, bool]:
    """Return the folder, the name, the port and whether its code is trusted, from the flags or the run's settings."""
    if args.promoted:
        folder = pathlib.Path(args.promoted)
        promoted.read_manifest(folder)
        return folder, args.name or folder.name, args.port or 8000, False
    settings: RunConfig = plain.load_settings(args)
    from finetune_trainer.evaluation.evaluate import find_promoted

    folder = find_promoted(settings)
    name = args.name or settings.serving.model_name or folder.name
    return folder, name, args.port or settings.serving.port, settings.trust_remote_code
