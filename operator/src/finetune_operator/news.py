"""The events that a change of status is worth: transitions only. Pure; used by `reconcile`."""

from __future__ import annotations

from finetune_contract.reports import Reason as PodReason

from .api.v1alpha1 import FineTuneJobStatus
from .conditions import Reason, Type

Previous = FineTuneJobStatus


def select_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    """Return the events (type, reason, message) that a change of status is worth: transitions only."""
    before = {each.type: each for each in old.conditions}
    events = []
    for each in new.conditions:
        known = before.get(each.type)
        if known is not None and (known.status, known.reason) == (each.status, each.reason):
            continue
        if each.type == Type.STALLED and each.status == "True":
            events.append(("Warning", each.reason, each.message))
        elif each.type in _ANNOUNCED and each.status == "True" and (known is None or known.status != "True"):
            events.append(("Normal", f"{each.type}", each.message or f"{each.type} holds"))
        elif each.type == Type.SCHEDULED and each.status == "False":
            events.append(("Warning", each.reason, each.message))
        elif each.type in _FETCHED and (each.status, each.reason) == ("False", PodReason.SOURCE_UNAVAILABLE):
            # It is tried again, so nobody has to act yet; but somebody may want to know why it takes so long.
            events.append(("Warning", each.reason, each.message))
    events += _select_attempt_events(old, new)
    events += _select_data_events(old, new)
    events += _select_serving_events(old, new)
    avoided = {(each.name, each.until) for each in old.excluded_nodes}
    for node in new.excluded_nodes:
        if (node.name, node.until) not in avoided:
            text = f"node {node.name} is avoided until {node.until:%Y-%m-%dT%H:%M:%SZ}: {node.reason}"
            events.append(("Warning", "NodeExcluded", text))
    lost = new.last_failure
    if lost is not None and lost.reason == Reason.WORKSPACE_LOST and lost != old.last_failure:
        events.append(("Warning", lost.reason, lost.message))
    if new.state == "Suspended" and old.state != "Suspended":
        events.append(("Normal", "Suspended", "the job is suspended"))
    return events


_ANNOUNCED = frozenset(
    {
        *(Type.VALIDATED, Type.STORAGE_READY, Type.MODEL_READY, Type.DATASET_READY, Type.PROMOTED, Type.EVALUATED),
        *(Type.DEPLOYED, Type.SUCCEEDED),
    }
)
_FETCHED = frozenset({Type.MODEL_READY, Type.DATASET_READY, Type.PROMOTED})
"""What needs a remote service."""


def _select_data_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    before, after = old.dataset, new.dataset
    events = []
    if after is not None and after.packing == "Refused" and (before is None or before.packing != "Refused"):
        text = "examples are padded: this model's architecture would let examples in one sequence see each other"
        events.append(("Warning", "PackingRefused", text))
    if after is not None and after.examples_dropped and not (before is not None and before.examples_dropped):
        text = (
            f"{after.examples_dropped} training examples are left out: their prompts leave no room for an answer in "
            "training.maxLength"
        )
        events.append(("Warning", "ExamplesDropped", text))
    return events


def _select_serving_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    """Tell which version an endpoint has gone over to."""
    before, after = old.serving, new.serving
    if after is None or before is None or not after.version or before.version in (None, after.version):
        return []
    return [("Normal", "VersionChanged", f"{after.url} answers with version {after.version}, after {before.version}")]


def _select_attempt_events(old: Previous, new: Previous) -> list[tuple[str, str, str]]:
    known = {each.number: each for each in old.attempts}
    events = []
    newest = new.attempts[-1] if new.attempts else None
    is_same = newest is not None and newest.number in known and newest.end_time is None
    if newest is not None and is_same and (new.restarts or 0) > (old.restarts or 0):
        text = f"attempt {newest.number}: ranks that crashed were restarted inside their pod, whose log says why"
        events.append(("Warning", "RanksRestarted", text))
    for attempt in new.attempts:
        before = known.get(attempt.number)
        if before is None:
            events.append(("Normal", "AttemptStarted", f"attempt {attempt.number} starts as Job {attempt.job}"))
        if attempt.end_time is not None and (before is None or before.end_time is None):
            failure = new.last_failure
            is_good = attempt.reason in (Reason.COMPLETED, Reason.SUSPENDED)
            text = f"attempt {attempt.number} ended: {attempt.reason}"
            if not is_good and failure is not None:
                text = f"{text}: {failure.message}"[:1000]
            events.append(("Normal" if is_good else "Warning", "AttemptEnded", text))
    return events
