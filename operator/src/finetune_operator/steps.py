"""The closed set of things one pass may do. Made by `lifecycle`, carried out by `cluster`, read by `status`."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any

from .record import Record

Object = Mapping[str, Any]
"""A whole Kubernetes object."""


@dataclasses.dataclass(frozen=True)
class Situation:
    """Where the job stands, in words for its user."""

    state: str
    """Display word of status.state."""
    reason: str
    message: str
    is_stalled: bool = False
    """A human must act."""
    condition: str = ""
    """Domain condition that is False for this reason; empty: none."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """One object to remove; with `uid` only that very one."""

    api_version: str
    kind: str
    name: str
    uid: str = ""

    @classmethod
    def to_job(cls, name: str, uid: str = "") -> Reference:
        """Return the reference to a Job."""
        return cls("batch/v1", "Job", name, uid)


@dataclasses.dataclass(frozen=True)
class Create:
    """Make objects that are never applied again: Jobs, frozen ConfigMaps. One that exists is left alone."""

    objects: tuple[Object, ...]
    situation: Situation


@dataclasses.dataclass(frozen=True)
class Apply:
    """Server-side apply objects that are kept as built."""

    objects: tuple[Object, ...]
    situation: Situation


@dataclasses.dataclass(frozen=True)
class Remove:
    """Delete objects; those that are gone already are no error."""

    references: tuple[Reference, ...]
    situation: Situation


@dataclasses.dataclass(frozen=True)
class Scale:
    """Set the replicas of a Deployment and whose it is; what is surplus then is removed first."""

    name: str
    replicas: int
    situation: Situation
    job: tuple[str, str] = ("", "")
    """Name and UID of the job that it belongs to from now on; empty: it stays whose it is."""
    surplus: tuple[Reference, ...] = ()


@dataclasses.dataclass(frozen=True)
class WriteRecord:
    """Replace the record, unless somebody else wrote it since it was observed."""

    record: Record
    situation: Situation


@dataclasses.dataclass(frozen=True)
class SetFinalizer:
    """Put the job's finalizer there, or take it away."""

    is_wanted: bool
    situation: Situation


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing to do until something changes, or until `until`.

    `kept` is applied on every pass, so that drift is mended.
    """

    situation: Situation
    until: datetime.datetime | None = None
    kept: tuple[Object, ...] = ()


@dataclasses.dataclass(frozen=True)
class Finish:
    """Nothing to do any more, but for what `until` brings, and to keep what is served as it is."""

    situation: Situation
    until: datetime.datetime | None = None
    kept: tuple[Object, ...] = ()


Step = Create | Apply | Remove | Scale | WriteRecord | SetFinalizer | Wait | Finish
