"""The state machine: from what exists to what is done next."""

from __future__ import annotations

import dataclasses

import pytest

from finetune_contract.reports import Metric, Phase, ProgressReport
from finetune_operator.errors import InvalidJobError
from finetune_operator.lifecycle import next_step
from finetune_operator.observed import Claim, Observed, PodCondition, Progress
from finetune_operator.record import Exclusion, Failure, Record, Terminal, read_record, to_text
from finetune_operator.steps import Apply, Create, Finish, Remove, Wait, WriteRecord
from tests.support.operator_parts import (
    NOW,
    UID,
    make_attempt,
    make_batch_job,
    make_exit,
    make_observed,
    make_pod,
    make_record,
    make_report,
    make_test_plan,
    make_training_job,
    seconds,
)

TRAINED = (Phase.INSPECT, Phase.PREPARE, Phase.TRAIN)
EVALUATED = (*TRAINED, Phase.PROMOTE, Phase.EVALUATE)
LATER = NOW + seconds(30)


def look(plan, observed, now=LATER):
    return next_step(plan, observed, now)


def names_of(step) -> list[tuple[str, str]]:
    return [(each["kind"], each["metadata"]["name"]) for each in step.objects]


def make_training_world(plan, *pods, job=None, record=None, **fields):
    """Return a world in which attempt 1 is under way."""
    job = job or make_training_job(plan)
    record = record or make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim")
    return make_observed(plan, record, jobs=(job,), pods=pods, **fields)


def end_attempt(plan, report_code=1, reason="RankFailed", spec_record=None, **fields):
    """Return the step after the one pod of attempt 1 failed."""
    job = make_training_job(plan, is_failed=True, ended_at=NOW + seconds(10))
    ended = make_exit(
        report_code, report=make_report("train", report_code, reason, "boom", details=fields.pop("details", {}))
    )
    pod = make_pod(job, phase="Failed", exit=ended, **fields)
    return look(plan, make_training_world(plan, pod, job=job, record=spec_record))


def test_a_new_job_is_remembered_before_anything_is_made():
    step = look(make_test_plan(), Observed(Record()))
    assert isinstance(step, WriteRecord)
    assert step.record == Record(uid=UID)


def test_what_an_earlier_job_of_the_name_left_is_waited_for():
    step = look(make_test_plan(), Observed(Record(uid="other"), record_version="1"))
    assert isinstance(step, Wait)
    assert step.situation.reason == "NameInUse"


def test_inspect_comes_first_and_mounts_no_workspace():
    step = look(plan := make_test_plan(), make_observed(plan))
    assert isinstance(step, Create)
    (kind, name), job = names_of(step)
    assert (kind, name[:19], job) == ("ConfigMap", "support-7b-inspect-", ("Job", "support-7b-inspect"))
    assert "persistentVolumeClaim" not in str(step.objects[1])


def test_an_inspect_job_of_older_sources_is_made_anew():
    plan = make_test_plan()
    step = look(plan, make_observed(plan, jobs=(make_batch_job(plan, "inspect", source_digest="older"),)))
    assert isinstance(step, Remove)
    assert step.references[0].uid == "support-7b-inspect-uid"


def test_what_inspect_found_is_remembered_and_starts_the_job():
    plan = make_test_plan()
    job = make_batch_job(plan, "inspect", is_succeeded=True)
    report = make_report("inspect", 0, "Completed", "", details={"model_parameters": 5})
    step = look(plan, make_observed(plan, jobs=(job,), pods=(make_pod(job, exit=make_exit(report=report)),)))
    assert isinstance(step, WriteRecord)
    assert step.record.details(Phase.INSPECT) == {"model_parameters": 5}
    assert step.record.start_time == to_text(LATER)


def test_a_phase_whose_pod_vanished_before_it_was_read_runs_again():
    plan = make_test_plan()
    step = look(plan, make_observed(plan, jobs=(make_batch_job(plan, "inspect", is_succeeded=True),)))
    assert isinstance(step, Remove)


def test_a_phase_that_left_no_report_fails_the_job():
    plan = make_test_plan()
    job = make_batch_job(plan, "inspect", is_succeeded=True)
    step = look(plan, make_observed(plan, jobs=(job,), pods=(make_pod(job, exit=make_exit(message="hello")),)))
    assert step.record.terminal.reason == "ReportMissing"


