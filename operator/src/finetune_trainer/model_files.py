"""Which files of a source make a model, whether they are whole, and what their headers tell. No torch.

The rule for weights: safetensors are taken when there are any. Pickled weights (`pytorch_model*.bin`) are taken only
when there is nothing else, and training opens them with torch's `weights_only` loading, which runs no code. Other
pickles, and Python files unless remote code is trusted, are never downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError
from finetune_trainer.safetensors_header import LENGTH_BYTES, HeaderError, parse_header, parse_length
from finetune_trainer.storage import Access, RemoteFile

CONFIG = "config.json"
_WEIGHTS = re.compile(r"(?:model|pytorch_model)[^/]*\.safetensors")
_PICKLED_WEIGHTS = re.compile(r"pytorch_model(?:-\d+-of-\d+)?\.bin")
_COMPANIONS = re.compile(r"[^/]+\.(?:json|jinja|model|tiktoken|txt)|LICENSE[^/]*|NOTICE[^/]*|README\.md|merges\.txt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_LONGEST_JSON = 100_000_000

ReadRange = Callable[[RemoteFile, int, int], bytes]
"""Return a stretch of a file: the file, its start, its length."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the headers of a model tell."""

    model_type: str
    num_bytes: int
    """Size of the files that will be downloaded."""
    num_parameters: int
    is_pickled: bool


def model_invalid(access: Access, why: str, hint: str = "") -> TrainerError:
    """Return the error for a model that cannot be loaded."""
    advice = hint or f"Point {access.field}.source at a model in Hugging Face layout with safetensors."
    return TrainerError(Reason.MODEL_INVALID, ExitCode.DATA, f"{access.field}.source: {why}", advice)


def choose_model_files(
    files: Sequence[RemoteFile], access: Access, trust_remote_code: bool = False
) -> tuple[RemoteFile, ...]:
    """Return the files to download. Raises TrainerError when they cannot be a model."""
    names = {file.name for file in files}
    if CONFIG not in names:
        if "adapter_config.json" in names:
            hint = f"Point {access.field}.source at the base model that the adapter was trained on."
            raise model_invalid(access, "it holds a LoRA adapter and no model", hint)
        raise model_invalid(access, f"it holds no {CONFIG}")
    weights = [file for file in files if _WEIGHTS.fullmatch(file.name)]
    weights = weights or [file for file in files if _PICKLED_WEIGHTS.fullmatch(file.name)]
    if not weights:
        raise model_invalid(access, "it holds no weights (model*.safetensors or pytorch_model*.bin)")
    companions = [file for file in files if _COMPANIONS.fullmatch(file.name)]
    if trust_remote_code:
        companions += [file for file in files if re.fullmatch(r"[^/]+\.py", file.name)]
    return tuple(sorted({*weights, *companions}, key=lambda file: file.name))


def read_model_facts(files: Sequence[RemoteFile], read_range: ReadRange, access: Access) -> ModelFacts:
    """Read the headers of chosen model files, here or far away, and check that they fit together."""
    by_name = {file.name: file for file in files}
    config = _read_json(by_name[CONFIG], read_range, access)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise model_invalid(access, f"{CONFIG} names no model_type")
    for name in _INDEXES:
        if name in by_name:
            _check_index(_read_json(by_name[name], read_range, access), by_name, name, access)
    weights = [file for file in files if _WEIGHTS.fullmatch(file.name)]
    if weights:
        parameters = sum(_count_parameters(file, read_range, access) for file in weights)
    else:
        pickled = [file for file in files if _PICKLED_WEIGHTS.fullmatch(file.name)]
        parameters = _estimate_parameters(pickled, config)
    return ModelFacts(model_type, sum(max(file.size, 0) for file in files), parameters, is_pickled=not weights)


def _read_json(file: RemoteFile, read_range: ReadRange, access: Access) -> dict[str, Any]:
    try:
        value = json.loads(read_range(file, 0, max(file.size, 1) if file.size >= 0 else _LONGEST_JSON))
    except ValueError as error:
        raise model_invalid(access, f"{file.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise model_invalid(access, f"{file.name} is not a JSON object")
    return value


def _check_index(index: Mapping[str, Any], files: Mapping[str, RemoteFile], name: str, access: Access) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise model_invalid(access, f"{name} has no weight_map")
    is_wanted = name.startswith("model.") or not any(_WEIGHTS.fullmatch(other) for other in files)
    missing = sorted({str(file) for file in weight_map.values()} - set(files))
    if missing and is_wanted:
        raise model_invalid(access, f"{missing[0]}, which {name} names, is missing")


def _count_parameters(file: RemoteFile, read_range: ReadRange, access: Access) -> int:
    """Return the number of parameters in a safetensors file, after checking that it is whole."""
    try:
        length = parse_length(read_range(file, 0, LENGTH_BYTES))
    except HeaderError:
        length = -1
    if length < 0 or 0 <= file.size < LENGTH_BYTES + length:
        raise model_invalid(access, f"{file.name} is no safetensors file, or cut off")
    try:
        header = parse_header(read_range(file, LENGTH_BYTES, length))
    except HeaderError as error:
        raise model_invalid(access, f"the header of {file.name} is damaged") from error
    if file.size >= 0 and (header.file_bytes != file.size or header.tensor_bytes > file.size):
        raise model_invalid(access, f"{file.name} has {file.size} bytes, its header says {header.file_bytes}")
    return header.num_parameters


def _estimate_parameters(files: Iterable[RemoteFile], config: Mapping[str, Any]) -> int:
    """Return the number of parameters that pickled weights of this size hold."""
    kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    width = 2 if kind.removeprefix("torch.") in ("float16", "bfloat16") else 4
    return sum(max(file.size, 0) for file in files) // width
