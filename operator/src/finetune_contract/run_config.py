"""The settings of one run, frozen by the operator and read by every pod as mounted JSON.

Every value is resolved: no default is left to the pod. `to_json` and `from_json` are exact inverses; an unknown
version or field is refused, so that an old image never guesses what a newer operator meant.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import Any

from .gates import GateConfig
from .parsing import SENT_IF_SET, RunConfigError, parse, to_plain

VERSION = 1
"""Version of this format. Pods accept their own version only."""

LONGEST_PAUSE_SECONDS = 1800
"""How long ranks may stand still without being hung: in one collective, and while checkpoints are written."""


@dataclasses.dataclass(frozen=True)
class JobIdentity:
    """The job that the run belongs to."""

    namespace: str = ""
    name: str = ""
    uid: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model or a data set comes from."""

    source: str
    """URL with scheme hf, s3, https, pvc, or a path outside a cluster. `pvc://` is relative to the workspace root."""
    revision: str = ""
    """Branch, tag or commit of a hub repository, or version of an S3 object; empty is the newest."""
    format: str = "auto"
    """auto, alpaca, evol, sharegpt or messages; for models without meaning."""
    weight: float = 1.0
    """Share of the rows to take: 0.5 takes a seeded half, 2.0 every row twice."""
    secret_prefix: str = ""
    """Prefix of the credential variables for this source, as in `FINETUNE_MODEL_`; empty: unprefixed variables."""


FILTER_ACTIONS = ("remove-row", "remove-sentence", "flag")
"""What may follow from a rule that matches."""


@dataclasses.dataclass(frozen=True)
class FilterActions:
    """What follows from a match, per category of the rules; each one of FILTER_ACTIONS."""

    refusal: str = "remove-row"
    disclaimer: str = "remove-row"
    moralising: str = "remove-row"
    identity: str = "remove-row"
    knowledge_cutoff: str = "remove-row"


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What is removed from the data."""

    refusals: bool = True
    rules: str = "default"
    """default or legacy."""
    extra_phrases: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    """Fields that are searched: instruction, input, output; empty: the answers, and in legacy mode instruction and
    output, or every turn of a conversation."""
    language: str = ""
    """Two-letter code of the language to apply rules of; empty: all."""
    actions: FilterActions = FilterActions()
    """Without meaning in legacy mode, which removes whole rows."""


QUALITY_ACTIONS = ("remove-row", "flag")
"""What may follow from a quality check that finds something."""
PII_KINDS = ("email", "phone", "iban", "credit-card", "ip-address")


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """What rows are checked for besides refusals. Actions are one of QUALITY_ACTIONS; empty: the check is not made."""

    truncated: str = ""
    repetition: str = ""
    html: str = ""
    special_tokens: str = ""
    language: str = ""
    languages: tuple[str, ...] = ()
    """Two-letter codes of the languages that answers are expected in."""
    pii: str = ""
    pii_kinds: tuple[str, ...] = PII_KINDS
    duplicates: str = ""
    similarity: float = 1.0
    """1: rows of equal text are duplicates; less: also rows that share this much of their word triples (Jaccard)."""
    contamination: str = ""
    contamination_words: int = 13
    """How many words in a row a conversation shares with an evaluation task to be contaminated."""
    contamination_tasks: tuple[str, ...] = ()
    """The tasks, as in EvaluationConfig."""


JUDGED_ROWS = ("doubted", "all")
"""Which rows a judge decides: those in which something was found that weighs too little, or all that the rules keep."""


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A classifier that decides about rows beside the rules."""

    source: str = ""
    """Folder of a sequence classifier in Hugging Face layout, as in Source; empty: no judge."""
    revision: str = ""
    secret_prefix: str = ""
    labels: tuple[str, ...] = ()
    """Names or numbers of the classifier's labels that mean "remove"; empty: those whose names say so."""
    threshold: float = 0.5
    """Probability from which on a row is removed."""
    audit_fraction: float = 0.01
    """Share of the rows the rules are sure of that the judge is asked about too, for the report."""
    text: str = "{output}"
    """What is judged, with `{instruction}` and `{output}` for a question and its answer."""
    digest: str = ""
    """Of the classifier's files; filled in where they are read."""
    rows: str = dataclasses.field(default=JUDGED_ROWS[0], metadata=SENT_IF_SET)
    """One of JUDGED_ROWS."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """The data of the run."""

    sources: tuple[Source, ...]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Map from our field names (instruction, input, output) to those of the source."""
    prompt_template: str = "alpaca"
    """wizardlm, alpaca, vicuna, tokenizer, or a text with `{instruction}` and `{input}`."""
    filter: FilterConfig = FilterConfig()
    quality: QualityConfig = QualityConfig()
    judge: JudgeConfig = JudgeConfig()
    holdout_fraction: float = 0.02
    max_bad_rows: int = 0
    seed: int = 42