def test_the_plan_is_frozen_once_the_job_has_started():
    plan = make_test_plan()
    step = look(plan, make_observed(plan, make_record(Phase.INSPECT), frozen_plan=""))
    assert isinstance(step, Create)
    assert names_of(step) == [("ConfigMap", "support-7b-plan")]
    assert step.objects[0]["immutable"] is True


def test_a_workspace_of_the_computed_size_comes_before_preparing():
    plan = make_test_plan()
    step = look(plan, make_observed(plan, make_record(Phase.INSPECT), claim=None))
    assert isinstance(step, Apply)
    assert step.objects[0]["spec"]["resources"]["requests"]["storage"] == "1Gi"


def test_a_workspace_only_grows():
    plan = make_test_plan(workspace={"size": "10Gi"})
    small = Claim(plan.workspace.claim, phase="Bound", requested_bytes=5 * 2**30)
    large = dataclasses.replace(small, requested_bytes=50 * 2**30)
    assert isinstance(look(plan, make_observed(plan, make_record(Phase.INSPECT), claim=small)), Apply)
    assert isinstance(look(plan, make_observed(plan, make_record(Phase.INSPECT), claim=large)), Create)


def test_a_workspace_that_was_lost_with_its_data_fails_the_job():
    plan = make_test_plan()
    record = make_record(Phase.INSPECT, Phase.PREPARE, claim_uid="the-old-one")
    step = look(plan, make_observed(plan, record))
    assert (step.record.terminal.reason, step.record.terminal.phase) == ("WorkspaceLost", Phase.TRAIN)


def test_an_attempt_is_remembered_before_its_job_is_made():
    plan = make_test_plan()
    world = make_observed(plan, make_record(Phase.INSPECT, Phase.PREPARE, claim_uid="claim"))
    step = look(plan, world)
    assert isinstance(step, WriteRecord)
    assert (step.record.attempt.number, step.record.attempt.uid, step.record.global_batch) == (1, "", 8)
    step = look(plan, dataclasses.replace(world, record=step.record))
    assert isinstance(step, Create)
    assert names_of(step) == [("ConfigMap", "support-7b-train-1"), ("Job", "support-7b-train-1")]


def test_service_and_disruption_budget_come_before_the_first_pods():
    plan = make_test_plan()
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan, uid=""),), claim_uid="claim")
    step = look(plan, make_observed(plan, record, other_children=()))
    assert isinstance(step, Apply)
    assert names_of(step) == [("Service", "support-7b-train"), ("PodDisruptionBudget", "support-7b-train")]


def test_a_training_job_that_was_seen_and_is_gone_was_deleted():
    plan = make_test_plan()
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim")
    step = look(plan, make_observed(plan, record))
    assert isinstance(step, WriteRecord)
    assert step.record.attempt.reason == "JobDeleted"
    assert (step.record.restarts, step.record.restarts_counted) == (1, 0)


def test_a_training_job_that_was_never_seen_is_made():
    plan = make_test_plan()
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan, uid=""),), claim_uid="claim")
    assert isinstance(look(plan, make_observed(plan, record)), Create)


def test_where_and_when_an_attempt_runs_is_remembered_while_its_pods_are_there():
    plan = make_test_plan()
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan, start_time=""),), claim_uid="claim")
    job = make_training_job(plan)
    step = look(plan, make_training_world(plan, make_pod(job), job=job, record=record))
    assert isinstance(step, WriteRecord)
    assert (step.record.attempt.nodes, step.record.attempt.start_time) == (("node-0",), to_text(NOW))


def test_an_attempt_whose_pods_vanished_keeps_its_times():
    plan = make_test_plan()
    step = look(plan, make_training_world(plan, job=make_training_job(plan, is_failed=True, ended_at=NOW + seconds(7))))
    assert (step.record.attempt.reason, step.record.attempt.start_time) == ("PodDeleted", to_text(NOW))
    assert step.record.active_seconds == 7


