"""What is removed when: finished pods after the time to live, the workspace where its retention says so. Pure."""

from __future__ import annotations

import datetime

from finetune_contract.reports import Phase
from finetune_operator import naming
from finetune_operator.observed import Observed
from finetune_operator.plan import Plan
from finetune_operator.record import Terminal, to_time
from finetune_operator.steps import Reference


def next_cleanup(plan: Plan, terminal: Terminal) -> datetime.datetime | None:
    """Return when the finished job's pods go; None: never."""
    ended = to_time(terminal.time)
    if plan.deadlines.time_to_live < 0 or ended is None:
        return None
    return ended + datetime.timedelta(seconds=plan.deadlines.time_to_live)


def list_finished_children(plan: Plan, observed: Observed) -> tuple[Reference, ...]:
    """Return what a finished job no longer needs. The record, the plan and what is served are not in it."""
    composing = {job.name for job in observed.jobs if job.component == Phase.COMPOSE and not job.is_succeeded}
    kept = {plan.names.plan_map, plan.names.record_map, *composing}
    jobs = tuple(
        Reference.to_job(job.name, job.uid)
        for job in observed.jobs
        # A job that has finished may still go over to another version: it composes, and asks the smoke prompt.
        if not job.is_deleting and job.component != naming.SMOKE and job.name not in composing
    )
    maps = tuple(Reference("v1", "ConfigMap", name) for name in observed.config_maps if name not in kept)
    others = tuple(Reference(*child) for child in observed.other_children)
    return (*jobs, *maps, *others)


def list_surplus_workspace(plan: Plan, observed: Observed) -> tuple[Reference, ...]:
    """Return the workspace of a finished job when its retention policy removes it then."""
    claim = observed.claim
    if claim is None or claim.is_deleting or plan.workspace.is_existing or not plan.workspace.is_deleted_when_finished:
        return ()
    return (Reference("v1", "PersistentVolumeClaim", claim.name, claim.uid),)
