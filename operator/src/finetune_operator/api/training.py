"""How the model is trained: recipe, hyper-parameters, DeepSpeed, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule
from finetune_operator.api.pods import PodTemplate, SecretRef
from finetune_operator.api.scalars import Text, ZeroStage

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Lora(Model):
    """Low-rank adapters instead of all weights."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale of the update: alpha / rank."""
    target_modules: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64)] = []
    """Names of the layers that get adapters; by default every linear layer of the blocks."""
    quantization: Literal["nf4"] | None = None
    """nf4 (QLoRA): hold the base model in 4 bits while its adapter is trained, in a third of the memory; the adapter is
    merged into the base as it came. By default the base is held in 16 bits."""


def _is_quantized(training: Training) -> bool:
    return training.lora is not None and training.lora.quantization is not None


def is_fp16(training: Training) -> bool:
    """Is the model trained in fp16, written or by its recipe?"""
    return (training.precision or ("fp16" if training.recipe == "wizardlm-freeform" else "bf16")) == "fp16"


class Deepspeed(Model):
    """DeepSpeed ZeRO."""

    zero_stage: ZeroStage | None = None
    """How much is split over the processes: 1 optimizer state, 2 also gradients, 3 also parameters; `auto` takes the
    lowest that fits. By default the recipe's: 3 for wizardlm-freeform, otherwise auto."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in CPU memory: nothing, the optimizer, or optimizer and parameters."""
    config: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    """Keys merged over the generated DeepSpeed configuration."""

    validations = (
        Rule(
            "self.offload != 'all' || !has(self.zeroStage) || type(self.zeroStage) == string"
            " || int(self.zeroStage) == 3",
            "parameters can only be offloaded in stage 3: set zeroStage: 3, or offload: optimizer",
            lambda deepspeed: deepspeed.offload != "all" or deepspeed.zero_stage in (None, "auto", 3),
            field="offload",
        ),
    )


class Wandb(Model):
    """Reporting to Weights & Biases."""

    secret_ref: SecretRef
    """Secret with WANDB_API_KEY."""
    project: Text | None = None
    """Project of the run."""
    entity: Text | None = None
    """User or team of the run."""


class Mlflow(Model):
    """Reporting to MLflow."""

    tracking_uri: Annotated[str, Field(min_length=1, max_length=2048)]
    """URL of the tracking server."""
    experiment: Text | None = None
    """Experiment of the run."""
    secret_ref: SecretRef | None = None
    """Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""


class Tracking(Model):
    """Trackers that training reports to."""

    wandb: Wandb | None = None
    """Weights & Biases."""
    mlflow: Mlflow | None = None
    """MLflow."""


class Training(Model):
    """How the model is trained."""

    recipe: Literal["efficient", "wizardlm-freeform"] = "efficient"
    """Set of defaults for the fields that are not written: `efficient` (bf16, packing) or `wizardlm-freeform` (fp16,
    the prompt and numbers of WizardLM's training)."""
    method: Literal["full", "lora"] = "full"
    """Train all weights, or low-rank adapters that promotion merges."""
    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Passes over the data; 3 by default."""
    max_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Optimizer steps, instead of epochs."""
    max_length: Annotated[int, Field(ge=16, le=1048576)] | None = None
    """Tokens of one training sequence; 2048 by default."""
    per_device_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Sequences per process and forward pass; 8 by default."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Forward passes per optimizer step; by default 4, or with packing what keeps the real tokens per step."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; 0.00002 by default."""
    warmup_steps: Annotated[int, Field(ge=0, le=1000000)] | None = None
    """Steps in which the learning rate rises; 2 by default."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] | None = None
    """Course of the learning rate; cosine by default."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Number format; by default the recipe's: fp16 for wizardlm-freeform, otherwise bf16."""
    gradient_checkpointing: bool | None = None
    """Compute activations again in the backward pass to save memory; true by default."""
    packing: bool | None = None
    """Put several rows into one sequence; by default the recipe's: false for wizardlm-freeform, otherwise true."""
    seed: Seed = 42
    """Seed of initialisation and order."""
    lora: Lora | None = None
    """Settings of method lora."""
    deepspeed: Deepspeed = Deepspeed()
    """DeepSpeed ZeRO."""
    tracking: Tracking | None = None
    """Trackers that training reports to."""
    pod: PodTemplate | None = None
    """Settings of the training pods, merged over spec.pod."""

    validations = (
        Rule(
            "!(has(self.epochs) && has(self.maxSteps))",
            "write either epochs or maxSteps, not both",
            lambda training: training.epochs is None or training.max_steps is None,
            field="maxSteps",
        ),
        Rule(
            "!has(self.lora) || self.method == 'lora'",
            "lora settings have no effect with method: full: set method: lora, or remove lora",
            lambda training: training.lora is None or training.method == "lora",
            field="lora",
        ),
        Rule(
            "!has(self.lora) || !has(self.lora.quantization) || (has(self.precision) ? self.precision != 'fp16'"
            " : self.recipe != 'wizardlm-freeform')",
            "a base in 4 bits is not trained in fp16: set precision: bf16, or remove lora.quantization",
            lambda training: not (_is_quantized(training) and is_fp16(training)),
            field="precision",
        ),
        Rule(
            "!has(self.lora) || !has(self.lora.quantization) || self.deepspeed.offload != 'all'",
            "a base in 4 bits is not offloaded: set offload: optimizer, or remove lora.quantization",
            lambda training: not (_is_quantized(training) and training.deepspeed.offload == "all"),
            field="deepspeed.offload",
        ),
    )
