"""The story of one rank, top to bottom: model, trainer, the checkpoint to resume from, training, the last commit.

Called by the supervisor in a forked process, with the stack imported and the rows tokenized.
"""

from __future__ import annotations

import array
import dataclasses
import logging
import os
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from finetune_contract.checkpoint_sizes import estimate_share_bytes
from finetune_contract.reports import ExitCode
from finetune_contract.run_config import LONGEST_PAUSE_SECONDS
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints.identity import RUN
from finetune_trainer.checkpoints.writer import Writer
from finetune_trainer.distributed import ControlGroup, read_rank
from finetune_trainer.training.inputs import Inputs
from finetune_trainer.training.ledger import WorkLedger
from finetune_trainer.training.schedule import count_steps
from finetune_trainer.training.tokens import TokenizedRows


def run_rank(inputs: Inputs, attempt: int, ledger: WorkLedger) -> tuple[int, dict[str, Any]]:
    """Train, and return the exit code with the results for the exit report."""
    from finetune_trainer.training.arguments import build_arguments
    from finetune_trainer.training.callbacks import SaveAndStopCallback
    from finetune_trainer.training.heartbeat_callback import HeartbeatCallback
    from finetune_trainer.training.keeper import CheckpointKeeper
    from finetune_trainer.training.notice import StopFlag
    from finetune_trainer.training.resuming import fit_checkpoint, keep_rows

    # Before there are threads, a process group or an accelerator: none of them survives in a forked process.
    writer = Writer.start()
    run = inputs.run
    stop = StopFlag()
    stop.install()
    _quieten()
    join_ranks(run.topology.gpus_per_node > 0)
    group = ControlGroup()
    keeper = CheckpointKeeper(run, group, attempt, {RUN: dict(inputs.identity)}, writer=writer)
    found = keeper.start()
    keeper.run = run = keep_rows(run, found, group.size)
    inputs = dataclasses.replace(inputs, run=run)
    total_steps = count_steps(len(inputs.train.rows), group.size, run.training)
    if keeper.latest_complete is not None and keeper.latest_complete >= total_steps:
        # An attempt that died between its last commit and its report: nothing is left to train.
        return ExitCode.OK, _results(keeper, keeper.latest_complete, total_steps, None)
    checkpoint, is_converted = fit_checkpoint(run, found, group)
    # Before the model: under ZeRO-3 the arguments make `from_pretrained` partition the weights as it reads them.
    arguments = build_arguments(run, Workspace(pathlib.Path(run.workspace)).checkpoints, is_converted)
    trainer = _build_trainer(inputs, arguments, keeper)
    trainer.is_converted = is_converted
    saver = SaveAndStopCallback(keeper, stop, run.checkpoint.every_minutes)
    trainer.add_callback(saver)
    progress = _add_progress(trainer, inputs, keeper, ledger)
    trainer.add_callback(HeartbeatCallback())
    trainer.train(resume_from_checkpoint=checkpoint)
    if saver.has_saved:
        trainer.commit_last()
    # Where the notice was too short for another save, the one in flight may still be committed.
    keeper.settle()
    if progress is not None:
        progress.finish(trainer.state)
    _close_trackers(run.training.tracking)
    loss = progress.loss if progress is not None else None
    code = ExitCode.SUSPENDED if saver.has_stopped else ExitCode.OK
    return code, _results(keeper, trainer.state.global_step, total_steps, loss)


def join_ranks(uses_gpus: bool) -> None:
    """Join the process group, before any library does: DeepSpeed partitions a model as it is loaded, and must know."""
    import datetime

    import deepspeed
    import torch

    if uses_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if uses_gpus else "gloo"
    timeout = datetime.timedelta(seconds=LONGEST_PAUSE_SECONDS)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _quieten() -> None:
    """Keep the log to what a reader of the pod needs: warnings of rank 0's libraries, errors of the others'."""
    from transformers.utils import logging as transformers_logging

    # The libraries' advice to each other is not the user's business.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    level = logging.WARNING if read_rank() == 0 else logging.ERROR
    for name in ("transformers", "trl", "accelerate", "DeepSpeed", "deepspeed", "datasets", "peft"):
        logging.getLogger(name).setLevel(level)


