"""What goes into a job: the base model and the instruction data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule
from finetune_operator.api.pods import SecretRef
from finetune_operator.api.quality import DatasetQuality
from finetune_operator.api.scalars import Revision, SourceUrl

DatasetFormat = Literal["auto", "alpaca", "evol", "sharegpt", "messages"]

PROMPT_TEMPLATES = ("wizardlm", "alpaca", "vicuna", "tokenizer")
"""Templates that a job may name."""


class BaseModelSource(Model):
    """The base model."""

    source: SourceUrl
    """Folder in Hugging Face layout: hf://organisation/name, s3://bucket/prefix, pvc://path on the workspace, or
    https:// of a tar archive."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository; the newest by default. What it means today is kept in
    status.resolved.modelRevision."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the source; by default the pod's identity is used."""


class DatasetSource(Model):
    """One of several sources."""

    source: SourceUrl
    """File or folder: hf://, s3://, https:// or pvc://."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository, or version of an object; the newest by default."""
    format: DatasetFormat | None = None
    """Format of the rows; by default the one of the data set."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Share of the rows to take: 0.5 takes a seeded half, 2 every row twice."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for this source."""


class DatasetFields(Model):
    """Names of the source's columns where they differ from ours."""

    instruction: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Column with the instruction."""
    input: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Column with the input that goes with the instruction."""
    output: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Column with the answer."""
    messages: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Column with the turns of a conversation."""


FilterAction = Literal["remove-row", "remove-sentence", "flag"]


class DatasetFilterActions(Model):
    """What follows when a rule matches, per category: `remove-row` leaves the row out, `remove-sentence` keeps the row
    without the sentences that match, `flag` keeps it and counts it in the report.
    """

    refusal: FilterAction = "remove-row"
    """The answer declines to do what was asked."""
    disclaimer: FilterAction = "remove-row"
    """The answer says that a language model wrote it, or that it is no professional advice."""
    moralising: FilterAction = "remove-row"
    """The answer lectures about ethics that nobody asked for."""
    identity: FilterAction = "remove-row"
    """The answer says who made it."""
    knowledge_cutoff: FilterAction = "remove-row"
    """The answer says when its knowledge ends, or that it cannot look things up."""


class DatasetFilter(Model):
    """Which rows are removed. Every removed row is kept in the report with the rule that removed it."""

    refusals: bool = True
    """Remove rows whose answer refuses, moralises or speaks as a language model."""
    rules: Literal["default", "legacy"] = "default"
    """`default`: word rules with categories; `legacy`: the phrase list of the unfiltered WizardLM data set."""
    extra_phrases: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=1000)] = []
    """Phrases that remove a row, besides the rules."""
    fields: Annotated[list[Literal["instruction", "input", "output"]], Field(max_length=3)] = []
    """Fields that are searched; by default the answers, with `rules: legacy` instruction and output."""
    language: Annotated[str, Field(pattern="^[a-z]{2}$", max_length=2)] | None = None
    """Two-letter code of the language whose rules apply; by default all."""
    actions: DatasetFilterActions | None = None
    """What follows when a rule matches; by default the row is removed."""

    validations = (
        Rule(
            "!has(self.actions) || self.rules != 'legacy'",
            "leave actions out with rules: legacy, which removes whole rows",
            lambda one: one.actions is None or one.rules != "legacy",
            field="actions",
        ),
    )


class DatasetJudge(Model):
    """A classifier that decides about rows beside the filter's rules. Code that comes with it is not run."""

    source: SourceUrl
    """Folder of a sequence classifier in Hugging Face layout with safetensors: hf://organisation/name,
    s3://bucket/prefix, or pvc://path on the workspace."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository; the newest by default."""
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=128)]], Field(max_length=64)] = []
    """Names or numbers of the classifier's labels that mean "remove"; by default those whose names say so."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability from which on a row is removed."""
    text: Annotated[str, Field(max_length=4096)] = "{output}"
    """What is judged: a text with `{output}` for an answer, and `{instruction}` for the question before it."""
    rows: Literal["doubted", "all"] = "doubted"
    """Which rows it decides: those in which a rule found something that weighs too little, or all the rules keep."""
    audit_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the rows the rules are sure of that is judged too, to report how far judge and rules agree; with
    `rows: all` every row is."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for the source; by default the pod's identity is used."""

    validations = (
        Rule(
            "!has(self.text) || self.text.contains('{output}')",
            "write a text that contains {output}",
            lambda judge: "{output}" in judge.text,
            field="text",
        ),
    )


class Dataset(Model):
    """The instruction data."""

    source: SourceUrl | None = None
    """File or folder with the rows: hf://, s3://, https:// or pvc://. JSON, JSON lines or Parquet."""
    sources: Annotated[list[DatasetSource], Field(max_length=32)] = []
    """Several sources, mixed by weight, instead of `source`."""
    revision: Revision | None = None
    """Branch, tag or commit of a hub repository, or version of an object; the newest by default."""
    format: DatasetFormat = "auto"
    """Format of the rows; `auto` reads it from the first rows."""
    fields: DatasetFields | None = None
    """Names of the source's columns where they differ from ours."""
    prompt_template: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """wizardlm, alpaca, vicuna, tokenizer (the model's own chat template), or a text with `{instruction}` and
    `{input}`. By default the recipe's: wizardlm for wizardlm-freeform, otherwise alpaca."""
    filter: DatasetFilter = DatasetFilter()
    """Which rows are removed."""
    quality: DatasetQuality | None = None
    """Checks besides the filter: truncated answers, leaked tokens, duplicates and the like; by default none."""
    judge: DatasetJudge | None = None
    """A classifier beside the filter's rules: for the rows they are unsure of, or for all; by default none."""
    holdout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Share of the rows kept out of training and used to evaluate."""
    max_bad_rows: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """How many rows may be unreadable before the data set is refused."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of the split and the mixing."""
    secret_ref: SecretRef | None = None
    """Secret with credentials for `source`."""

    validations = (
        Rule(
            "has(self.source) != (has(self.sources) && size(self.sources) > 0)",
            "write exactly one of source (one URL) and sources (a list)",
            lambda dataset: (dataset.source is None) == bool(dataset.sources),
        ),
        Rule(
            "has(self.source) || !(has(self.revision) || has(self.secretRef))",
            "with sources, write revision and secretRef in each entry of sources",
            lambda dataset: dataset.source is not None or (dataset.revision is None and dataset.secret_ref is None),
        ),
        Rule(
            "!has(self.promptTemplate) || self.promptTemplate in ['wizardlm', 'alpaca', 'vicuna', 'tokenizer']"
            " || self.promptTemplate.contains('{instruction}')",
            "write wizardlm, alpaca, vicuna, tokenizer, or a text that contains {instruction}",
            lambda dataset: (
                dataset.prompt_template is None
                or dataset.prompt_template in PROMPT_TEMPLATES
                or "{instruction}" in dataset.prompt_template
            ),
            field="promptTemplate",
        ),
    )
