"""`finetune-trainer generate`: answer a prompt with a promoted model, greedily."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.commands import plain
from finetune_trainer.data import prompts
from finetune_trainer.errors import TrainerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the prompt and the form of the output."""
    parser.add_argument("--model", metavar="DIR", required=True, help="promoted model, or any with a chat template")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to answer, as a user would write it")
    parser.add_argument("--prompt-input", metavar="TEXT", default="", help="the input field beside the prompt (alpaca)")
    parser.add_argument(
        "--prompt-template", metavar="NAME", default="", help="alpaca, wizardlm or vicuna, for a model without one"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer alone")


def run(args: argparse.Namespace) -> int:
    """Print the answer."""
    folder = pathlib.Path(args.model)
    if not folder.is_dir():
        raise TrainerError(
            Reason.MODEL_NOT_FOUND, ExitCode.NO_INPUT, f"--model {folder}: no such folder", "Name a promoted model."
        )
    plain.prepare_libraries()

    from finetune_trainer.serving.generate import Generator

    message = {"role": "user", "content": args.prompt}
    if args.prompt_input:
        message["input"] = args.prompt_input
    generator = Generator(folder)
    if args.prompt_template:
        adds_bos = bool(prompts.begin_ids(generator.tokenizer))
        generator.tokenizer.chat_template = prompts.build_chat_template(args.prompt_template, adds_bos=adds_bos)
    if not generator.tokenizer.chat_template:
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"--model {folder}: the tokenizer has no chat template, so the prompt's form is unknown",
            "Name a promoted model, or say --prompt-template alpaca, wizardlm or vicuna.",
        )
    answer = generator.answer([message], args.max_new_tokens)
    print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) if args.json else answer.text)
    return ExitCode.OK