def test_the_end_of_training_is_remembered_with_what_rank_0_reports():
    plan = make_test_plan()
    job = make_training_job(plan, is_succeeded=True, ended_at=NOW + seconds(10))
    report = make_report("train", 0, "Completed", "", details={"latest_complete": 100, "resumed_from_step": 60})
    step = look(plan, make_training_world(plan, make_pod(job, exit=make_exit(report=report)), job=job))
    assert step.record.has_done(Phase.TRAIN)
    assert (step.record.attempt.reason, step.record.attempt.resumed_from_step) == ("Completed", 60)
    assert step.record.active_seconds == 10


def test_a_failed_attempt_is_counted_and_followed_by_another():
    step = end_attempt(make_test_plan(), details={"latest_complete": 40})
    assert (step.record.restarts, step.record.restarts_counted) == (1, 1)
    assert step.record.restarts_by_reason == {"RankFailed": 1}
    assert step.record.failures_without_progress == 0
    assert step.situation.state == "Restarting"


def test_failures_without_a_new_checkpoint_lengthen_the_backoff():
    plan = make_test_plan()
    record = make_record(
        Phase.INSPECT,
        Phase.PREPARE,
        attempts=(make_attempt(plan),),
        claim_uid="claim",
        failures_without_progress=3,
    )
    assert end_attempt(plan, spec_record=record).record.failures_without_progress == 4


def test_a_job_ends_when_its_restarts_are_used_up():
    plan = make_test_plan(failurePolicy={"maxRestarts": 2})
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim", restarts_counted=2
    )
    terminal = end_attempt(plan, spec_record=record).record.terminal
    assert (terminal.result, terminal.reason, terminal.phase) == ("Failed", "RestartsExhausted", Phase.TRAIN)


def test_the_next_attempt_waits_for_its_backoff_and_then_for_nothing():
    plan = make_test_plan()
    ended = make_attempt(plan, end_time=to_text(NOW), reason="RankFailed", message="boom")
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(ended,), claim_uid="claim", failures_without_progress=3, global_batch=8
    )
    world = make_observed(plan, record)
    step = look(plan, world, NOW + seconds(1))
    assert isinstance(step, Wait)
    assert step.until == NOW + seconds(8)
    step = look(plan, world, NOW + seconds(8))
    assert (step.record.attempt.number, step.record.global_batch) == (2, 8)


def test_an_attempt_that_cannot_keep_the_global_batch_is_refused_before_it_exists():
    plan = make_test_plan(training={"perDeviceBatchSize": 1}, resources={"gpusPerNode": 3})
    ended = make_attempt(plan, end_time=to_text(NOW), reason="Suspended")
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(ended,), claim_uid="claim", global_batch=8)
    with pytest.raises(InvalidJobError, match=r"3 processes do not divide the 8 sequences per step .* 1, 2, 4, 8$"):
        look(plan, make_observed(plan, record), NOW)


def test_the_next_attempt_waits_for_old_pods_but_not_for_those_of_lost_nodes():
    plan = make_test_plan()
    ended = make_attempt(plan, end_time=to_text(NOW), reason="NodeLost")
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(ended,), claim_uid="claim")
    pod = make_pod(make_training_job(plan), deleting_since=NOW, grace_seconds=300)
    world = make_observed(plan, record, pods=(pod,))
    assert isinstance(look(plan, world, NOW + seconds(330)), Wait)
    assert isinstance(look(plan, world, NOW + seconds(370)), WriteRecord)
    lost = {"DisruptionTarget": PodCondition("True", "DeletionByTaintManager")}
    world = make_observed(plan, record, pods=(dataclasses.replace(pod, conditions=lost),))
    assert isinstance(look(plan, world, NOW + seconds(30)), Wait)
    assert isinstance(look(plan, world, NOW + seconds(70)), WriteRecord)


def make_disrupted_pod(job, is_ready, reason="DeletionByTaintManager", **fields):
    """Return a pod that was asked to go; kubelet alone, or its silence, makes it unready."""
    conditions = {
        "DisruptionTarget": PodCondition("True", reason, "deleting due to a NoExecute taint"),
        "Ready": PodCondition("True" if is_ready else "False"),
    }
    return make_pod(job, conditions=conditions, deleting_since=NOW, grace_seconds=300, **fields)