def _build_trainer(inputs: Inputs, arguments: Any, keeper: Any) -> Any:
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from finetune_trainer.training import modeling, quantization
    from finetune_trainer.training.arguments import build_lora, torch_dtype
    from finetune_trainer.training.callbacks import FiniteLossCallback
    from finetune_trainer.training.collate import Collator
    from finetune_trainer.training.trainer import CommitCallback, ContractTrainer

    run = inputs.run
    set_seed(run.training.seed)
    quantized = quantization.build_quantization(run.training)
    model = modeling.load_model(
        inputs.base_model,
        torch_dtype(run.training.precision),
        run.trust_remote_code,
        # One in fewer bits is partitioned once it is whole.
        is_partitioned=run.training.zero_stage == 3 and quantized is None,
        attention=inputs.packed_attention,
        quantization=quantized,
    )
    if quantized is not None:
        quantization.prepare_quantized(model, run.training.lora_quantization)
    trainer = ContractTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(modeling.choose_pad_token(inputs.tokenizer), packed=bool(inputs.packed_attention)),
        train_dataset=build_dataset(inputs.train),
        eval_dataset=build_dataset(inputs.holdout) if inputs.holdout.rows else None,
        processing_class=inputs.tokenizer,
        peft_config=build_lora(run.training),
    )
    trainer.keeper = keeper
    keeper.reserve(_estimate_share(trainer, run, keeper.group))
    trainer.remove_callback(PrinterCallback)
    _remove_kubeflow(trainer)
    trainer.add_callback(FiniteLossCallback())
    trainer.add_callback(CommitCallback(keeper))
    return trainer


def _remove_kubeflow(trainer: Any) -> None:
    """Remove the callback that Transformers adds for the same progress URL: it would post everything twice."""
    from transformers.integrations.integration_utils import KubeflowCallback

    trainer.remove_callback(KubeflowCallback)


def build_dataset(rows: TokenizedRows) -> Any:
    """Return rows as a `datasets.Dataset` over one Arrow table: nothing is pickled or cached on disk."""
    import datasets
    import pyarrow

    columns = {
        "input_ids": _list_column(row.input_ids for row in rows.rows),
        "labels": _list_column(row.labels for row in rows.rows),
        "seq_lengths": _list_column(array.array("i", row.lengths) for row in rows.rows),
    }
    return datasets.Dataset(pyarrow.table(columns))


def _list_column(lists: Iterable[array.array[int]]) -> Any:
    """Return a column of lists made from whole buffers: number by number would take longer than the tokenization."""
    import pyarrow

    values, offsets = array.array("i"), array.array("q", [0])
    for one in lists:
        values.extend(one)
        offsets.append(len(values))
    flat = pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, pyarrow.py_buffer(values)])
    ends = pyarrow.Array.from_buffers(pyarrow.int64(), len(offsets), [None, pyarrow.py_buffer(offsets)])
    return pyarrow.LargeListArray.from_arrays(ends, flat)


def _add_progress(trainer: Any, inputs: Inputs, keeper: Any, ledger: WorkLedger) -> Any:
    from finetune_trainer.training.callbacks import ProgressCallback

    if keeper.group.rank != 0:
        return None
    per_row = inputs.train.num_tokens / len(inputs.train.rows)
    training = inputs.run.training
    rows = training.per_device_batch_size * training.gradient_accumulation_steps * keeper.group.size
    progress = ProgressCallback(inputs, keeper, per_row * rows, ledger)
    trainer.add_callback(progress)
    return progress


def _close_trackers(tracking: Sequence[str]) -> None:
    """Send what is left: a rank leaves without running exit handlers."""
    if "wandb" in tracking:
        import wandb

        wandb.finish()
    if "mlflow" in tracking:
        import mlflow

        mlflow.end_run()


def _estimate_share(trainer: Any, run: Any, group: ControlGroup) -> int:
    """Return the size of this rank's files of a checkpoint."""
    trained = saved = 0
    for parameter in trainer.model.parameters():
        # Under ZeRO-3 a rank holds a part of each tensor; DeepSpeed keeps the whole count beside it.
        count = getattr(parameter, "ds_numel", parameter.numel())
        saved += count if parameter.requires_grad or run.training.method == "full" else 0
        trained += count if parameter.requires_grad else 0
    return estimate_share_bytes(trained, saved, run.training.zero_stage, group.size, is_first=group.rank == 0)


def _results(keeper: Any, step: int, total_steps: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "total_steps": total_steps,
        "loss": loss,
        "resumed_from_step": keeper.resumed_from,
        "checkpoints": keeper.kept,
        "latest_complete": keeper.latest_complete,
        "best": keeper.best,
        "checkpoint_bytes": keeper.last_bytes,
        "committed_at": keeper.last_committed_at,
        "save_seconds": keeper.last_save_seconds,
        "stall_seconds": keeper.last_seconds,
    }
