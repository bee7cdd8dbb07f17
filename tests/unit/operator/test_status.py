"""What users and tools read: conditions, figures and events, built whole from what exists."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import Metric, Phase, ProgressReport
from finetune_operator.api.v1alpha1 import FineTuneJobStatus
from finetune_operator.lifecycle import next_step
from finetune_operator.news import select_events
from finetune_operator.observed import Endpoint, Progress
from finetune_operator.record import Failure, Terminal, to_text
from finetune_operator.status import build_invalid_status, build_status
from finetune_operator.steps import Finish, Situation, Wait
from tests.support.operator_parts import (
    NOW,
    UID,
    make_attempt,
    make_observed,
    make_pod,
    make_record,
    make_test_plan,
    make_training_job,
    seconds,
)

PLAN = make_test_plan()
DONE = (Phase.INSPECT, Phase.PREPARE, Phase.TRAIN, Phase.PROMOTE, Phase.EVALUATE)
TRAINING = Situation("Training", "Running", "attempt 1 is training")
EMPTY = FineTuneJobStatus()


def build(observed, step, previous=EMPTY, now=NOW, plan=PLAN):
    return build_status(plan, observed, step, previous, now)


def conditions(status):
    return {each.type: each.status for each in status.conditions}


def running_world(**fields):
    job = make_training_job(PLAN)
    record = make_record(Phase.INSPECT, Phase.PREPARE, attempts=(make_attempt(PLAN),), claim_uid="claim")
    return make_observed(PLAN, record, jobs=(job,), pods=(make_pod(job),), **fields)


def finished_world(result="Succeeded", phase="", reason="Serving", **fields):
    terminal = Terminal(result, reason, "message", to_text(NOW), phase, PLAN.digest)
    return make_observed(PLAN, make_record(*DONE, claim_uid="claim", terminal=terminal), **fields)


def make_progress(**metrics):
    return Progress(ProgressReport(43, None, metrics, ""), NOW, 120, NOW, 1)


def test_every_condition_is_always_there_with_the_generation():
    status = build(running_world(), Wait(TRAINING))
    assert [each.type for each in status.conditions] == [
        *("Ready", "Reconciling", "Stalled", "Validated", "StorageReady", "ModelReady", "DatasetReady", "Scheduled"),
        *("Training", "Promoted", "Evaluated", "Deployed", "Suspended", "Succeeded", "Finished"),
    ]
    assert {each.observed_generation for each in status.conditions} == {1}
    assert status.observed_generation == 1


def test_a_job_that_trains_is_moving():
    status = build(running_world(), Wait(TRAINING))
    held = {name for name, value in conditions(status).items() if value == "True"}
    assert held == {"Reconciling", "Validated", "StorageReady", "ModelReady", "DatasetReady", "Scheduled", "Training"}
    assert (status.state, conditions(status)["Ready"], conditions(status)["Finished"]) == (
        "Training",
        "Unknown",
        "False",
    )


def test_a_stalled_job_is_not_moving_and_names_the_condition():
    situation = Situation("Pending", "WorkspaceTooSmall", "ask for more", is_stalled=True, condition="StorageReady")
    status = build(running_world(), Wait(situation))
    held = conditions(status)
    assert (held["Stalled"], held["Reconciling"], held["Ready"], held["StorageReady"]) == (
        "True",
        "False",
        "False",
        "False",
    )


def test_a_suspended_job_neither_moves_nor_calls_for_help():
    status = build(
        running_world(), Wait(Situation("Suspended", "Suspended", "suspended")), plan=make_test_plan(suspend=True)
    )
    held = conditions(status)
    assert (held["Suspended"], held["Reconciling"], held["Stalled"], held["Ready"]) == (
        "True",
        "False",
        "False",
        "Unknown",
    )


def test_a_job_that_succeeded_is_ready_while_its_endpoint_answers():
    answering = Endpoint(
        is_ours=True, holder=PLAN.name, holder_uid=UID, digest="abc123", is_ready=True, ready_replicas=1
    )
    step = Finish(Situation("Succeeded", "Serving", "endpoint answers"))
    held = conditions(build(finished_world(endpoint=answering), step))
    assert {held[name] for name in ("Ready", "Succeeded", "Finished", "Deployed")} == {"True"}
    silent = finished_world(endpoint=dataclasses.replace(answering, is_ready=False, ready_replicas=0))
    step = Finish(Situation("Succeeded", "Deploying", "starting", condition="Deployed"))
    held = conditions(build(silent, step))
    assert (held["Ready"], held["Succeeded"], held["Finished"], held["Deployed"]) == (
        "Unknown",
        "True",
        "True",
        "False",
    )


@pytest.mark.parametrize(
    ("phase", "reason", "condition"),
    [
        ("inspect", "DatasetNotFound", "DatasetReady"),
        ("inspect", "ModelNotFound", "ModelReady"),
        ("prepare", "DatasetEmpty", "DatasetReady"),
        ("train", "RankFailed", "Training"),
        ("train", "WorkspaceLost", "StorageReady"),
        ("promote", "PromotionInvalid", "Promoted"),
        ("evaluate", "EvaluationBelowGate", "Evaluated"),
        ("publish", "DestinationUnavailable", "Promoted"),
        ("serve", "ReportMissing", "Deployed"),
    ],
)
def test_a_failed_job_is_finished_and_its_phase_says_why(phase, reason, condition):
    world = finished_world("Failed", phase, reason)
    status = build(world, next_step(PLAN, world, NOW))
    held = conditions(status)
    assert (held["Finished"], held["Succeeded"], held["Stalled"], held["Ready"]) == ("True", "False", "True", "False")
    (found,) = [each for each in status.conditions if each.type == condition]
    assert (found.status, found.reason) == ("False", reason)
    assert status.completion_time == NOW


def test_transition_times_move_only_with_the_status_of_a_condition():
    first = build(running_world(), Wait(TRAINING))
    second = build(running_world(), Wait(dataclasses.replace(TRAINING, message="new")), first, NOW + seconds(60))
    assert {each.last_transition_time for each in second.conditions} == {NOW}
    third = build(
        running_world(), Wait(Situation("Restarting", "Killed", "x", condition="Training")), second, NOW + seconds(90)
    )
    assert {each.type for each in third.conditions if each.last_transition_time == NOW + seconds(90)} == {"Training"}


def test_the_same_world_gives_the_same_status():
    first = build(running_world(), Wait(TRAINING))
    assert build(running_world(), Wait(TRAINING), first, NOW + seconds(600)).to_dict() == first.to_dict()


def test_progress_is_what_the_trainer_posted_and_outlives_the_operators_memory():
    progress = make_progress(
        **{Metric.STEP: 43.0, Metric.TOTAL_STEPS: 100.0, Metric.LOSS: 1.18249, Metric.EPOCH: 0.4321}
    )
    status = build(running_world(progress=progress), Wait(TRAINING))
    assert status.progress.to_dict() == {
        "percentage": 43,
        "step": 43,
        "totalSteps": 100,
        "epoch": 0.43,
        "loss": 1.1825,
        "etaSeconds": 120,
        "updatedAt": "2026-01-01T12:00:00Z",
        "stepsLost": 0,
        "secondsLost": 0,
        "summary": "43%",
        "eta": "2m0s",
    }
    assert build(running_world(), Wait(TRAINING), status).progress == status.progress


def test_a_loss_that_is_no_number_does_not_lose_the_status():
    progress = make_progress(**{Metric.LOSS: float("nan"), Metric.TOKENS_PER_SECOND: float("inf")})
    found = build(running_world(progress=progress), Wait(TRAINING)).progress
    assert (found.loss, found.tokens_per_second) == (None, None)


def test_checkpoints_are_those_posted_until_the_trainer_reports_the_last():
    posted = make_progress(**{Metric.LATEST_CHECKPOINT: 40.0, Metric.NUM_CHECKPOINTS: 2.0, Metric.RESUMED_FROM: 20.0})
    status = build(running_world(progress=posted), Wait(TRAINING))
    assert status.checkpoints.to_dict() == {"latestComplete": 40, "count": 2, "resumedFrom": 20}
    assert status.attempts[0].resumed_from_step == 20
    ended = build(finished_world(), Finish(Situation("Succeeded", "Serving", "")), status)
    assert ended.checkpoints.to_dict() == {"latestComplete": 100, "count": 3, "resumedFrom": 20}


def test_the_mirrors_newest_step_is_the_one_posted_until_the_trainer_reports_the_last():
    posted = make_progress(**{Metric.LATEST_CHECKPOINT: 40.0, Metric.MIRRORED_CHECKPOINT: 20.0})
    status = build(running_world(progress=posted), Wait(TRAINING))
    assert status.checkpoints.mirrored == 20
    world = finished_world()
    reported = world.record.details(Phase.TRAIN) | {"mirrored": 100}
    world = dataclasses.replace(world, record=world.record.with_phase(Phase.TRAIN, reported))
    assert build(world, Finish(Situation("Succeeded", "Serving", "")), status).checkpoints.mirrored == 100


def test_secrets_in_what_pods_wrote_are_masked():
    record = dataclasses.replace(
        running_world().record, last_failure=Failure(to_text(NOW), "X", "HF_TOKEN=hf_" + "a" * 30)
    )
    status = build(
        make_observed(PLAN, record), Wait(Situation("Training", "X", "password=hunter22", condition="Training"))
    )
    assert "hf_a" not in str(status.to_dict())
    assert "hunter22" not in str(status.to_dict())


def test_a_job_that_cannot_be_planned_keeps_what_is_known_and_calls_for_help():
    before = build(running_world(), Wait(TRAINING))
    status = build_invalid_status("resources.nodes: at most 1", "NotAllowed", before, 2, NOW)
    held = conditions(status)
    assert (held["Validated"], held["Stalled"], held["Reconciling"], held["DatasetReady"]) == (
        "False",
        "True",
        "False",
        "True",
    )
    assert (status.dataset, status.state, status.observed_generation) == (before.dataset, "Training", 2)


def test_a_refused_object_does_not_make_the_spec_invalid():
    before = build(running_world(), Wait(TRAINING))
    held = conditions(build_invalid_status("exceeded quota", "ObjectRefused", before, 1, NOW))
    assert (held["Validated"], held["Stalled"]) == ("True", "True")


def test_a_status_survives_the_api_server():
    status = build(running_world(progress=make_progress(**{Metric.STEP: 1.0})), Wait(TRAINING))
    again = FineTuneJobStatus.model_validate(status.to_dict(), by_alias=True, by_name=False)
    assert again.to_dict() == status.to_dict()


def test_events_tell_transitions_once():
    first = build(running_world(), Wait(TRAINING))
    events = select_events(EMPTY, first)
    assert {reason for _, reason, _ in events} == {
        *("Validated", "StorageReady", "ModelReady", "DatasetReady", "AttemptStarted"),
    }
    assert select_events(first, first) == []
    stalled = build(
        running_world(), Wait(Situation("Training", "ImagePullFailed", "no such image", is_stalled=True)), first
    )
    assert select_events(first, stalled) == [("Warning", "ImagePullFailed", "no such image")]
    assert select_events(stalled, stalled) == []


def test_what_training_makes_of_the_examples_is_told_once_and_stays():
    posted = {Metric.PACKING: -1.0, Metric.EXAMPLES_DROPPED: 3.0, Metric.EXAMPLES_TRUNCATED: 5.0}
    first = build(running_world(), Wait(TRAINING))
    second = build(
        running_world(progress=make_progress(**posted, **{Metric.REAL_TOKEN_SHARE: 0.251})), Wait(TRAINING), first
    )
    assert second.dataset.packing == "Refused"
    assert (second.dataset.examples_dropped, second.dataset.examples_truncated) == (3, 5)
    assert second.dataset.real_token_share == 0.251
    assert [reason for _, reason, _ in select_events(first, second)] == ["PackingRefused", "ExamplesDropped"]

    # A restarted operator knows nothing until the next post.
    third = build(running_world(), Wait(TRAINING), second)
    assert third.dataset == second.dataset
    assert select_events(second, third) == []
    packed = make_progress(**{Metric.PACKING: 1.0, Metric.EXAMPLES_DROPPED: float("nan")})
    assert build(running_world(progress=packed), Wait(TRAINING)).dataset.packing == "Packed"


def test_a_source_that_does_not_answer_is_told_once_although_nobody_has_to_act_yet():
    running = Situation("Pending", "Inspecting", "reading the sizes", condition="ModelReady")
    away = Situation("Pending", "SourceUnavailable", "s3://a/b did not answer", condition="ModelReady")
    world = make_observed(PLAN)
    first = build(world, Wait(running))
    second = build(world, Wait(away), first)
    assert conditions(second)["Stalled"] == conditions(second)["ModelReady"] == "False"
    assert select_events(first, second) == [("Warning", "SourceUnavailable", "s3://a/b did not answer")]
    assert select_events(second, second) == []


def test_an_endpoint_that_goes_over_to_another_version_is_news():
    def serve(version):
        return FineTuneJobStatus.model_validate({"serving": {"ready": True, "url": "http://e", "version": version}})

    ((kind, reason, message),) = select_events(serve("older"), serve("newer"))
    assert (kind, reason) == ("Normal", "VersionChanged")
    assert "version newer, after older" in message
    assert select_events(serve("newer"), serve("newer")) == []
    assert select_events(FineTuneJobStatus(), serve("newer")) == []


@given(
    state=st.sampled_from(["Pending", "Training", "Suspended", "Deploying", "Succeeded", "Failed"]),
    is_stalled=st.booleans(),
    result=st.sampled_from(["", "Succeeded", "Failed"]),
    is_answering=st.booleans(),
)
def test_ready_reconciling_and_stalled_never_hold_together(state, is_stalled, result, is_answering):
    endpoint = Endpoint(is_ours=True, holder_uid=UID, digest="abc123", is_ready=is_answering, ready_replicas=1)
    world = finished_world(result, "train", endpoint=endpoint) if result else running_world()
    step = (Finish if result else Wait)(Situation(state, "Reason", "message", is_stalled=is_stalled))
    held = conditions(build(world, step))
    assert [held[name] for name in ("Ready", "Reconciling", "Stalled")].count("True") <= 1


def test_the_run_report_is_named_as_soon_as_there_is_a_model():
    done = make_record(Phase.INSPECT, Phase.PREPARE, Phase.TRAIN, Phase.PROMOTE, claim_uid="claim")
    status = build(make_observed(PLAN, done), Wait(TRAINING))
    assert status.promotion.report == "reports/run-abc123.html"
    scored = done.with_phase(Phase.EVALUATE, {"scores": {}, "report": "reports/run-def.html"})
    assert build(make_observed(PLAN, scored), Wait(TRAINING)).promotion.report == "reports/run-def.html"
    older = done.with_phase(Phase.PROMOTE, {"digest": "abc123"})
    assert build(make_observed(PLAN, older), Wait(TRAINING)).promotion.report is None


def test_the_weight_diff_has_its_size_and_ratio():
    facts = {"path": "weight-diffs/abc123", "bytes": 100, "ratio": 0.5}
    record = make_record(*DONE, Phase.PUBLISH, claim_uid="claim")
    record = record.with_phase(Phase.PUBLISH, {"destinations": [], "weight_diff": facts})
    found = build(make_observed(PLAN, record), Wait(TRAINING)).promotion
    assert found.to_dict()["weightDiff"] == facts
    assert build(make_observed(PLAN, make_record(*DONE)), Wait(TRAINING)).promotion.weight_diff is None


def test_each_gate_says_its_verdict_with_the_numbers():
    gates = [
        {"task": "holdout", "metric": "loss", "maxRegression": 0},
        {"task": "holdout", "metric": "loss", "max": 0.5},
        {"task": "holdout", "metric": "bleu", "min": 1},
    ]
    plan = make_test_plan(evaluation={"gates": gates})
    world = finished_world()
    status = build(world, Finish(Situation("Succeeded", "Serving", "")), plan=plan)
    scores = world.record.details(Phase.EVALUATE)
    found = [(each.verdict, each.score, each.baseline, each.max) for each in status.evaluation.gates]
    loss, base = scores["scores"]["holdout"]["loss"], scores["baseline"]["holdout"]["loss"]
    assert found == [("Passed", loss, base, None), ("Failed", loss, base, 0.5), ("ScoreMissing", None, None, None)]
    assert status.evaluation.gate == "Failed"
    (evaluated,) = (each for each in status.conditions if each.type == "Evaluated")
    assert evaluated.status == "True"
    assert "a gate was raised since the model passed" in evaluated.message
    assert "inference.enabled: false" in evaluated.message
