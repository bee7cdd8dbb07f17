"""Where the base model lies, and how it and its tokenizer are loaded; with errors that say what to mend.

Used by training, promotion, evaluation and generation, so that all of them read a model the same way.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.errors import TrainerError


def find_base_model(run: RunConfig) -> pathlib.Path:
    """Return the folder of the base model: what `prepare` downloaded, or the path the settings name."""
    workspace = Workspace(pathlib.Path(run.workspace))
    if workspace.base_model_manifest.exists():
        return workspace.base_model
    path = pathlib.Path(run.model.source)
    if path.is_dir():
        return path
    raise TrainerError(
        Reason.MODEL_NOT_FOUND,
        ExitCode.NO_INPUT,
        f"no base model at {workspace.base_model}, and {run.model.source} is no folder",
        "Run `finetune-trainer prepare` first, or name a folder in Hugging Face layout.",
    )


def read_config(folder: pathlib.Path, trust_remote_code: bool = False) -> Any:
    """Read a model's configuration."""
    from transformers import AutoConfig

    with _reading(folder, "config.json"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def load_tokenizer(folder: pathlib.Path, trust_remote_code: bool = False) -> Any:
    """Load a model's tokenizer; it must know where an answer ends."""
    from transformers import AutoTokenizer

    with _reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"{folder}: the tokenizer has no end-of-sequence token, so an answer could not end",
            "Set eos_token in the model's tokenizer_config.json.",
        )
    return tokenizer


def choose_pad_token(tokenizer: Any) -> int:
    """Return the token that fills up rows; masked everywhere, so the end token serves where there is none."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def load_model(
    folder: pathlib.Path,
    dtype: str,
    trust_remote_code: bool = False,
    *,
    is_partitioned: bool = False,
    attention: str = "",
    quantization: Any = None,
) -> Any:
    """Load a causal language model whose folder holds every tensor of the architecture.

    `dtype` is a torch name, or auto for that of the weights. A library's default is to fill a missing tensor with
    random numbers and to say so in a log line; here it is an error. `is_partitioned`: under ZeRO-3, where a rank sees
    parts of the tensors only. `attention`: the code for packed rows; empty: `choose_attention`. `quantization`: as
    Transformers takes it, for a model in fewer bits.
    """
    from transformers import AutoModelForCausalLM

    from finetune_trainer.training.attention import register

    register()
    with _reading(folder, "the weights"):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            attn_implementation=attention or choose_attention(read_config(folder, trust_remote_code)),
            ignore_mismatched_sizes=not is_partitioned,
            output_loading_info=True,
            quantization_config=quantization,
        )
        if found["mismatched_keys"]:
            name, saved, wanted = min(found["mismatched_keys"])
            raise ValueError(f"tensor {name} has shape {tuple(saved)}, the configuration says {tuple(wanted)}")
        _check_quantized_shapes(model)
        if found["missing_keys"]:
            raise ValueError(
                f"{len(found['missing_keys'])} tensors are missing, the first is {min(found['missing_keys'])}"
            )
    return model


def _check_quantized_shapes(model: Any) -> None:
    """Raise ValueError for a quantized tensor of another shape: the library compares none that it packs into bits."""
    for name, module in model.named_modules():
        packed = getattr(getattr(module, "weight", None), "quant_state", None)
        wanted = (module.out_features, module.in_features) if packed is not None else ()
        if packed is not None and tuple(packed.shape) != wanted:
            raise ValueError(f"tensor {name}.weight has shape {tuple(packed.shape)}, the configuration says {wanted}")


def load_served_model(folder: pathlib.Path, trust_remote_code: bool = False) -> Any:
    """Load a model as it is served: in 16 bits, those of the folder where it has them."""
    import torch

    model = load_model(folder, "auto", trust_remote_code)
    return model.to(torch.bfloat16) if model.dtype == torch.float32 else model


def build_empty_model(folder: pathlib.Path, dtype: str, trust_remote_code: bool = False) -> Any:
    """Return the model that a folder's configuration describes, without memory for its weights."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = read_config(folder, trust_remote_code)
    with _reading(folder, "the configuration"), init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            attn_implementation=choose_attention(config),
        )


def choose_attention(config: Any) -> str:
    """Return the attention code to use: the same in training, evaluation and generation."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Some know only their own: MPT with its ALiBi, Gemma 2 with capped scores. The mapping is what the library picks
    # the class by; code that came with the model is not in it, and every such code has an eager way.
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"


def limit_length(config: Any) -> int:
    """Return the longest sequence the architecture takes."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(limit := getattr(text, name, None), int):
            return limit
    return 1 << 30


@contextlib.contextmanager
def _reading(folder: pathlib.Path, part: str) -> Iterator[None]:
    """Turn whatever a library says about a model folder into one error."""
    from safetensors import SafetensorError

    try:
        yield
    except RuntimeError as error:
        # The library's words for tensors of other shapes; any other error of this type is no fault of the folder.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _invalid(folder, f"{part} cannot be loaded: tensors have other shapes than config.json says") from error
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise _invalid(folder, f"{part} cannot be loaded: {line}") from error


def _invalid(folder: pathlib.Path, problem: str) -> TrainerError:
    return TrainerError(
        Reason.MODEL_INVALID,
        ExitCode.NO_INPUT,
        f"{folder}: {problem}",
        "Check spec.model: it must be a causal language model in Hugging Face layout, with all its weights.",
    )