def test_an_attempt_on_a_node_that_does_not_answer_is_given_up_while_its_pod_is_still_there():
    plan = make_test_plan()
    job = make_training_job(plan)
    step = look(plan, make_training_world(plan, make_disrupted_pod(job, is_ready=False), job=job), NOW + seconds(1))
    assert isinstance(step, WriteRecord)
    assert (step.record.attempt.reason, step.record.last_failure.node) == ("NodeLost", "node-0")
    assert (step.record.restarts, step.record.restarts_counted) == (1, 0)


@pytest.mark.parametrize("reason", ["DeletionByTaintManager", "PreemptionByScheduler"])
def test_a_pod_that_is_taken_away_is_remembered_and_left_to_save_in_peace(reason):
    plan = make_test_plan()
    job = make_training_job(plan)
    pod = make_disrupted_pod(job, is_ready=True, reason=reason)
    remembered = look(plan, make_training_world(plan, pod, job=job))
    assert isinstance(remembered, WriteRecord)
    assert remembered.record.attempt.end_time == ""
    world = make_training_world(plan, pod, job=job, record=read_record(remembered.record.to_json()))
    assert isinstance(look(plan, world, NOW + seconds(299)), Wait)


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("DeletionByTaintManager", "NodeLost"),
        ("PreemptionByScheduler", "Preempted"),
        ("EvictionByEvictionAPI", "Evicted"),
    ],
)
def test_a_pod_that_was_taken_away_and_vanished_is_told_by_what_was_seen_of_it(reason, told):
    plan = make_test_plan()
    job = make_training_job(plan)
    pod = make_disrupted_pod(job, is_ready=True, reason=reason)
    seen = look(plan, make_training_world(plan, pod, job=job)).record
    job = dataclasses.replace(job, is_failed=True, ended_at=NOW + seconds(10))
    step = look(plan, make_training_world(plan, job=job, record=seen))
    assert step.record.attempt.reason == told
    assert (step.record.last_failure.pod, step.record.last_failure.node) == (pod.name, "node-0")
    assert step.record.restarts_counted == 0


def test_what_a_pod_said_at_its_end_is_told_when_it_vanished_before_its_job_had_failed():
    plan = make_test_plan()
    job = make_training_job(plan)
    pod = make_disrupted_pod(job, is_ready=True)
    seen = look(plan, make_training_world(plan, pod, job=job)).record
    report = make_report("train", 75, "Suspended", "stopped on request at step 7")
    over = dataclasses.replace(pod, exit=make_exit(75, report=report))
    seen = look(plan, make_training_world(plan, over, job=job, record=seen)).record
    job = dataclasses.replace(job, is_failed=True, ended_at=NOW + seconds(10))
    step = look(plan, make_training_world(plan, job=job, record=seen))
    assert "stopped on request at step 7" in step.record.last_failure.message


def test_suspending_is_remembered_then_the_job_is_removed_then_it_waits():
    plan = make_test_plan(suspend=True)
    job = make_training_job(plan)
    world = make_training_world(plan, make_pod(job), job=job)
    step = look(plan, world)
    assert isinstance(step, WriteRecord)
    assert (step.record.attempt.reason, step.record.restarts) == ("Suspended", 0)
    world = dataclasses.replace(world, record=step.record)
    step = look(plan, world)
    assert isinstance(step, Remove)
    assert step.references[0].uid == job.uid
    step = look(plan, dataclasses.replace(world, jobs=()))
    assert isinstance(step, Wait)
    assert step.situation.state == "Suspended"


def test_an_attempt_that_ended_while_it_was_suspended_is_not_lost():
    plan = make_test_plan(suspend=True)
    job = make_training_job(plan, is_succeeded=True)
    pod = make_pod(job, exit=make_exit(report=make_report("train", 0, "Completed", "", details={"step": 9})))
    step = look(plan, make_training_world(plan, pod, job=job))
    assert step.record.has_done(Phase.TRAIN)


def test_pods_that_run_too_long_in_all_attempts_together_end_the_job():
    plan = make_test_plan(activeDeadlineSeconds=100)
    job = make_training_job(plan)
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim", active_seconds=75.0
    )
    world = make_training_world(plan, make_pod(job), job=job, record=record)
    step = look(plan, world, NOW + seconds(10))
    assert isinstance(step, Wait)
    assert step.until == NOW + seconds(25)
    step = look(plan, world, NOW + seconds(25))
    assert step.record.terminal.reason == "DeadlineExceeded"
    assert step.record.active_seconds == 100


