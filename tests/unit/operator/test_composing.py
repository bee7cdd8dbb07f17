"""Adapters over the promoted model: composed by a Job, judged, served; what is served until then stays."""

from __future__ import annotations

import dataclasses

import pytest

from finetune_contract.reports import Phase
from finetune_contract.run_config import RunConfig
from finetune_operator.lifecycle import next_step
from finetune_operator.manifests.inference import build_served
from finetune_operator.observed import Endpoint, Job
from finetune_operator.record import MAX_COMPOSITIONS, Record, Terminal, read_record, to_text
from finetune_operator.status import build_status
from finetune_operator.steps import Create, Finish, Remove, Wait, WriteRecord
from finetune_operator.versions import make_request, serving_version
from tests.support.kubelet import DETAILS
from tests.support.operator_parts import (
    NOW,
    UID,
    make_exit,
    make_observed,
    make_pod,
    make_record,
    make_report,
    make_settings,
    make_test_plan,
    seconds,
)
from tests.unit.operator.test_deployment import make_endpoint, make_version
from tests.unit.operator.test_lifecycle import EVALUATED

POLITE = {"name": "polite", "source": "s3://adapters/polite"}
BRIEF = {"name": "brief", "source": "hf://org/brief", "weight": 0.5, "secretRef": {"name": "hub"}}
RECORD = make_record(*EVALUATED, claim_uid="claim")
BARE = make_test_plan()
PLAN = make_test_plan(inference={"adapters": [POLITE]})
LATER = NOW + seconds(600)


def make_compose_job(plan=PLAN, record=RECORD, **fields):
    name = plan.names.compose_job(make_request(plan, record))
    return Job(name, **{"uid": f"{name}-uid", "component": "compose", "created_at": NOW, **fields})


def make_composed(plan=PLAN, record=RECORD, **details):
    return record.with_composition(make_request(plan, record), {**DETAILS["compose"], **details})


def look(plan=PLAN, record=RECORD, *, finished=False, **fields):
    """Return the step of a job that serves the promoted model without adapters."""
    terminal = Terminal("Succeeded", "Serving", "message", to_text(NOW), "", plan.digest) if finished else None
    record = dataclasses.replace(record, terminal=terminal)
    live = make_version(BARE)
    base = {"has_finalizer": True, "versions": (live,), "endpoint": make_endpoint(live)}
    return next_step(plan, make_observed(plan, record, **{**base, **fields}), LATER)


@pytest.mark.parametrize("finished", [False, True])
def test_adapters_are_composed_before_anything_is_served(finished):
    step = look(finished=finished)
    assert isinstance(step, Create)
    config_map, job = step.objects
    assert job["metadata"]["name"] == config_map["metadata"]["name"] == make_compose_job().name
    run = RunConfig.from_json(config_map["data"]["run.json"])
    assert (run.promotion.digest, run.composition.adapters[0].source) == ("abc123", "s3://adapters/polite")
    assert job["spec"]["template"]["spec"]["containers"][0]["args"][0] == "compose"


def test_what_is_served_stays_while_adapters_are_composed():
    step = look(finished=True, jobs=(make_compose_job(),))
    assert isinstance(step, Finish)
    assert step.situation.reason == "Composing"
    (service,) = step.kept
    assert service["spec"]["selector"]["finetune.dev/version"] == make_version(BARE).label


def test_a_composition_is_remembered_and_makes_another_version():
    report = make_report("compose", 0, "Completed", "", details=DETAILS["compose"])
    job = make_compose_job(is_succeeded=True)
    step = look(finished=True, jobs=(job,), pods=(make_pod(job, phase="Succeeded", exit=make_exit(report=report)),))
    assert isinstance(step, WriteRecord)
    record = read_record(step.record.to_json())
    assert serving_version(PLAN, record) == "abc123.f00d"
    served = build_served(PLAN, record, is_on_one_node=True)
    assert served.label != build_served(BARE, record, is_on_one_node=True).label
    run = RunConfig.from_json(served.objects[0]["data"]["run.json"])
    assert (run.promotion.digest, run.composition.digest) == ("abc123", "f00d")
    step = look(record=record, finished=True, jobs=(job,))
    assert [each["metadata"]["name"] for each in step.objects][:2] == [served.name, served.name]


