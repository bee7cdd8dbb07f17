"""`finetune-trainer adapters measure`: a composition beside its base and each part alone, on plain files."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.commands import plain
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import write_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from finetune_trainer.adapters.compose import Part
    from finetune_trainer.adapters.profile import Profile
    from finetune_trainer.training.tokens import TokenizedRows

MAX_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is measured, on what, and where the result goes; the parts are added by the caller."""
    parser.add_argument(
        "--model", metavar="DIR", type=pathlib.Path, required=True, help="their base, in Hugging Face layout"
    )
    parser.add_argument(
        "--data", metavar="PATH", type=pathlib.Path, help="prepared data with holdout.jsonl, or a file of such rows"
    )
    parser.add_argument(
        "--prompt-template", metavar="NAME", default="", help="that of the rows (default: the model's chat template)"
    )
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, metavar="N", help="longest row, in tokens")
    parser.add_argument("--task", metavar="NAME", action="append", default=[], help="lm-eval task; may be repeated")
    parser.add_argument(
        "--refusals", action="store_true", help="also ask what may be answered, and count who refuses or hedges"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="examples per task, and prompts per set (default: all)"
    )
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="folder for composition and measurement; new")


def run(args: argparse.Namespace, profile: Profile, parts: list[Part], expected: str) -> dict[str, Any]:
    """Compose where nothing is composed yet, measure, and return what `measurement.json` says."""
    if args.data is None and not args.task and not args.refusals:
        raise _usage("nothing to measure on", "Add --data DIR with held-out rows, --task NAME, --refusals, or several.")
    if any(not name.endswith((".yaml", ".yml")) for name in args.task):
        # Named tasks read their data from the hub or its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    plain.prepare_libraries()
    from finetune_trainer.adapters import measure as measuring
    from finetune_trainer.adapters.composition import check_base
    from finetune_trainer.adapters.folder import read_adapter
    from finetune_trainer.training import modeling

    check_base(parts, profile, args.model)
    tokenizer = modeling.load_tokenizer(args.model)
    rows = _read_rows(args, tokenizer) if args.data is not None else None
    with _composed(args, profile, parts, expected) as folder:
        sides = measuring.load_sides(args.model, folder, profile, parts)
        tasks = measuring.Tasks(args.task, args.limit, pathlib.Path())
        questions = measuring.Questions(_choose_template(args, tokenizer), args.limit) if args.refusals else None
        measurement = measuring.measure(sides, tokenizer, rows, tasks, questions)
        facts = measurement.to_dict(profile, read_adapter(folder).digest)
        write_json(folder / measuring.NAME, facts)
    print(json.dumps(facts) if args.json else measuring.format_table(measurement))
    return facts


@contextlib.contextmanager
def _composed(args: argparse.Namespace, profile: Profile, parts: list[Part], expected: str) -> Iterator[pathlib.Path]:
    """Yield the folder of the composed adapter: the one beside its composition.json, or a new one."""
    from finetune_trainer.adapters.composition import PROFILE, write_composition
    from finetune_trainer.adapters.folder import read_adapter

    if args.out is None and args.profile is not None and args.profile.name == PROFILE and expected:
        found = read_adapter(args.profile.parent).digest
        if found != expected:
            message = f"--profile {args.profile}: the adapter beside it has digest {found}, expected {expected}"
            hint = "Compose it again: finetune-trainer adapters compose --profile FILE --out DIR."
            raise TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, message, hint)
        yield args.profile.parent
    elif args.out is not None:
        write_composition(args.out, profile, parts, expected)
        yield args.out
    else:
        with tempfile.TemporaryDirectory(prefix="adapters-") as folder:
            write_composition(pathlib.Path(folder) / "composed", profile, parts, expected)
            yield pathlib.Path(folder) / "composed"


def _choose_template(args: argparse.Namespace, tokenizer: Any) -> str:
    from finetune_trainer.data.prompts import TOKENIZER_TEMPLATE

    template: str = args.prompt_template or TOKENIZER_TEMPLATE
    if template == TOKENIZER_TEMPLATE and not tokenizer.chat_template:
        message = f"--model {args.model}: the tokenizer has no chat template, so the prompt's form is unknown"
        raise _usage(message, "Name the rows' prompt: --prompt-template alpaca, wizardlm or vicuna.")
    return template


def _read_rows(args: argparse.Namespace, tokenizer: Any) -> TokenizedRows:
    from finetune_trainer.training import modeling, tokens

    template = _choose_template(args, tokenizer)
    path = args.data / "holdout.jsonl" if args.data.is_dir() else args.data
    max_length = min(args.max_length, modeling.limit_length(modeling.read_config(args.model)))
    rows = tokens.tokenize(tokens.read_conversations(path), template, tokenizer, max_length)
    if not rows.rows:
        raise TrainerError(
            Reason.EVALUATION_FAILED, ExitCode.DATA, f"--data {path}: no row has an answer", "Name other rows."
        )
    return rows


def _usage(message: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)
