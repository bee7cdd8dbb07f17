"""What the ranks share, made once before they are forked: settings checked, tokenizer, tokenized and packed rows."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from finetune_contract.reports import ExitCode, Metric, Reason
from finetune_contract.run_config import QUANTIZATIONS, RunConfig, TrainingConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.identity import identify_run
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import emit, emit_warning
from finetune_trainer.training import modeling, packing, probe, tokens


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything a rank needs besides its rank."""

    run: RunConfig
    """The settings with every automatic value resolved."""
    base_model: pathlib.Path
    tokenizer: Any
    train: tokens.TokenizedRows
    holdout: tokens.TokenizedRows
    """Empty unless checkpoints are ranked by a metric."""
    packed_attention: str
    """Attention code for packed rows (`probe.py`); empty: each example has a row of its own."""
    identity: Mapping[str, str]
    """What decides what the model becomes (`identity.identify_run`)."""
    is_refused: bool = False
    """Packing was wanted, and the architecture does not allow it."""

    def describe(self) -> dict[str, float]:
        """Return what became of the examples, under the names of the metrics."""
        train = self.train
        widest = (
            self.run.training.max_length if self.packed_attention else max(len(row.input_ids) for row in train.rows)
        )
        return {
            Metric.PACKING: -1 if self.is_refused else int(bool(self.packed_attention)),
            Metric.EXAMPLES_TRUNCATED: train.num_truncated,
            Metric.EXAMPLES_DROPPED: train.num_dropped,
            Metric.REAL_TOKEN_SHARE: round(train.num_tokens / (len(train.rows) * widest), 4),
        }


def find_dataset(run: RunConfig) -> pathlib.Path:
    """Return the folder of the prepared data set in use."""
    workspace = Workspace(pathlib.Path(run.workspace))
    try:
        digest = json.loads(workspace.current_dataset.read_text())["digest"]
    except (OSError, ValueError, KeyError) as error:
        path = pathlib.Path(run.dataset.sources[0].source) if run.dataset.sources else None
        if path is not None and (path / "train.jsonl").is_file():
            return path
        raise TrainerError(
            Reason.DATASET_NOT_FOUND,
            ExitCode.NO_INPUT,
            f"no prepared data set: {workspace.current_dataset} is missing",
            "Run `finetune-trainer prepare` first.",
        ) from error
    return workspace.dataset(digest)


def check_settings(run: RunConfig) -> None:
    """Raise TrainerError for settings that cannot work on this machine."""
    if run.training.precision == "fp16" and run.topology.gpus_per_node == 0:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            "spec.training.precision: fp16 needs GPUs, and spec.resources.gpusPerNode is 0",
            "Set spec.training.precision to bf16 or fp32.",
        )
    if (problem := _find_quantization_problem(run.training)) is not None:
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, *problem)


def _find_quantization_problem(training: TrainingConfig) -> tuple[str, str] | None:
    """Return what keeps the base from being quantized, and what to do about it."""
    chosen, field = training.lora_quantization, "spec.training.lora.quantization"
    if not chosen:
        return None
    if chosen not in QUANTIZATIONS:
        return f"{field}: {chosen} is not one of {', '.join(QUANTIZATIONS)}", f"Set {field} to nf4, or remove it."
    if training.method != "lora":
        return (
            f"{field} needs an adapter to train, and spec.training.method is full",
            "Set spec.training.method to lora.",
        )
    if training.precision == "fp16":
        return f"{field}: a base in 4 bits is not trained in fp16", "Set spec.training.precision to bf16."
    if training.offload == "all":
        return f"{field}: a base in 4 bits is not offloaded", "Set spec.training.deepspeed.offload to optimizer."
    return None


def read_inputs(run: RunConfig) -> Inputs:
    """Read and tokenize the data; the slow part of a start besides imports, paid once for all ranks."""
    check_settings(run)
    base_model = modeling.find_base_model(run)
    config = modeling.read_config(base_model, run.trust_remote_code)
    # Transformers warns of rows longer than the model takes; what is done about them is counted below.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    tokenizer = modeling.load_tokenizer(base_model, run.trust_remote_code)
    max_length = _choose_length(run, config)
    folder = find_dataset(run)
    train = _tokenize(folder / "train.jsonl", run, tokenizer, max_length)
    attention = _choose_packing(run, config, max_length)
    is_packed = bool(attention)
    num_examples = len(train.rows)
    if is_packed:
        train = tokens.pack(train, max_length)
    batch, accumulation = packing.choose_batch(
        run.training.per_device_batch_size,
        run.training.gradient_accumulation_steps,
        num_examples / len(train.rows),
    )
    training = dataclasses.replace(
        run.training,
        max_length=max_length,
        packing=is_packed,
        per_device_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    is_refused = run.training.packing and not is_packed
    run = dataclasses.replace(run, training=training)
    holdout = tokens.TokenizedRows([])
    if run.checkpoint.keep_best > 0:
        holdout = _tokenize(folder / "holdout.jsonl", run, tokenizer, max_length)
    emit("rows tokenized", examples=num_examples, rows=len(train.rows), tokens=train.num_tokens, packed=is_packed)
    identity = identify_run(run, base_model, folder)
    return Inputs(run, base_model, tokenizer, train, holdout, attention, identity, is_refused)


def _tokenize(path: pathlib.Path, run: RunConfig, tokenizer: Any, max_length: int) -> tokens.TokenizedRows:
    conversations = tokens.read_conversations(path)
    rows = tokens.tokenize(conversations, run.dataset.prompt_template, tokenizer, max_length)
    if rows.num_dropped or rows.num_truncated:
        emit_warning(
            "rows longer than spec.training.maxLength",
            file=path.name,
            max_length=max_length,
            truncated=rows.num_truncated,
            dropped_without_answer=rows.num_dropped,
        )
    if not rows.rows:
        raise TrainerError(
            Reason.DATASET_EMPTY,
            ExitCode.DATA,
            f"{path}: no row has an answer within {max_length} tokens ({rows.num_dropped} rows dropped)",
            "Raise spec.training.maxLength, or look at the data.",
        )
    return rows


def _choose_length(run: RunConfig, config: Any) -> int:
    limit = modeling.limit_length(config)
    if run.training.max_length > limit:
        emit_warning("spec.training.maxLength is more than the model takes", asked=run.training.max_length, used=limit)
    return min(run.training.max_length, limit)


def _choose_packing(run: RunConfig, config: Any, max_length: int) -> str:
    """Return the attention code for packed rows; empty where they are not wanted, or not safe for the architecture."""
    if not run.training.packing:
        return ""
    found = probe.find_packed_attention(config, max_length, run.trust_remote_code)
    if not found.attention:
        emit_warning(
            "packing is off: this architecture mixes examples that share a row",
            model_type=config.model_type,
            problem=found.problem,
        )
    return found.attention
