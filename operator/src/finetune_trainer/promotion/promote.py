"""Turns a checkpoint into a model that is verified to be whole, under the digest of its content.

The model is written to a folder beside, verified tensor by tensor, and
appears under its name by one rename; an earlier promoted model is never touched.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import RunConfig
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import disk, retention
from finetune_trainer.checkpoints.layout import Folder, checkpoint_name, list_folders
from finetune_trainer.checkpoints.manifest import Manifest, read_manifest, verify_checkpoint
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints
from finetune_trainer.data.prompts import begin_ids, build_chat_template
from finetune_trainer.errors import TrainerError, first_line
from finetune_trainer.promotion import promoted
from finetune_trainer.promotion.gather import load_gathered
from finetune_trainer.promotion.promoted import ADAPTER
from finetune_trainer.promotion.provenance import build_provenance
from finetune_trainer.reporting import emit, emit_warning, write_json
from finetune_trainer.storage.publish import PROVENANCE
from finetune_trainer.training import modeling

_SHARD_BYTES = "4GB"


@dataclasses.dataclass(frozen=True)
class Promotion:
    """A promoted model."""

    digest: str
    path: pathlib.Path
    checkpoint_step: int
    num_parameters: int
    num_bytes: int


def promote(run: RunConfig) -> Promotion:
    """Promote the checkpoint that the settings select, and return what came of it."""
    workspace = Workspace(pathlib.Path(run.workspace))
    chosen = select_checkpoint(run, workspace)
    manifest = read_manifest(chosen.path)
    base = modeling.find_base_model(run)
    workspace.output.mkdir(parents=True, exist_ok=True)
    disk.require_room(workspace.output, _count_weight_bytes(base))
    beside = workspace.output / f".promoting-{checkpoint_name(chosen.step)}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        _write_weights(run, (chosen, manifest), base, beside)
        _write_companions(run, base, beside)
        num_parameters = _verify(run, base, beside)
        digest = promoted.write_manifest(beside)
        write_json(beside / PROVENANCE, build_provenance(run, manifest, digest, num_parameters))
        target = _publish(beside, workspace.promoted_model(digest))
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    num_bytes = sum((target / name).stat().st_size for name in promoted.list_content(target))
    emit("model promoted", digest=digest[:12], checkpoint=chosen.path.name, size=disk.format_bytes(num_bytes))
    return Promotion(digest, target, chosen.step, num_parameters, num_bytes)


def select_checkpoint(run: RunConfig, workspace: Workspace) -> Folder:
    """Return the checkpoint to promote, after reading every byte of it. Raises TrainerError."""
    root = workspace.checkpoints
    chosen = choose_resume(observe_checkpoints(root))
    if chosen is None:
        raise TrainerError(
            Reason.CHECKPOINT_INVALID,
            ExitCode.NO_INPUT,
            f"{root}: no complete checkpoint among {len(list_folders(root))} folders",
            "Train first; `finetune-trainer checkpoints verify` says what is wrong with each folder.",
        )
    if run.promotion.select == "best":
        ranked = retention.rank_best(
            retention.list_committed(root, run.checkpoint.best_metric), run.checkpoint.best_mode
        )
        if not ranked:
            raise TrainerError(
                Reason.INVALID_CONFIG,
                ExitCode.CONFIG,
                f"promotion of the best checkpoint, but none has the metric {run.checkpoint.best_metric}",
                "Set spec.checkpoint.retention.best.count to 1 or more, or promote the last checkpoint.",
            )
        chosen = Folder(ranked[0], root / checkpoint_name(ranked[0]))
    problems = verify_checkpoint(chosen.path, full=True)
    if problems:
        raise TrainerError(
            Reason.CHECKPOINT_INVALID,
            ExitCode.INTERNAL,
            f"{chosen.path.name} is damaged: {problems[0]}",
            f"Remove {chosen.path.name} from the workspace; the job then resumes from the one before it.",
        )
    return chosen


def _count_weight_bytes(folder: pathlib.Path) -> int:
    safe = list(folder.glob("*.safetensors"))
    return sum(path.stat().st_size for path in safe or folder.glob("*.bin"))


def _write_weights(run: RunConfig, source: tuple[Folder, Manifest], base: pathlib.Path, beside: pathlib.Path) -> None:
    """Write whole 16-bit weights and the configuration into `beside`."""
    chosen, manifest = source
    # A run in fp32 is promoted in bf16, like every other: half the memory to serve, the same range of values.
    dtype = "float16" if run.training.precision == "fp16" else "bfloat16"
    if run.training.method == "lora":
        model = _merge_adapter(chosen.path, base, beside, (dtype, run.trust_remote_code))
    else:
        model = _gather(chosen.path, manifest, dtype, run.trust_remote_code)
    # The cache is off in training with gradient checkpointing; an answer without it takes many times longer.
    model.config.use_cache = True
    model.generation_config = _build_generation_config(model, modeling.load_tokenizer(base, run.trust_remote_code))
    model.save_pretrained(beside, max_shard_size=_SHARD_BYTES)


def _load(folder: pathlib.Path, dtype: str, trust_remote_code: bool) -> Any:
    """Load weights of ours; what is wrong with them is no fault of the job's model."""
    try:
        return modeling.load_model(folder, dtype, trust_remote_code)
    except TrainerError as error:
        raise _invalid(error.message) from error