def test_pods_that_do_not_run_in_time_end_the_job():
    plan = make_test_plan(startupDeadlineSeconds=20)
    job = make_training_job(plan)
    world = make_training_world(plan, make_pod(job, phase="Pending", node="", started_at=None), job=job)
    assert isinstance(look(plan, world, NOW + seconds(19)), Wait)
    assert look(plan, world, NOW + seconds(20)).record.terminal.reason == "StartupDeadlineExceeded"


@pytest.mark.parametrize(("moved", "is_over"), [(None, True), (5, True), (15, False)])
def test_an_attempt_whose_pods_end_no_hang_by_themselves_is_restarted(moved, is_over):
    plan = make_test_plan(failurePolicy={"progressDeadlineSeconds": 20})
    job = make_training_job(plan)
    report = ProgressReport(5, None, {Metric.STEP: 3.0}, "")
    progress = Progress(report, NOW, None, NOW + seconds(moved), 1) if moved is not None else None
    world = make_training_world(plan, make_pod(job), job=job, progress=progress, progress_since=NOW)
    # The pods' own deadline, the longest pause that they allow, and a minute: 1,880 s after the last step.
    step = look(plan, world, NOW + seconds(1890))
    assert isinstance(step, WriteRecord if is_over else Wait)
    if is_over:
        assert step.record.attempt.reason == "NoProgress"
        assert isinstance(look(plan, world, NOW + seconds(1870)), Wait)


def test_a_restarted_operator_gives_progress_time_to_arrive():
    plan = make_test_plan(failurePolicy={"progressDeadlineSeconds": 20})
    job = make_training_job(plan)
    world = make_training_world(plan, make_pod(job), job=job, progress_since=NOW + seconds(25))
    assert isinstance(look(plan, world), Wait)


def test_phases_follow_in_order_after_training():
    plan = make_test_plan(promotion={"destinations": [{"destination": "s3://bucket/out"}]})
    order = (Phase.PROMOTE, Phase.EVALUATE, Phase.PUBLISH)
    for number, phase in enumerate(order):
        record = make_record(*TRAINED, *order[:number], claim_uid="claim")
        step = look(plan, make_observed(plan, record))
        assert names_of(step)[1] == ("Job", f"support-7b-{phase}")


def test_a_job_without_rows_to_score_is_not_evaluated():
    plan = make_test_plan(dataset={"source": "s3://a/b", "holdoutFraction": 0}, inference={"enabled": False})
    step = look(plan, make_observed(plan, make_record(*TRAINED, Phase.PROMOTE, claim_uid="claim")))
    assert step.record.terminal.result == "Succeeded"


def test_nothing_is_uploaded_or_served_below_a_gate():
    plan = make_test_plan(
        evaluation={"gates": [{"task": "holdout", "metric": "loss", "min": 5}]},
        promotion={"destinations": [{"destination": "s3://bucket/out"}]},
    )
    step = look(plan, make_observed(plan, make_record(*EVALUATED, claim_uid="claim")))
    assert (step.record.terminal.reason, step.record.terminal.phase) == ("EvaluationBelowGate", Phase.EVALUATE)


def make_gated(gate=5, **evaluation):
    return make_test_plan(evaluation={"gates": [{"task": "holdout", "metric": "loss", "min": gate}], **evaluation})


def evaluate_and_judge(plan):
    """Return the record of a job whose evaluation has just ended, as its gates leave it."""
    job = make_batch_job(plan, "evaluate", is_succeeded=True, ended_at=NOW + seconds(9))
    report = make_report("evaluate", 0, "Completed", "scored", details={"scores": {"holdout": {"loss": 2.0}}})
    pod = make_pod(job, phase="Succeeded", exit=make_exit(0, report=report))
    record = make_record(*TRAINED, Phase.PROMOTE, claim_uid="claim", attempts=(make_attempt(plan),))
    world = make_observed(plan, record, jobs=(job,), pods=(pod,))
    scored = look(plan, world)
    judged = look(plan, dataclasses.replace(world, record=scored.record))
    return dataclasses.replace(world, record=judged.record)


