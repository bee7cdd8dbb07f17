"""One composed adapter beside the same adapters live on the model: `make bench-compose`.

Outputs are logits in 32 bits of a random Llama; the parts have ranks 16, 8 and 8, weights 1, 0.7 and -0.35. A method's
difference is the largest of any logit, relative to the largest logit of the live stack.
"""

from __future__ import annotations

import pathlib
import resource
import sys
import tempfile
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_trainer.adapters.compose import METHODS, Part, Settings
from finetune_trainer.adapters.composition import make_profile, write_composition
from finetune_trainer.adapters.folder import read_adapter
from finetune_trainer.adapters.profile import COMPOSITION
from tests.bench.results import Result, write_results

WEIGHTS = (1.0, 0.7, -0.35)
RANKS = (16, 8, 8)
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
_LIVE = "live stacking"


def main() -> int:
    """Compose by every method, compare outputs, and write the results."""
    with tempfile.TemporaryDirectory(prefix="bench-compose-") as name:
        root = pathlib.Path(name)
        equal = _write_adapters(root / "equal", (8, 8, 8))
        folders = _write_adapters(root / "parts", RANKS)
        results = []
        for method in METHODS:
            # Linear takes equal ranks only.
            results += _measure(root, equal if method == "linear" else folders, method)
        results.append(_measure_memory())
    write_results("compose", results)
    return 0


def _build_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, **_SHAPE)).eval()


def _write_adapters(root: pathlib.Path, ranks: tuple[int, ...]) -> list[pathlib.Path]:
    folders = []
    for index, rank in enumerate(ranks):
        model = get_peft_model(_build_base(), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS))
        torch.manual_seed(index + 1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        folders.append(root / f"part-{index}")
        model.save_pretrained(folders[-1])
    return folders


def _measure(root: pathlib.Path, folders: list[pathlib.Path], method: str) -> list[Result]:
    stacked, live_seconds = _answer(_stack(folders))
    started = time.monotonic()
    parts = [Part(read_adapter(folder), weight) for folder, weight in zip(folders, WEIGHTS, strict=True)]
    settings = Settings(method, rank=0 if method in ("concatenate", "linear") else 32, seed=1)
    out = root / f"composed-{method}"
    profile = make_profile(parts, settings, [folder.name for folder in folders])
    largest_error = write_composition(out, profile, parts)[COMPOSITION]["largestError"]
    seconds = time.monotonic() - started
    composed, one_seconds = _answer(PeftModel.from_pretrained(_build_base(), out))
    difference = ((composed - stacked).abs().max() / stacked.abs().max()).item()
    name = method.replace("-", "_")
    headline = "max_difference" if method == "concatenate" else f"max_difference_{name}"
    return [
        Result(headline, difference, "relative to the largest logit"),
        Result(f"largest_error_{name}", largest_error, "of a module's product, relative"),
        Result(f"compose_seconds_{name}", seconds, "s"),
        Result(f"forward_seconds_{name}", one_seconds, "s", _LIVE, live_seconds),
    ]


def _stack(folders: list[pathlib.Path]) -> PeftModel:
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(_build_base(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        for name, weight in zip(names, WEIGHTS, strict=True):
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= weight
    return model


def _answer(model: PeftModel) -> tuple[torch.Tensor, float]:
    tokens = torch.arange(1, 257)[None]
    with torch.inference_mode():
        model(tokens)
        started = time.monotonic()
        logits = model(tokens).logits.double()
        return logits, time.monotonic() - started


def _measure_memory() -> Result:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result("peak_memory_bytes", peak, "bytes, models included")


if __name__ == "__main__":
    sys.exit(main())
