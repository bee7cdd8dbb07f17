"""The program `finetune-trainer`: one subcommand per phase, and the tools people use on plain files.

A subcommand lives in `commands/<name>.py` with `add_arguments(parser)` and `run(args) -> int`. Only the module of the
command that was asked for is imported, so that `--help` and `prepare` start without torch. This module owns how a
command ends: whatever is raised becomes an exit report and an exit code.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer import reporting
from finetune_trainer.errors import StopRequested, TrainerError, as_trainer_error, redact

if TYPE_CHECKING:
    import types
    from collections.abc import Sequence

COMMANDS = {
    "inspect": "read sizes and headers of the model and the data, for the plan",
    "prepare": "download the model and the data, filter the data, split it, and write a report",
    "lint-phrases": "say what is wrong with a list of phrases, and what each line does to rows of one's own",
    "judge": "train a judge of the data on rows that you have labelled",
    "train": "fine-tune the model with DeepSpeed, from the newest complete checkpoint if there is one",
    "promote": "turn a checkpoint into a model that is verified to be whole",
    "evaluate": "score a model on held-out rows and lm-eval tasks, beside its base",
    "report": "write what came of a run as a page, as JSON and as a model card, from the files it has left",
    "publish": "copy the promoted model to its destinations",
    "compose": "compose a job's adapters over the promoted model, and measure what comes of it",
    "serve": "answer OpenAI-compatible requests with a model",
    "generate": "answer prompts from a file or the command line with a model",
    "adapters": "look into LoRA adapters, compose several over one base into one, and measure what comes of it",
    "weight-diff": "make, apply and verify the difference of a tuned model from its base, exact to the bit",
    "checkpoints": "tell which checkpoints are whole, plan their room, prune and repair them; those of any Trainer",
}
"""Every subcommand and its line in `--help`."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors carry the exit code that the operator knows."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen command's module is imported to add its arguments."""
    parser = _Parser(prog="finetune-trainer", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="log debugging lines too")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary.capitalize() + ".")
        if name == chosen:
            module = _import_command(name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def _import_command(name: str) -> types.ModuleType:
    return importlib.import_module(f"finetune_trainer.commands.{name.replace('-', '_')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if word in COMMANDS), None)
    args = build_parser(chosen).parse_args(arguments)
    reporting.configure_logging(args.verbose)
    # As process 1 of a container SIGTERM would be ignored without a handler.
    previous = signal.signal(signal.SIGTERM, _raise_stop)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return ExitCode.OK
    except (Exception, StopRequested) as error:
        return _report_failure(args, error)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_stop(_number: int, _frame: types.FrameType | None) -> None:
    raise StopRequested


def _report_failure(args: argparse.Namespace, error: BaseException) -> int:
    failure = as_trainer_error(error)
    # A traceback helps only where the message does not: errors that nobody foresaw.
    unforeseen = failure.reason is Reason.USER_CODE_ERROR and not isinstance(error, TrainerError)
    text = f"{failure.reason}: {failure.message}"
    if failure.hint:
        text += f" | {failure.hint}"
    reporting.logger.error(redact(text), exc_info=error if unforeseen else None)
    if args.command in set(Phase):
        report = ExitReport(
            phase=args.command,
            reason=failure.reason,
            message=failure.message,
            exit_code=failure.exit_code,
            hint=failure.hint,
            rank=failure.rank,
            details=failure.details,
        )
        reporting.write_exit_report(report, _workspace(args, failure))
    return int(failure.exit_code)


def _workspace(args: argparse.Namespace, failure: TrainerError) -> Workspace | None:
    """Return the workspace to leave the report in, unless there is none or it is another job's."""
    root = getattr(args, "workspace_root", None)
    if root is None or failure.details.get("workspace_locked"):
        return None
    return Workspace(pathlib.Path(root))


if __name__ == "__main__":
    sys.exit(main())