QUANTIZATIONS = ("nf4",)
"""Number formats of a base model in fewer than 16 bits: nf4 has 4, with scales of a block that are quantized too."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    recipe: str = "efficient"
    method: str = "full"
    """full or lora."""
    epochs: float = 3.0
    max_steps: int = 0
    """0: as many as `epochs` needs."""
    max_length: int = 2048
    per_device_batch_size: int = 8
    gradient_accumulation_steps: int = 4
    learning_rate: float = 2e-5
    warmup_steps: int = 2
    scheduler: str = "cosine"
    precision: str = "bf16"
    """bf16, fp16 or fp32."""
    gradient_checkpointing: bool = True
    packing: bool = True
    seed: int = 42
    logging_steps: int = 2
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_target_modules: tuple[str, ...] = ()
    """Empty: every linear layer of the blocks."""
    lora_quantization: str = dataclasses.field(default="", metadata=SENT_IF_SET)
    """One of QUANTIZATIONS: the base model is held in fewer bits while its adapter is trained; empty: as it is."""
    zero_stage: int = 3
    offload: str = "none"
    """none, optimizer or all."""
    deepspeed_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keys that are merged over the generated DeepSpeed configuration."""
    tracking: tuple[str, ...] = ()
    """Names of trackers: wandb, mlflow."""


IDENTITY_TRAINING = (
    *("recipe", "method", "epochs", "max_steps", "max_length", "learning_rate", "warmup_steps", "scheduler"),
    *("precision", "packing", "seed", "lora_rank", "lora_alpha", "lora_target_modules"),
    "lora_quantization",
)
"""Fields of TrainingConfig that decide what the model becomes: fixed for the life of a job, and part of what tells
one run's checkpoints from another's."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """The processes of an attempt."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 1
    rendezvous_host: str = "127.0.0.1"
    """Host name of the pod with index 0."""
    rendezvous_port: int = 29500
    in_pod_restarts: int = 0
    """How often a pod may restart crashed ranks by itself before it exits."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where something is copied to: checkpoints, to s3:// only."""

    destination: str
    """s3://, pvc:// or hf:// URL."""
    secret_prefix: str = ""


CONTENTS = ("Model", "Adapter")
"""What of a promoted model may be copied: all of it, or of a LoRA job the adapter alone."""


@dataclasses.dataclass(frozen=True)
class ModelDestination(Destination):
    """Where a promoted model is copied to."""

    content: str = dataclasses.field(default=CONTENTS[0], metadata=SENT_IF_SET)
    """One of CONTENTS."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, which are kept, and which is resumed."""

    every_steps: int = 800
    """0: by minutes only."""
    every_minutes: int = 0
    """0: by steps only."""
    keep_latest: int = 3
    keep_best: int = 0
    best_metric: str = "eval_loss"
    best_mode: str = "min"
    resume: str = "LatestComplete"
    """LatestComplete or Never."""
    mirror: Destination = Destination("")
    """Where committed checkpoints are copied to, and fetched from when the workspace has lost them; an empty
    destination: nowhere."""


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A further model to score."""

    name: str
    source: str
    """Folder in Hugging Face layout, as in Source."""
    revision: str = ""
    secret_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the promoted model is scored."""

    holdout: bool = True
    baseline: bool = True
    """Score the base model beside the promoted one."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks, the group open-llm-v1, or paths of task YAML files below the workspace."""
    limit: int = 0
    """Examples per task; 0: all."""
    refusals: bool = False
    """Score how often the models refuse what may be answered."""
    models: tuple[NamedModel, ...] = ()
    tasks_secret_prefix: str = ""
    """As in Source, for task files on s3."""
    # No part of its text, from which the operator makes the digest of what is scored: gates decide no score.
    gates: tuple[GateConfig, ...] = dataclasses.field(default=(), repr=False, metadata=SENT_IF_SET)
    """As they were when these settings were written: the operator judges by those of now, the run report by these."""


