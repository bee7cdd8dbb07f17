"""A workspace that is lost while a job runs: with a mirror the job makes another and goes on, whenever it happens.

Runs the real Cluster and Reconciler on an API server in memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest

from finetune_contract.reports import ExitReport, Phase
from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.errors import ConflictError
from finetune_operator.lifecycle import next_step
from finetune_operator.news import select_events
from finetune_operator.observed import Claim, Exit
from finetune_operator.steps import Remove, Wait, WriteRecord
from tests.support import memory_api
from tests.support.memory_api import MemoryApi, OperatorKilledError
from tests.support.operator_parts import (
    NOW,
    make_attempt,
    make_batch_job,
    make_observed,
    make_pod,
    make_record,
    make_test_plan,
    make_training_job,
    seconds,
)
from tests.unit.operator.test_killed_at_any_moment import KEY, Clock, is_finished, make_api, make_reconciler, name_job

CLAIM = ("persistentvolumeclaims", "support-7b-workspace")
MIRROR = {"checkpoint": {"mirror": {"destination": "s3://bucket/checkpoints"}}}


async def lose_when(api: MemoryApi, job: str, clock: Clock) -> None:
    """Run a job to its end; its claim vanishes as soon as the Job with this suffix has been made."""
    reconciler, is_lost = make_reconciler(api, clock), False
    for _ in range(60):
        try:
            await reconciler.reconcile(KEY)
        except ConflictError:
            continue
        except OperatorKilledError:
            api.kill_at = None
            reconciler = make_reconciler(api, clock)
            continue
        if not is_lost and f"support-7b-{job}" in api.created:
            is_lost = True
            if job != "train-1":
                # A training Job goes on when its claim is gone; the others have just ended.
                api.play()
            del api.objects[CLAIM]
            continue
        api.play()
        if is_finished(api):
            return
    raise AssertionError(f"never finished: {api.find('finetunejobs', KEY[1]).get('status')}")


def run(job: str, kill_at: tuple[int, str] | None = None, **spec) -> MemoryApi:
    api = make_api(**(spec or MIRROR))
    api.kill_at = kill_at
    asyncio.run(lose_when(api, job, Clock()))
    return api


def summarise(api: MemoryApi) -> dict:
    status = api.find("finetunejobs", KEY[1])["status"]
    return {
        "state": status["state"],
        "restarts": (status.get("restarts", 0), status.get("restartsCountTowardsMax", 0)),
        "attempts": [(each["number"], each["reason"]) for each in status["attempts"]],
        "created": [name_job(name) for name in api.created],
        "has_claim": CLAIM in api.objects,
    }


@pytest.mark.parametrize(
    ("job", "attempts", "created"),
    [
        ("train-1", ["WorkspaceLost", "Completed"], ["train-1", "prepare", "train-2"]),
        ("promote", ["Completed", "Completed"], ["train-1", "promote", "prepare", "train-2"]),
        ("evaluate", ["Completed", "Completed"], ["train-1", "promote", "evaluate", "prepare", "train-2"]),
    ],
)
def test_everything_on_a_lost_workspace_is_made_again_and_no_restart_is_counted(job, attempts, created):
    found = summarise(run(job))

    assert (found["state"], found["has_claim"]) == ("Succeeded", True)
    assert [reason for _, reason in found["attempts"]] == attempts
    assert found["restarts"][1] == 0
    assert found["created"] == ["inspect", "prepare", *created, "promote", "evaluate", "publish", "compose", "smoke"]


def test_what_was_prepared_on_a_claim_that_has_been_replaced_since_is_prepared_again():
    plan = make_test_plan()
    claim = Claim(plan.workspace.claim, "new", "Bound", 2**40, created_at=NOW + seconds(1))
    job = make_batch_job(plan, Phase.PREPARE, is_succeeded=True, created_at=NOW)
    report = ExitReport(Phase.PREPARE, "Completed", "", details=memory_api.DETAILS["prepare"])
    pod = make_pod(job, phase="Succeeded", exit=Exit(0, "Completed", "", report, NOW))
    world = make_observed(plan, make_record(Phase.INSPECT), jobs=(job,), pods=(pod,), claim=claim)
    step = next_step(plan, world, NOW)
    assert isinstance(step, Remove)
    assert [each.name for each in step.references] == [job.name]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_operator_killed_at_any_write_of_the_recovery_ends_as_if_it_had_lived(moment):
    undisturbed = run("train-1")
    for number in range(1, undisturbed.writes + 1):
        assert summarise(run("train-1", (number, moment))) == summarise(undisturbed), f"killed {moment} write {number}"


def test_other_data_on_the_new_workspace_is_refused(monkeypatch):
    api = make_api(**MIRROR)
    clock = Clock()

    async def go_on() -> None:
        reconciler = make_reconciler(api, clock)
        while "support-7b-train-1" not in api.created:
            await reconciler.reconcile(KEY)
            api.play()
        del api.objects[CLAIM]
        monkeypatch.setitem(memory_api.DETAILS, "prepare", {**memory_api.DETAILS["prepare"], "dataset_digest": "other"})
        while not is_finished(api):
            await reconciler.reconcile(KEY)
            api.play()

    asyncio.run(go_on())
    status = api.find("finetunejobs", KEY[1])["status"]
    ready = next(each for each in status["conditions"] if each["type"] == "Ready")
    assert (status["state"], ready["reason"]) == ("Failed", "InputsChanged")
    assert "dataset: prepared anew after the workspace was lost, its digest is other" in ready["message"]
    assert "support-7b-train-2" not in api.created


def test_a_claim_of_the_users_own_that_is_gone_is_waited_for():
    plan = make_test_plan(workspace={"existingClaim": "shared"}, **MIRROR)
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan, end_time="2026-01-01T00:00:00Z"),), claim_uid="claim"
    )
    step = next_step(plan, make_observed(plan, record, claim=None), NOW)
    assert isinstance(step, WriteRecord)
    assert list(step.record.phases) == [Phase.INSPECT]
    assert step.record.expected_digests == {"dataset_digest": "d1", "model_digest": "m1"}

    step = next_step(plan, make_observed(plan, step.record, claim=None), NOW)
    assert isinstance(step, Wait)
    assert (step.situation.reason, step.situation.is_stalled) == ("ClaimNotFound", True)


def make_going_claim(plan, job):
    """Return a world whose claim is being deleted while this training Job is there."""
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim")
    claim = Claim(plan.workspace.claim, "claim", "Bound", 2**40, is_deleting=True)
    jobs = tuple(make_batch_job(plan, phase, is_succeeded=True) for phase in (Phase.INSPECT, Phase.PREPARE))
    return make_observed(plan, record, jobs=(*jobs, job), claim=claim)


@pytest.mark.parametrize("spec", [{}, MIRROR])
def test_training_goes_on_while_its_claim_is_being_deleted_under_it(spec):
    plan = make_test_plan(**spec)
    job = make_training_job(plan, active=1)
    step = next_step(plan, make_going_claim(plan, job), NOW)
    assert isinstance(step, Wait)
    assert step.situation.reason not in ("ClaimTerminating", "WorkspaceLost")


def test_ended_pods_that_keep_a_deleted_claim_are_removed_where_there_is_a_mirror():
    plan = make_test_plan(**MIRROR)
    job = make_training_job(plan, is_failed=True)
    world = make_going_claim(plan, job)
    step = next_step(plan, world, NOW)
    assert isinstance(step, WriteRecord)
    assert step.record.attempt.reason == "WorkspaceLost"

    closed = dataclasses.replace(world, record=step.record)
    step = next_step(plan, closed, NOW)
    assert isinstance(step, Remove)
    assert {each.name for each in step.references} == {plan.names.phase_job(Phase.PREPARE), job.name}

    step = next_step(plan, dataclasses.replace(closed, jobs=()), NOW)
    assert isinstance(step, Wait)
    assert (step.situation.reason, step.situation.is_stalled) == ("ClaimTerminating", False)


def test_ended_pods_keep_what_lies_on_a_deleted_claim_where_there_is_no_mirror():
    plan = make_test_plan()
    step = next_step(plan, make_going_claim(plan, make_training_job(plan, is_failed=True)), NOW)
    assert isinstance(step, Wait)
    assert (step.situation.reason, step.situation.is_stalled) == ("ClaimTerminating", True)
    assert "persistentVolumeReclaimPolicy: Retain" in step.situation.message


def test_the_loss_is_an_event():
    failure = {"time": "2026-01-01T00:00:00Z", "reason": "WorkspaceLost", "message": "the claim is gone"}
    new = FineTuneJobStatus.model_validate_json(json.dumps({"lastFailure": failure}), by_alias=True, by_name=False)
    assert select_events(FineTuneJobStatus(), new) == [("Warning", "WorkspaceLost", "the claim is gone")]
    assert select_events(new, new) == []
