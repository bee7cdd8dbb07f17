"""A sequence classifier from a local folder in Hugging Face layout, for the judge of the data. Needs torch.

Called by `commands/prepare` and `judge_training` only. Code that comes with a model is never run, and only safetensors
are read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator, Sequence

_BATCH_TOKENS = 8192
"""Tokens of one batch, padding included, which bounds its memory."""
_LONGEST_TEXT = 2048
"""Tokens of one text; what makes a row one to remove stands at its beginning."""
_REMOVE = re.compile(r"refus|reject|moral|disclaim|unsolicited|remove", re.IGNORECASE)
_KEEP = re.compile(r"(?:^|[\W_])(?:not?|non)(?:$|[\W_])|normal|compl|accept|keep", re.IGNORECASE)


class Classifier:
    """Scores texts."""

    def __init__(self, model: Any, tokenizer: Any, labels: Sequence[int]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._labels = list(labels)
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or _LONGEST_TEXT)
        # Position ids of the RoBERTa family begin after the padding id.
        offset = (model.config.pad_token_id or 0) + 1 if "roberta" in model.config.model_type else 0
        self._max_length = min(limits[0], limits[1] - offset, _LONGEST_TEXT)

    def save(self, folder: pathlib.Path) -> None:
        """Write model and tokenizer into a folder that `load_classifier` reads."""
        self._model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return for each text the probability that it has one of the labels, whatever texts are scored with it."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self._max_length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        scores = [0.0] * len(texts)
        for batch in _make_batches(lengths):
            rows = {name: [values[index] for index in batch] for name, values in encoded.items()}
            for index, score in zip(batch, self._score_batch(rows), strict=True):
                scores[index] = score
        return scores

    def _score_batch(self, rows: dict[str, list[Any]]) -> list[float]:
        import torch

        inputs = self._tokenizer.pad(rows, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
        if logits.shape[-1] == 1 or self._model.config.problem_type == "multi_label_classification":
            return [float(value) for value in logits.sigmoid()[:, self._labels].amax(dim=-1)]
        return [float(value) for value in logits.softmax(dim=-1)[:, self._labels].sum(dim=-1)]


def _make_batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the texts' numbers, shortest texts first, in batches of bounded size."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def load_classifier(folder: pathlib.Path, labels: Sequence[str] = ()) -> Classifier:
    """Load a classifier onto the GPU, where there is one; `labels` name those of rows to remove, or give their numbers.

    Raises TrainerError.
    """
    tokenizer, model, missing = load_parts(folder)
    if missing:
        # The library has filled the head with random numbers.
        raise _refuse(folder, f"is no sequence classifier: it has no {min(missing)}")
    import torch

    wanted = choose_labels(folder, model.config.id2label, labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Half precision is slow on CPUs.
    return Classifier(model.to(device, dtype=torch.float32 if device == "cpu" else None).eval(), tokenizer, wanted)


def load_parts(folder: pathlib.Path, **changes: Any) -> tuple[Any, Any, set[str]]:
    """Return tokenizer and model of a classifier's folder, and the names of the weights that it lacks.

    `changes` replace values of its configuration. Raises TrainerError.
    """
    try:
        from safetensors import SafetensorError
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.USAGE,
            f"the judge needs torch and transformers: {error}",
            "Install finetune-operator[trainer], use the trainer's image, or do without a judge.",
        ) from error

    settings: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, dtype="auto", output_loading_info=True, **settings, **changes
        )
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise _refuse(folder, f"cannot be loaded: {line}") from error
    _set_padding(folder, model, tokenizer)
    return tokenizer, model, set(found["missing_keys"])


def _set_padding(folder: pathlib.Path, model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise _refuse(folder, "has a tokenizer with neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def choose_labels(folder: pathlib.Path, names: dict[int, str], wanted: Sequence[str]) -> list[int]:
    """Return the numbers of the labels that mean "remove": those that are named, or those whose names say so."""
    if len(names) == 1 and not wanted:
        return [0]
    if not wanted:
        found = [number for number, name in names.items() if _REMOVE.search(name) and not _KEEP.search(name)]
        if not found or len(found) == len(names):
            raise _refuse(folder, f"has labels of which none or all seem to mean refusal ({_list(names)})", labels=True)
        return found
    numbers = {name.lower(): number for number, name in names.items()} | {str(number): number for number in names}
    for name in wanted:
        if name.lower() not in numbers:
            raise _refuse(folder, f"has no label {name} (its labels: {_list(names)})", labels=True)
    return sorted({numbers[name.lower()] for name in wanted})


def _list(names: dict[int, str]) -> str:
    return ", ".join(f"{number} {name}" for number, name in names.items())


def _refuse(folder: pathlib.Path, why: str, *, labels: bool = False) -> TrainerError:
    hint = (
        "Write the labels of rows to remove, names or numbers, in spec.dataset.judge.labels (--judge-label)."
        if labels
        else "Point spec.dataset.judge.source (--judge) at a sequence classifier with config.json and safetensors."
    )
    return TrainerError(Reason.MODEL_INVALID, ExitCode.NO_INPUT, f"judge: {folder} {why}", hint)