def _gather(checkpoint: pathlib.Path, manifest: Manifest, dtype: str, trust_remote_code: bool) -> Any:
    """Gather the weights of a full fine-tune; shards that do not add up to the model are no fault of the job."""
    try:
        return load_gathered(checkpoint, manifest, dtype, trust_remote_code)
    except TrainerError as error:
        raise _invalid(error.message) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _invalid(first_line(error)) from error


def _merge_adapter(
    checkpoint: pathlib.Path, base: pathlib.Path, beside: pathlib.Path, options: tuple[str, bool]
) -> Any:
    from peft import PeftModel

    names = ("adapter_config.json", "adapter_model.safetensors")
    (beside / ADAPTER).mkdir()
    for name in names:
        shutil.copyfile(checkpoint / name, beside / ADAPTER / name)
    _require_filled_adapter(beside / ADAPTER / names[1])
    model = modeling.load_model(base, *options)
    merged = PeftModel.from_pretrained(model, beside / ADAPTER).merge_and_unload()
    _clean_adapter_config(beside / ADAPTER / names[0])
    return merged


def _require_filled_adapter(path: pathlib.Path) -> None:
    """Raise TrainerError for an adapter without effect: no tensors, empty ones, or zeros where it has learned."""
    learned = 0
    for name, tensor in _iterate(path):
        if tensor.numel() == 0:
            raise _invalid(f"adapter tensor {name} is empty")
        learned += bool("lora_B" in name and tensor.any())
    if not learned:
        raise _invalid("the adapter changes nothing: every lora_B is zero or missing")


def _clean_adapter_config(path: pathlib.Path) -> None:
    """Remove the base model's path on the training machine: it means nothing elsewhere, and would change the digest."""
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = ""
    write_json(path, config)


def _build_generation_config(model: Any, tokenizer: Any) -> Any:
    """Return settings that make greedy answers the default, ending where the training data ended."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    others = [end for end in ends if end is not None and end != tokenizer.eos_token_id]
    return GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, *others] if others else tokenizer.eos_token_id,
        pad_token_id=modeling.choose_pad_token(tokenizer),
    )


def _write_companions(run: RunConfig, base: pathlib.Path, beside: pathlib.Path) -> None:
    """Write the base's tokenizer with the chat template of the training prompt."""
    tokenizer = modeling.load_tokenizer(base, run.trust_remote_code)
    template = build_chat_template(run.dataset.prompt_template, adds_bos=bool(begin_ids(tokenizer)))
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(beside)


def _verify(run: RunConfig, base: pathlib.Path, beside: pathlib.Path) -> int:
    """Verify every tensor as it was written, and return the number of parameters. Raises TrainerError."""
    base_tensors = _Tensors(base)
    is_changed, num_parameters = False, 0
    for path in sorted(beside.glob("*.safetensors")):
        for name, tensor in _iterate(path):
            if tensor.numel() == 0:
                raise _invalid(f"tensor {name} is empty, of shape {tuple(tensor.shape)}")
            if not tensor.isfinite().all():
                raise _invalid(f"tensor {name} has values that are not finite")
            num_parameters += tensor.numel()
            is_changed = is_changed or not base_tensors.has_equal(name, tensor)
    if not is_changed:
        raise _invalid("every tensor equals the base model's: training changed nothing")
    # By loading it as a server will: names in files and in code differ between versions of the library.
    _load(beside, "auto", run.trust_remote_code)
    _verify_prompt(run, beside)
    return num_parameters


def _verify_prompt(run: RunConfig, folder: pathlib.Path) -> None:
    """Raise TrainerError when the chat template gives other tokens than training saw."""
    from finetune_trainer.data.prompts import encode_prompt

    tokenizer = modeling.load_tokenizer(folder, run.trust_remote_code)
    question = [{"role": "user", "content": "What is 1 + 1?\nAnswer in a word."}]
    trained = encode_prompt(question, run.dataset.prompt_template, tokenizer)
    served = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=True, return_dict=False)
    if list(served) != list(trained):
        raise _invalid("the chat template gives other tokens than the training prompt")


def _iterate(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise _invalid(f"{path.name} is not whole: {error}") from error


class _Tensors:
    """Tensors of a model folder by name, read one at a time."""

    def __init__(self, folder: pathlib.Path) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self._files.update(dict.fromkeys(list(file.keys()), file))

    def has_equal(self, name: str, tensor: Any) -> bool:
        """Return whether the folder has an equal tensor of that name, at the precision of `tensor`."""
        file = self._files.get(name)
        if file is None:
            return False
        other = file.get_tensor(name)
        return bool(other.shape == tensor.shape and other.to(tensor.dtype).equal(tensor))


def _publish(beside: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Give the finished folder its name; an equal model that is there already stays as it is."""
    if target.exists():
        promoted.read_manifest(target)
        emit_warning("this model has been promoted before; it is used again", digest=target.name[:12])
        return target
    beside.rename(target)
    return target


def _invalid(problem: str) -> TrainerError:
    return TrainerError(
        Reason.PROMOTION_INVALID,
        ExitCode.INTERNAL,
        f"the promoted model is not whole: {problem}",
        "Nothing was published. Train again, or report this with the attempt's log.",
    )