def test_a_pod_that_left_no_report_composes_again():
    step = look(jobs=(make_compose_job(is_succeeded=True),))
    assert isinstance(step, Remove)


def test_an_adapter_that_cannot_be_used_is_named_and_fails_no_job():
    message = "spec.inference.adapters[0] (polite): its base is 11, not abc123"
    report = make_report("compose", 66, "ModelInvalid", message)
    job = make_compose_job(is_failed=True)
    pods = (make_pod(job, phase="Failed", exit=make_exit(66, report=report)),)
    for finished in (False, True):
        step = look(finished=finished, jobs=(job,), pods=pods)
        assert isinstance(step, Finish if finished else Wait)
        assert step.situation.is_stalled
        assert step.situation.reason == "ModelInvalid"
        assert message in step.situation.message
        assert f"kubectl delete job {job.name}" in step.situation.message
        assert "abc123 of job support-7b still answers" in step.situation.message


def test_a_composition_below_a_gate_is_held_until_the_gate_allows_it():
    gates = {"evaluation": {"gates": [{"task": "holdout", "metric": "loss", "maxRegression": 0.5}]}}
    plan = make_test_plan(**gates, inference={"adapters": [POLITE]})
    record = make_composed(plan, scores={"holdout": {"loss": 8.6}})
    step = look(plan, record, finished=True)
    assert isinstance(step, Finish)
    assert (step.situation.reason, step.situation.is_stalled) == ("EvaluationBelowGate", True)
    assert "the composition polite is held: evaluation: holdout.loss is 8.6 and the base model's 8" in (
        step.situation.message
    )
    gates["evaluation"]["gates"][0]["maxRegression"] = 1
    raised = make_test_plan(**gates, inference={"adapters": [POLITE]})
    step = look(raised, record)
    assert [each["kind"] for each in step.objects][:2] == ["ConfigMap", "Deployment"]


def test_a_version_below_a_gate_is_not_gone_back_to():
    gates = {"evaluation": {"gates": [{"task": "holdout", "metric": "loss", "maxRegression": 0.5}]}}
    record = make_composed(make_test_plan(**gates, inference={"adapters": [POLITE]}), scores={"holdout": {"loss": 9.0}})
    back = make_test_plan(**gates, inference={"version": "abc123.f00d"})
    assert look(back, record, finished=True).situation.reason == "EvaluationBelowGate"


def test_going_back_is_one_field_and_composes_nothing():
    record = make_composed()
    live = make_version(PLAN, label=build_served(PLAN, record, is_on_one_node=True).label, digest="abc123.f00d")
    bare = make_version(BARE, replicas=0, ready_replicas=0, is_ready=False)
    plan = make_test_plan(inference={"adapters": [POLITE], "version": "abc123"})
    assert serving_version(plan, record) == "abc123"
    step = look(plan, record, finished=True, versions=(live, bare), endpoint=make_endpoint(live))
    assert not (isinstance(step, Create) and "compose" in str(step.objects))


def test_other_adapters_another_weight_or_another_model_are_other_requests():
    others = [
        make_test_plan(inference={"adapters": [{**POLITE, "weight": 0.5}]}),
        make_test_plan(inference={"adapters": [POLITE, BRIEF]}),
        make_test_plan(inference={"adapters": [POLITE], "composition": {"method": "svd"}}),
        make_test_plan(inference={"adapters": [{**POLITE, "revision": "v2"}]}),
    ]
    requests = {make_request(plan, RECORD) for plan in (PLAN, *others)}
    assert len(requests) == 1 + len(others)
    other_model = RECORD.with_phase(Phase.PROMOTE, {"digest": "def"})
    assert make_request(PLAN, other_model) not in requests
    same = make_test_plan(inference={"adapters": [{**POLITE, "secretRef": {"name": "s3"}}]})
    assert make_request(same, RECORD) == make_request(PLAN, RECORD)
    assert make_request(BARE, RECORD) == ""


def test_a_job_that_composes_what_is_wanted_no_more_is_removed():
    outdated = make_compose_job(make_test_plan(inference={"adapters": [BRIEF]}))
    step = look(finished=True, jobs=(outdated,))
    assert isinstance(step, Remove)
    assert [each.name for each in step.references] == [outdated.name]


