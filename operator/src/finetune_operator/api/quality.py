"""What the rows of a data set are checked for besides refusals."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_operator.api.base import Model, Rule

QualityAction = Literal["remove-row", "flag"]
ExpectedLanguage = Literal["ar", "de", "en", "es", "fr", "it", "ja", "ko", "nl", "pt", "ru", "zh"]
PiiKind = Literal["email", "phone", "iban", "credit-card", "ip-address"]


class DatasetLanguage(Model):
    """The language that answers are expected in."""

    expected: Annotated[list[ExpectedLanguage], Field(min_length=1, max_length=12)]
    """Two-letter codes; an answer that is clearly in none of them is found."""
    action: QualityAction = "remove-row"
    """What follows; `flag` keeps the row and counts it in the report."""


class DatasetPii(Model):
    """Personal data."""

    kinds: Annotated[list[PiiKind], Field(min_length=1, max_length=5)] = [
        "email",
        "phone",
        "iban",
        "credit-card",
        "ip-address",
    ]
    """What counts as personal; by default all."""
    action: QualityAction = "remove-row"
    """What follows; `flag` keeps the row and counts it in the report."""


class DatasetDuplicates(Model):
    """Rows that were there before."""

    similarity: Annotated[float, Field(ge=0, le=1)] = 1.0
    """1 finds rows of equal text, whatever their case, quotes and spaces; less finds also rows that share about this
    much of their word triples (Jaccard similarity)."""
    action: QualityAction = "remove-row"
    """What follows for every such row but the first; `flag` keeps them and counts them in the report."""

    validations = (
        Rule(
            "self.similarity >= 0.5",
            "write 0.5 to 1: rows that share less are not duplicates",
            lambda duplicates: duplicates.similarity >= 0.5,
            field="similarity",
        ),
    )


class DatasetContamination(Model):
    """Rows that hold text of the tasks in evaluation.tasks, which would make the scores too good."""

    words: Annotated[int, Field(ge=8, le=50)] = 13
    """How many words in a row have to be shared."""
    action: QualityAction = "remove-row"
    """What follows; `flag` keeps the row and counts it in the report."""


class DatasetQuality(Model):
    """Checks besides the filter, each made only when it is written here. Rows without an answer, or with turns in an
    order that no chat has, are removed in any case.
    """

    truncated: QualityAction | None = None
    """Answers that break off: an open code block, a last sentence without its end."""
    repetition: QualityAction | None = None
    """Answers that repeat themselves over and over."""
    html: QualityAction | None = None
    """Remains of HTML that nobody asked for."""
    special_tokens: QualityAction | None = None
    """Tokens of a chat template inside a text, as in <|im_end|> or [INST]."""
    language: DatasetLanguage | None = None
    """The language that answers are expected in."""
    pii: DatasetPii | None = None
    """Personal data: mail addresses, phone and card numbers and the like."""
    duplicates: DatasetDuplicates | None = None
    """Rows that were there before."""
    contamination: DatasetContamination | None = None
    """Rows that hold text of the tasks in evaluation.tasks."""