def test_a_gate_that_is_lowered_lets_the_model_pass_with_the_scores_there_are():
    held = evaluate_and_judge(make_gated())
    assert held.record.terminal.reason == "EvaluationBelowGate"
    lowered = make_gated(gate=1)
    step = look(lowered, held)
    assert isinstance(step, WriteRecord)
    assert (step.record.terminal, step.record.attempts) == (None, held.record.attempts)
    # What follows is the endpoint: no Job is removed, made or run again.
    step = look(lowered, dataclasses.replace(held, record=step.record))
    assert not isinstance(step, Remove)
    assert all(each["kind"] != "Job" for each in getattr(step, "objects", ()))
    assert step.situation.state == "Deploying"


def test_a_gate_that_is_still_not_passed_holds_the_model_again():
    held = evaluate_and_judge(make_gated())
    changed = make_gated(gate=4)
    taken_up = look(changed, held)
    step = look(changed, dataclasses.replace(held, record=taken_up.record))
    assert "min 4" in step.record.terminal.message
    assert step.record.terminal.digest == changed.digest


def test_with_other_tasks_a_held_model_is_scored_again_and_not_trained_again():
    held = evaluate_and_judge(make_gated())
    changed = make_gated(tasks=["gsm8k"])
    step = look(changed, held)
    assert [each.name for each in step.references] == ["support-7b-evaluate"]
    step = look(changed, dataclasses.replace(held, jobs=(), pods=()))
    assert not step.record.has_done(Phase.EVALUATE)
    assert step.record.has_done(Phase.PROMOTE)
    step = look(changed, dataclasses.replace(held, jobs=(), pods=(), record=step.record))
    assert ("Job", "support-7b-evaluate") in names_of(step)


def test_a_gate_that_is_raised_after_success_leaves_the_endpoint_as_it_is():
    plan, raised = make_test_plan(), make_gated()
    world = make_finished(plan)
    assert type(look(raised, world)) is type(look(plan, world))
    assert look(raised, world).situation == look(plan, world).situation


def make_finished(plan, result="Succeeded", phase="", digest=None, **fields):
    terminal = Terminal(result, "Reason", "message", to_text(NOW), phase, plan.digest if digest is None else digest)
    return make_observed(plan, make_record(*EVALUATED, claim_uid="claim", terminal=terminal), **fields)


def test_a_finished_job_gives_up_its_children_when_its_time_to_live_is_over():
    plan = make_test_plan(ttlSecondsAfterFinished=60, inference={"enabled": False})
    world = make_finished(
        plan,
        jobs=(make_batch_job(plan, "prepare", is_succeeded=True),),
        config_maps=("support-7b-plan", "support-7b-record", "support-7b-prepare"),
    )
    step = look(plan, world, NOW + seconds(30))
    assert isinstance(step, Finish)
    assert step.until == NOW + seconds(60)
    step = look(plan, world, NOW + seconds(60))
    assert {(each.kind, each.name) for each in step.references} == {
        ("Job", "support-7b-prepare"),
        ("ConfigMap", "support-7b-prepare"),
        ("Service", "support-7b-train"),
        ("PodDisruptionBudget", "support-7b-train"),
    }


def test_a_finished_job_whose_workspace_is_to_go_removes_it():
    plan = make_test_plan(inference={"enabled": False}, workspace={"retentionPolicy": {"whenFinished": "Delete"}})
    step = look(plan, make_finished(plan))
    assert step.references[0].kind == "PersistentVolumeClaim"


def test_a_failed_job_rests_until_its_spec_changes():
    plan = make_test_plan()
    job = make_batch_job(plan, "prepare", is_failed=True)
    record = make_record(
        Phase.INSPECT, terminal=Terminal("Failed", "DatasetEmpty", "m", to_text(NOW), "prepare", plan.digest)
    )
    world = make_observed(plan, record, jobs=(job,))
    assert isinstance(look(plan, world), Finish)
    changed = dataclasses.replace(plan, digest="changed")
    step = look(changed, world)
    assert isinstance(step, Remove)
    assert step.references[0].uid == job.uid
    step = look(changed, dataclasses.replace(world, jobs=()))
    assert isinstance(step, WriteRecord)
    assert step.record.terminal is None


