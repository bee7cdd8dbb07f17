"""`finetune-trainer generate`: answer a prompt, or a file of prompts, with a promoted model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.adapters.folder import require_base
from finetune_trainer.commands import plain
from finetune_trainer.data import prompts
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import ProgressBar, emit

if TYPE_CHECKING:
    from finetune_trainer.serving.generate import Generator, Sampling
    from finetune_trainer.serving.remote import ServerModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the prompt or the files, and how tokens are chosen."""
    parser.add_argument("--model", metavar="DIR", required=True, help="promoted model, or any with a chat template")
    parser.add_argument("--adapter", metavar="DIR", type=pathlib.Path, help="LoRA adapter to put on the model")
    parser.add_argument(
        "--server", metavar="URL", default="", help="endpoint on vLLM that answers --input with this very model"
    )
    parser.add_argument("--name", default="", help="the model's name there (default: the only one it has)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="what to answer, as a user would write it")
    source.add_argument(
        "--input", metavar="FILE", type=pathlib.Path, help='JSON lines: {"idx", "Instruction"} or {"messages"}'
    )
    parser.add_argument("--prompt-input", metavar="TEXT", default="", help="the input field beside the prompt (alpaca)")
    parser.add_argument(
        "--output", metavar="FILE", type=pathlib.Path, help="answers to --input; a run that was cut off goes on in it"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts answered at once (default: 8)")
    parser.add_argument(
        "--prompt-template", metavar="NAME", default="", help="alpaca, wizardlm or vicuna, for a model without one"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, always takes the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the likeliest of this probability")
    parser.add_argument("--top-k", type=int, default=0, help="choose among so many; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer alone")


def run(args: argparse.Namespace) -> int:
    """Print the answer, or write the answers."""
    _check(args)
    plain.prepare_libraries()

    from finetune_trainer.serving.generate import Generator, Sampling

    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed)
    if args.input is not None:
        return _answer_file(args, sampling)
    generator = Generator(pathlib.Path(args.model), args.adapter)
    _choose_template(generator, args)
    message = {"role": "user", "content": args.prompt}
    if args.prompt_input:
        message["input"] = args.prompt_input
    answer = generator.answer([message], args.max_new_tokens, sampling)
    print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False) if args.json else answer.text)
    return ExitCode.OK


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded."""
    for option in ("model", "adapter"):
        folder = getattr(args, option)
        if folder is not None and not pathlib.Path(folder).is_dir():
            message = f"--{option} {folder}: no such folder"
            hint = "Name a promoted model." if option == "model" else "Name the folder of a LoRA adapter."
            raise TrainerError(Reason.MODEL_NOT_FOUND, ExitCode.NO_INPUT, message, hint)
    wrong = [
        (args.input is not None and args.output is None, "--input without --output", "Add --output FILE."),
        (args.input is None and args.output is not None, "--output without --input", "Add --input FILE."),
        (args.temperature < 0, "--temperature: below 0", "Use 0 for the likeliest token, 0.7 for some variety."),
        (not 0 < args.top_p <= 1, "--top-p: not above 0 and at most 1", "Use 1 to choose among all tokens."),
        (args.top_k < 0, "--top-k: below 0", "Use 0 to choose among all tokens."),
        (args.batch_size < 1, "--batch-size: below 1", "Use 1 or more."),
        (args.max_new_tokens < 1, "--max-new-tokens: below 1", "Use 1 or more."),
    ]
    for is_wrong, message, hint in wrong:
        if is_wrong:
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)
    if args.server or args.name:
        _check_server(args)
    if args.adapter is not None:
        require_base(args.adapter, pathlib.Path(args.model), f"--adapter {args.adapter}")


def _check_server(args: argparse.Namespace) -> None:
    """Refuse what a server cannot be asked for."""
    wrong = [
        (not args.server, "--name without --server", "Add --server URL."),
        (not args.server.startswith(("http://", "https://")), "--server: no URL", "Write it as http://HOST:PORT."),
        (args.input is None, "--server without --input", "Add --input FILE and --output FILE."),
        (args.adapter is not None, "--adapter beside --server", "Name what the server calls it by --name instead."),
    ]
    for is_wrong, message, hint in wrong:
        if is_wrong:
            raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, hint)


def _answer_file(args: argparse.Namespace, sampling: Sampling) -> int:
    from finetune_trainer.serving import batch
    from finetune_trainer.serving.generate import Generator
    from finetune_trainer.serving.remote import ServerModel

    rows = batch.read_prompts(args.input)
    request = batch.Request(sampling, args.max_new_tokens, args.batch_size)
    folder = pathlib.Path(args.model)
    generator = ServerModel(folder, args.server, args.name) if args.server else Generator(folder, args.adapter)
    _choose_template(generator, args)
    output = batch.Output(args.output, request, _describe(args, generator))
    with ProgressBar("answering", len(rows)) as bar:
        counts = batch.answer_file(generator, rows, request, output, bar.advance)
    emit("answered", rows=len(rows), **{name.replace("-", "_"): number for name, number in counts.items()})
    if args.json:
        print(json.dumps({"rows": len(rows), **counts}))
    return ExitCode.OK


def _describe(args: argparse.Namespace, generator: Generator | ServerModel) -> dict[str, Any]:
    """Return what decides the answers besides the request: the models and the prompts by content."""
    from finetune_trainer.serving.remote import ServerModel
    from finetune_trainer.storage.transfer import hash_file

    weights = [
        path
        for folder in (args.model, args.adapter)
        if folder is not None
        for path in sorted(pathlib.Path(folder).glob("*.safetensors"))
    ]
    return {
        "input": hash_file(args.input),
        "weights": {path.name: hash_file(path) for path in weights},
        "template": str(generator.tokenizer.chat_template),
        # Over the same model a server may have adapters, each under a name.
        **({"served": generator.name} if isinstance(generator, ServerModel) else {}),
    }


def _choose_template(generator: Generator | ServerModel, args: argparse.Namespace) -> None:
    if args.prompt_template:
        adds_bos = bool(prompts.begin_ids(generator.tokenizer))
        generator.tokenizer.chat_template = prompts.build_chat_template(args.prompt_template, adds_bos=adds_bos)
    if not generator.tokenizer.chat_template:
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"--model {args.model}: the tokenizer has no chat template, so the prompt's form is unknown",
            "Name a promoted model, or say --prompt-template alpaca, wizardlm or vicuna.",
        )