@dataclasses.dataclass(frozen=True)
class PromotionConfig:
    """Which checkpoint becomes the model, and where it goes."""

    select: str = "last"
    """last or best."""
    destinations: tuple[ModelDestination, ...] = ()
    digest: str = ""
    """Digest of the promoted model; empty until promotion has run."""
    weight_diff: bool = False
    """Make the difference from the base model, too, and copy it with the model."""

    @property
    def needs_publishing(self) -> bool:
        """Is there anything to make or to copy behind the gates?"""
        return bool(self.destinations) or self.weight_diff


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter that is composed over the promoted model."""

    name: str
    source: str
    """URL of a PEFT folder, or of a promoted model that has one, as in Source."""
    revision: str = ""
    weight: float = 1.0
    secret_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class CompositionConfig:
    """The adapters that are served over the promoted model, as one."""

    adapters: tuple[AdapterConfig, ...] = ()
    """Empty: the promoted model is served as it is."""
    method: str = "concatenate"
    """concatenate, svd, linear, ties, dare-linear or dare-ties."""
    rank: int = 0
    """Largest rank of the result; 0: what the method needs."""
    density: float = 0.5
    seed: int = 0
    digest: str = ""
    """Digest of the profile of the composition to serve; empty until it is composed."""


BASE_SUFFIX = "-base"
"""What an endpoint that serves adapters puts behind its name for the model without them."""


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """The endpoint."""

    model_name: str = ""
    """Name under which /v1/models lists the model."""
    port: int = 8000
    source: str = dataclasses.field(default="", metadata=SENT_IF_SET)
    """URL below which the promoted model's copy lies under its digest; empty: it is read from the workspace."""
    source_field: str = dataclasses.field(default="", metadata=SENT_IF_SET)
    """Path of the field that holds that URL, up to its last word, as in `spec.promotion.destinations[0]`."""
    secret_prefix: str = dataclasses.field(default="", metadata=SENT_IF_SET)
    """Prefix of the credential variables for the copy; empty: unprefixed variables."""


@dataclasses.dataclass(frozen=True)
class AttemptFacts:
    """What the operator remembers of one attempt at training."""

    number: int
    nodes: tuple[str, ...] = ()
    start_time: str = ""
    """RFC 3339; empty: not known."""
    end_time: str = ""
    reason: str = ""
    """Why it ended."""
    resumed_from_step: int = 0
    """0: it started from the base model, or nothing is known."""
    reached_step: int = 0
    steps_lost: int = 0
    seconds_lost: float = 0.0
    in_pod_restarts: int = 0


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What only the operator knows of the training: handed to the phases behind it, for the run report."""

    attempts: tuple[AttemptFacts, ...] = ()
    """The newest ones that are remembered, the oldest first."""
    restarts: int = 0
    restarts_by_reason: Mapping[str, int] = dataclasses.field(default_factory=dict)
    productive_seconds: float = 0.0
    """Time in the optimizer steps that led to the final weights."""
    allocated_seconds: float = 0.0
    """Time with training pods, over all attempts."""
    steps_lost: int = 0
    seconds_lost: float = 0.0
    images: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of the trainer and of the inference server."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that a pod needs to know."""

    model: Source
    dataset: DatasetConfig
    job: JobIdentity = JobIdentity()
    workspace: str = "/workspace"
    trust_remote_code: bool = False
    training: TrainingConfig = TrainingConfig()
    topology: Topology = Topology()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()
    composition: CompositionConfig = CompositionConfig()
    serving: ServingConfig = ServingConfig()
    history: RunHistory = RunHistory()
    """Empty while the job trains."""
    progress_deadline_seconds: int = 0
    """How long no rank may stand still between two steps; 0: for ever."""
    version: int = VERSION

    def to_json(self) -> str:
        """Return the settings as JSON with sorted keys: equal settings give equal text."""
        return json.dumps(to_plain(self), sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """Parse what `to_json` wrote. Raises RunConfigError that names the field at fault."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RunConfigError(f"the run configuration is not JSON: {error}") from error
        found = data.get("version") if isinstance(data, dict) else None
        if found != VERSION:
            raise RunConfigError(f"version: this image reads run configurations of version {VERSION}, not {found!r}")
        return typing.cast(RunConfig, parse(cls, data, "run configuration"))