def test_a_failed_training_is_taken_up_with_its_next_attempt():
    plan = make_test_plan()
    ended = make_attempt(plan, end_time=to_text(NOW), reason="CUDAOutOfMemory")
    terminal = Terminal("Failed", "CUDAOutOfMemory", "m", to_text(NOW), "train", "older")
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(ended,), claim_uid="claim", terminal=terminal, global_batch=8
    )
    step = look(plan, make_observed(plan, record))
    assert (step.record.terminal, step.record.attempt.number) == (None, 2)


def test_a_job_that_a_deadline_ended_removes_what_still_runs():
    plan = make_test_plan(activeDeadlineSeconds=10)
    job = make_training_job(plan)
    world = make_finished(plan, "Failed", "train", jobs=(job,))
    step = look(plan, world)
    assert isinstance(step, Remove)
    assert step.references[0].name == job.name


def test_a_full_workspace_is_waited_for_and_noticed_when_it_has_grown():
    plan = make_test_plan(workspace={"size": "10Gi"})
    claim = Claim(plan.workspace.claim, uid="claim", phase="Bound", capacity_bytes=2**33, requested_bytes=10 * 2**30)
    ended = make_attempt(plan, end_time=to_text(NOW), reason="StorageFull", message="no space", digest="before")
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(ended,), claim_uid="claim", storage_full_at=2**33, global_batch=8
    )
    step = look(plan, make_observed(plan, record, claim=claim))
    assert (step.situation.reason, step.situation.is_stalled) == ("StorageFull", True)
    assert "the workspace of 8.0 GiB is full" in step.situation.message
    grown = dataclasses.replace(claim, capacity_bytes=10 * 2**30)
    assert look(plan, make_observed(plan, record, claim=grown)).record.attempt.number == 2


def test_a_workspace_that_was_full_before_is_waited_for_again_and_not_tried_in_a_loop():
    plan = make_test_plan(workspace={"size": "10Gi"})
    job = make_batch_job(plan, "promote", is_failed=True, ended_at=NOW)
    report = make_report("promote", 73, "StorageFull", "no space")
    pod = make_pod(job, phase="Failed", exit=make_exit(73, report=report))
    claim = Claim(plan.workspace.claim, uid="claim", phase="Bound", capacity_bytes=2**33, requested_bytes=10 * 2**30)
    earlier = Failure(to_text(NOW), "StorageFull", "no space", pod="support-7b-train-1-0")
    record = make_record(*TRAINED, claim_uid="claim", storage_full_at=2**32, last_failure=earlier)
    noticed = look(plan, make_observed(plan, record, jobs=(job,), pods=(pod,), claim=claim))
    assert isinstance(noticed, WriteRecord)
    assert noticed.record.storage_full_at == 2**33
    full = make_observed(plan, noticed.record, jobs=(job,), pods=(pod,), claim=claim)
    assert look(plan, full).situation.is_stalled
    grown = dataclasses.replace(claim, capacity_bytes=10 * 2**30)
    assert isinstance(look(plan, dataclasses.replace(full, claim=grown)), Remove)


def test_the_last_failure_is_remembered_once():
    step = end_attempt(make_test_plan(), report_code=79, reason="CUDAOutOfMemory")
    assert isinstance(step.record.last_failure, Failure)
    assert step.record.terminal.reason == "CUDAOutOfMemory"


def test_unschedulable_pods_are_looked_at_again_when_the_grace_is_over():
    plan = make_test_plan()
    job = make_training_job(plan)
    condition = PodCondition("False", "Unschedulable", "0/1 nodes are available", NOW)
    pod = make_pod(job, phase="Pending", node="", started_at=None, conditions={"PodScheduled": condition})
    world = make_training_world(plan, pod, job=job)
    early, late = look(plan, world, NOW + seconds(10)), look(plan, world, NOW + seconds(45))
    assert early.until == NOW + seconds(45)
    assert (late.situation.reason, late.situation.condition) == ("Unschedulable", "Scheduled")


