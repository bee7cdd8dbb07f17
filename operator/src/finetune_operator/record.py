"""What must outlive a job's children: attempts, counters, results of phases, the end. Kept in ConfigMap `<job>-record`.

Written by `reconcile` before a child is removed or the next attempt starts; read back as part of what exists.
Pure: parsing and printing only. A newer release may add fields; unknown ones are kept out, never an error.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from typing import Any

VERSION = 1
KEY = "record.json"
"""Key in the ConfigMap's data."""
MAX_ATTEMPTS = 10
"""How many attempts are kept, the newest ones."""
MAX_COMPOSITIONS = 10
"""How many compositions of adapters are kept, the newest ones."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """The last thing that went wrong in a pod."""

    time: str
    reason: str
    message: str
    hint: str = ""
    pod: str = ""
    node: str = ""
    exit_code: int = 0

    @property
    def advice(self) -> str:
        """What went wrong and what to do about it, in one line."""
        return f"{self.message}: {self.hint}" if self.hint else self.message


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One run of the training Job."""

    number: int
    job: str
    uid: str = ""
    """UID of the Job; empty until it has been seen. Tells "not made yet" from "removed by somebody"."""
    digest: str = ""
    """Digest of the settings that may differ between attempts."""
    nodes: tuple[str, ...] = ()
    start_time: str = ""
    end_time: str = ""
    """Empty while it runs."""
    reason: str = ""
    message: str = ""
    exit_code: int = 0
    resumed_from_step: int | None = None
    last_step: int = 0
    """Newest complete checkpoint's step, as far as is known."""
    is_counted: bool = False
    """It uses up one of failurePolicy.maxRestarts."""
    in_pod_restarts: int = 0
    """How often its ranks were restarted inside their pod; each is a restart that counts."""
    reached_step: int = 0
    """Last optimizer step done, as far as is known."""
    productive_seconds: float = 0.0
    """Time in the optimizer steps that led there, those of earlier attempts included."""
    save_seconds: float = 0.0
    """Time of its newest save; 0: none was measured."""
    steps_lost: int = 0
    """Steps that restarts threw away: those inside its pod, and the one that followed it."""
    seconds_lost: float = 0.0
    """The time of those steps."""
    is_settled: bool = False
    """An attempt after it has said where it went on."""
    disruption: Failure | None = None
    """What was seen of a pod that was being taken away: it may vanish before its Job has failed."""


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """One node that the job avoids."""

    node: str
    reason: str
    until: str
    """When it may be used again."""


@dataclasses.dataclass(frozen=True)
class Terminal:
    """How the job ended."""

    result: str
    """Succeeded or Failed."""
    reason: str
    message: str
    time: str
    phase: str = ""
    """Phase that failed."""
    digest: str = ""
    """Digest of the settings under which it failed: other settings take the job up again."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that is remembered of one job."""

    uid: str = ""
    """UID of the job: a record of another job with the same name is not ours."""
    start_time: str = ""
    phases: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Results (`ExitReport.details`) of the phases that are done, by phase."""
    attempts: tuple[Attempt, ...] = ()
    restarts: int = 0
    restarts_counted: int = 0
    restarts_by_reason: Mapping[str, int] = dataclasses.field(default_factory=dict)
    failures_without_progress: int = 0
    """Consecutive failed attempts that completed no new checkpoint; sets the backoff."""
    global_batch: int = 0
    """Sequences per optimizer step over all processes, fixed by the first attempt; 0: not yet."""
    save_seconds: float = 0.0
    """Longest measured save, from its start until it was committed; sets how long pods may take to stop."""
    step_seconds: float = 0.0
    """Longest measured optimizer step."""
    active_seconds: float = 0.0
    """Time with pods, over all Jobs that have ended."""
    training_seconds: float = 0.0
    """Time with training pods, over all attempts that have ended."""
    productive_seconds: float = 0.0
    """Time in the optimizer steps that led to the weights of the newest attempt that has ended; lost ones are off."""
    steps_lost: int = 0
    """Steps that restarts threw away, over all attempts."""
    seconds_lost: float = 0.0
    """The time of those steps."""
    storage_full_at: int = 0
    """Capacity in bytes at which the workspace was full; 0: it is not."""
    claim_uid: str = ""
    """UID of the workspace's claim once data lies on it: another claim of that name is an empty one."""
    expected_digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Digests of data and model that were on a workspace since lost: prepared anew, they must be the same."""
    excluded_nodes: tuple[Exclusion, ...] = ()
    """Nodes that the next attempt avoids, the oldest first."""
    last_failure: Failure | None = None
    compositions: tuple[Mapping[str, Any], ...] = ()
    """Results (`ExitReport.details`) of the compositions of adapters, each with `request`, the digest of what was asked
    for; the newest ones, the oldest first."""
    deployed_digest: str = ""
    """Digest that the endpoint served when it was ready last; empty: never yet."""
    terminal: Terminal | None = None
    version: int = VERSION

    @property
    def attempt(self) -> Attempt | None:
        """The newest attempt, if any."""
        return self.attempts[-1] if self.attempts else None

    def has_done(self, phase: str) -> bool:
        """Has the phase ended well?"""
        return phase in self.phases

    def details(self, phase: str) -> Mapping[str, Any]:
        """Results of a phase; empty when it is not done."""
        return self.phases.get(phase, {})

    def with_phase(self, phase: str, details: Mapping[str, Any]) -> Record:
        """Return the record with the phase done."""
        return dataclasses.replace(self, phases={**self.phases, phase: dict(details)})

    def with_composition(self, request: str, details: Mapping[str, Any]) -> Record:
        """Return the record with a composition added."""
        others = [each for each in self.compositions if each["request"] != request]
        kept = (*others, {**details, "request": request})[-MAX_COMPOSITIONS:]
        return dataclasses.replace(self, compositions=kept)

    def with_attempt(self, attempt: Attempt) -> Record:
        """Return the record with the attempt added, or replaced when it is there."""
        others = tuple(each for each in self.attempts if each.number != attempt.number)
        return dataclasses.replace(self, attempts=(*others, attempt)[-MAX_ATTEMPTS:])

    def to_json(self) -> str:
        """Return the record as JSON; equal records give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def read_record(text: str) -> Record:
    """Parse what `to_json` wrote, of this or another release. Raises ValueError when it is not JSON of a record."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("the record is not an object")
    fields = _known(Record, data)
    fields["attempts"] = tuple(_read_attempt(each) for each in data.get("attempts", ()))
    fields["compositions"] = tuple(data.get("compositions", ()))
    fields["excluded_nodes"] = tuple(Exclusion(**_known(Exclusion, each)) for each in data.get("excluded_nodes", ()))
    terminal = data.get("terminal")
    fields["last_failure"] = _read_failure(data.get("last_failure"))
    fields["terminal"] = Terminal(**_known(Terminal, terminal)) if terminal else None
    return Record(**fields)


def _read_attempt(data: Mapping[str, Any]) -> Attempt:
    fields = _known(Attempt, data)
    fields["nodes"] = tuple(data.get("nodes", ()))
    fields["disruption"] = _read_failure(data.get("disruption"))
    return Attempt(**fields)


def _read_failure(data: Mapping[str, Any] | None) -> Failure | None:
    return Failure(**_known(Failure, data)) if data else None


def _known(kind: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def to_time(text: str) -> datetime.datetime | None:
    """Parse a Kubernetes time; None for an empty text."""
    if not text:
        return None
    return datetime.datetime.fromisoformat(text)


def to_text(time: datetime.datetime) -> str:
    """Print a time as Kubernetes does, to the second."""
    return time.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
