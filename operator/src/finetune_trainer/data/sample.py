"""Seeded samples of what each rule found, for a person to review.

Of every rule the rows with the smallest hash of seed, rule and place are kept: the sample is the same for any order of
the rows and any number of workers, two samples merge into the sample of both, and memory is bounded by the rules.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from finetune_trainer.data.findings import Finding

SAMPLES_PER_RULE = 5
_AROUND = 160
"""Characters shown on either side of what was found."""
_FOUND = 400
"""Characters shown of what was found."""


@dataclasses.dataclass(frozen=True, order=True)
class Sample:
    """One thing found, with the text around it."""

    order: int
    """The hash that decides which rows are in the sample."""
    action: str
    rule: str
    source: int
    index: int
    field: str
    before: str
    found: str
    after: str

    def to_facts(self) -> dict[str, Any]:
        """Return the sample as the report shows it."""
        facts = dataclasses.asdict(self)
        del facts["order"]
        return facts


class Samples:
    """The samples of all rules."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: dict[tuple[str, str], list[Sample]] = {}

    def offer(self, source: int, index: int, finding: Finding, messages: Sequence[Mapping[str, str]]) -> None:
        """Take a finding into the sample of its rule if its hash is among the smallest."""
        text = f"{self._seed}:{finding.rule}:{finding.action}:{source}:{index}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        order = int.from_bytes(digest, "big") >> 1
        kept = self._kept.setdefault((finding.action, finding.rule), [])
        if len(kept) == SAMPLES_PER_RULE and order >= kept[-1].order:
            return
        excerpt = _cut(find_text(messages, finding.field), *finding.span)
        kept.append(Sample(order, finding.action, finding.rule, source, index, finding.field, *excerpt))
        _keep_smallest(kept)

    def merge(self, other: Samples) -> None:
        """Take over what belongs into the sample of both."""
        for key, samples in other._kept.items():
            kept = self._kept.setdefault(key, [])
            kept += samples
            _keep_smallest(kept)

    def to_state(self) -> list[list[Any]]:
        """Return what `load` needs."""
        return [list(dataclasses.astuple(sample)) for key in sorted(self._kept) for sample in self._kept[key]]

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up what `to_state` described."""
        for item in state:
            sample = Sample(*item)
            self._kept.setdefault((sample.action, sample.rule), []).append(sample)

    def to_report(self) -> list[dict[str, Any]]:
        """Return all samples, by action and rule, each in the order of the rows."""
        rows = (sorted(self._kept[key], key=lambda one: (one.source, one.index)) for key in sorted(self._kept))
        return [sample.to_facts() for samples in rows for sample in samples]


def _keep_smallest(samples: list[Sample]) -> None:
    samples.sort()
    del samples[SAMPLES_PER_RULE:]


def find_text(messages: Sequence[Mapping[str, str]], field: str) -> str:
    """Return the text of a row's messages that stood in a field of the source row, as in `conversations[3].value`."""
    number = field.partition("[")[2].partition("]")[0]
    if number.isdigit() and int(number) < len(messages):
        return messages[int(number)]["content"]
    if field == "input":
        return messages[0].get("input", "")
    return messages[0 if field == "instruction" else -1]["content"]


def _cut(text: str, start: int, end: int) -> tuple[str, str, str]:
    """Return bounded pieces of a text before, inside and after a span; an ellipsis stands for what was left out."""
    before, found, after = text[:start], text[start:end], text[end:]
    if len(before) > _AROUND:
        before = "…" + before[-_AROUND:]
    if len(found) > _FOUND:
        found = found[:_FOUND] + "…"
    if len(after) > _AROUND:
        after = after[:_AROUND] + "…"
    return before, found, after