def test_ranks_restarted_inside_their_pod_count_and_the_time_of_a_save_is_remembered():
    details = {"in_pod_restarts": 2, "save_seconds": 90.5, "step_seconds": 4.0, "latest_complete": 8}
    step = end_attempt(plan := make_test_plan(), details=details)
    record = step.record
    assert (record.restarts, record.restarts_counted, record.attempt.in_pod_restarts) == (3, 3, 2)
    assert record.restarts_by_reason == {"RankFailed": 1, "RestartedInPod": 2}
    assert (record.save_seconds, record.step_seconds) == (90.5, 4.0)
    job = make_training_job(plan, is_succeeded=True)
    pod = make_pod(job, exit=make_exit(report=make_report("train", 0, "Completed", "", details={"in_pod_restarts": 1})))
    record = dataclasses.replace(record, attempts=(make_attempt(plan),))
    step = look(plan, make_training_world(plan, pod, job=job, record=record))
    assert (step.record.restarts, step.record.restarts_counted) == (4, 4)


def test_restarts_inside_a_pod_use_up_the_restarts_of_the_job():
    plan = make_test_plan(failurePolicy={"maxRestarts": 2})
    step = end_attempt(plan, details={"in_pod_restarts": 2})
    assert step.record.terminal.reason == "RestartsExhausted"


def test_a_broken_device_keeps_the_next_attempts_off_its_node_for_a_day():
    plan = make_test_plan()
    record = end_attempt(plan, 81, "XidError").record
    (avoided,) = record.excluded_nodes
    assert (avoided.node, avoided.reason) == ("node-0", "XidError")
    assert read_record(record.to_json()) == record
    tomorrow = look(plan, make_observed(plan, record), NOW + seconds(25 * 3600))
    assert (tomorrow.record.attempt.number, tomorrow.record.excluded_nodes) == (2, ())
    later = look(plan, make_observed(plan, record), NOW + seconds(3600))
    assert later.record.excluded_nodes == (avoided,)


def test_a_node_that_was_avoided_is_used_again_when_the_pods_fit_nowhere_else():
    plan = make_test_plan()
    avoided = tuple(Exclusion(name, "XidError", "2099-01-01T00:00:00Z") for name in ("older", "newer"))
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(plan),), claim_uid="claim", excluded_nodes=avoided
    )
    nowhere = {"PodScheduled": PodCondition("False", "Unschedulable", "0/2 nodes are available", NOW)}
    job = make_training_job(plan)
    pod = make_pod(job, phase="Pending", node="", started_at=None, conditions=nowhere)
    world = make_training_world(plan, pod, job=job, record=record)
    assert isinstance(look(plan, world, NOW + seconds(60)), Wait)
    step = look(plan, world, NOW + seconds(3600))
    assert [each.node for each in step.record.excluded_nodes] == ["newer"]
    assert (step.record.attempt.reason, step.record.restarts, step.record.restarts_counted) == ("Unschedulable", 0, 0)
    assert "without node older" in step.record.attempt.message


def test_the_pods_learn_the_deadline_of_their_steps():
    plan = make_test_plan(failurePolicy={"progressDeadlineSeconds": 600})
    assert plan.run.progress_deadline_seconds == 600


def test_a_weight_diff_alone_is_a_reason_to_publish():
    plan = make_test_plan(promotion={"weightDiff": {"enabled": True}})
    step = look(plan, make_observed(plan, make_record(*EVALUATED, claim_uid="claim")))
    assert names_of(step)[1] == ("Job", "support-7b-publish")
    assert '"weight_diff": true' in step.objects[0]["data"]["run.json"]


def test_a_phase_that_is_made_anew_after_a_change_of_the_spec_has_the_new_settings():
    before = make_test_plan(
        promotion={"weightDiff": {"enabled": True}, "destinations": [{"destination": "s3://b/out"}]}
    )
    after = make_test_plan(promotion={"destinations": [{"destination": "s3://b/out"}]})
    maps = []
    for plan in (before, after, after):
        config_map, job = look(plan, make_observed(plan, make_record(*EVALUATED, claim_uid="claim"))).objects
        (volume,) = [each for each in job["spec"]["template"]["spec"]["volumes"] if "configMap" in each]
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]
        assert job["metadata"]["name"] == "support-7b-publish"
        maps.append(config_map["metadata"]["name"])
    # One that exists is left alone, so other settings need another name.
    assert maps[0] != maps[1] == maps[2]