def test_a_running_composition_outlives_the_time_to_live_of_a_finished_job():
    plan = make_test_plan(inference={"adapters": [POLITE]}, ttlSecondsAfterFinished=0)
    job = make_compose_job(plan)
    step = look(plan, finished=True, jobs=(job,), config_maps=(job.name,), other_children=())
    assert isinstance(step, Finish)
    assert step.situation.reason == "Composing"


def test_a_suspended_job_composes_nothing():
    plan = make_test_plan(inference={"adapters": [POLITE]}, suspend=True)
    step = look(plan, jobs=(make_compose_job(plan),))
    assert isinstance(step, Remove)


def test_vllm_gets_the_composed_adapter_under_the_endpoint_s_name():
    plan = make_test_plan(inference={"adapters": [POLITE], "runtime": "vllm"})
    record = make_composed(plan)
    whole, args = list_vllm_args(plan, record)
    assert whole == "--promoted=/workspace/output/abc123"
    assert args[:2] == ["/workspace/output/abc123", "--served-model-name=support-7b-base"]
    assert "--max-lora-rank=16" in args
    assert args[args.index("--lora-modules") + 1] == "support-7b=/workspace/adapters/f00d"
    assert "--trust-remote-code" not in args
    whole, args = list_vllm_args(plan, make_composed(plan, model="models/base"))
    assert whole == "--promoted=/workspace/output/abc123"
    assert args[0] == "/workspace/models/base"
    assert "--tokenizer=/workspace/output/abc123" in args


def test_vllm_may_run_a_model_s_own_code_where_the_administrators_allow_it():
    plan = make_test_plan(make_settings(limits={"trustRemoteCode": True}), inference={"runtime": "vllm"})
    assert "--trust-remote-code" in list_vllm_args(plan, RECORD)[1]


def list_vllm_args(plan, record):
    """Return what a pod of the endpoint looks at first, and what it gives to `vllm serve`."""
    container = build_served(plan, record).objects[1]["spec"]["template"]["spec"]["containers"][0]
    whole, *start = container["args"][:4]
    assert start == ["--", "vllm", "serve"]
    return whole, container["args"][4:]


def test_the_status_tells_version_profile_and_adapters_and_is_not_ready_before_they_are_served():
    record = dataclasses.replace(
        make_composed(), terminal=Terminal("Succeeded", "Serving", "", to_text(NOW), "", PLAN.digest)
    )
    live = make_version(PLAN, label=build_served(PLAN, record, is_on_one_node=True).label, digest="abc123.f00d")
    world = make_observed(PLAN, record, has_finalizer=True, versions=(live,), endpoint=make_endpoint(live))
    status = build_status(PLAN, world, next_step(PLAN, world, LATER), _empty(), LATER)
    assert (status.serving.version, status.serving.digest) == ("abc123.f00d", "abc123")
    assert (status.serving.profile, status.serving.adapters) == ("f00d", ["polite"])
    assert _condition(status, "Ready") == "True"

    other = make_test_plan(inference={"adapters": [POLITE, BRIEF]})
    world = dataclasses.replace(world, jobs=(make_compose_job(other, record),))
    status = build_status(other, world, next_step(other, world, LATER), _empty(), LATER)
    assert status.state == "Succeeded"
    assert (_condition(status, "Ready"), _condition(status, "Reconciling")) == ("Unknown", "True")
    assert status.serving.adapters == ["polite"]


def _empty():
    from finetune_operator.api.v1alpha1 import FineTuneJobStatus

    return FineTuneJobStatus()


def _condition(status, kind):
    return next(each.status for each in status.conditions if each.type == kind)


def test_the_oldest_compositions_are_forgotten():
    record = Record(uid=UID)
    for number in range(MAX_COMPOSITIONS + 2):
        record = record.with_composition(f"r{number}", {"digest": f"d{number}"})
    again = read_record(record.to_json())
    assert [each["request"] for each in again.compositions] == [f"r{n}" for n in range(2, MAX_COMPOSITIONS + 2)]


def test_an_endpoint_without_a_version_composes_first():
    empty = Endpoint(is_ours=True, holder=PLAN.name, holder_uid=UID, version="none")
    assert "compose" in look(versions=(), endpoint=empty).objects[1]["metadata"]["name"]
