"""The endpoint: what brings a version to it, what keeps the one before, and what is left of a job's."""

from __future__ import annotations

import dataclasses
import json

import pytest

from finetune_contract.reports import Phase
from finetune_contract.run_config import RunConfig
from finetune_contract.smoke_prompt import EXIT_NO_ANSWER, EXIT_REFUSED
from finetune_operator import naming
from finetune_operator.deployment import KEPT_VERSIONS, PROVING_SECONDS, next_deletion_step
from finetune_operator.lifecycle import next_step
from finetune_operator.manifests.inference import build_served, build_smoke_job
from finetune_operator.manifests.run_config import build_run_config
from finetune_operator.observed import Claim, Endpoint, Job, PodCondition, Version
from finetune_operator.policies.serving import explain_crash
from finetune_operator.record import Terminal, to_text
from finetune_operator.steps import Apply, Create, Finish, Remove, Scale, SetFinalizer, Wait
from tests.support.kubelet import DETAILS
from tests.support.operator_parts import (
    NOW,
    UID,
    make_exit,
    make_observed,
    make_pod,
    make_record,
    make_report,
    make_test_plan,
    seconds,
)
from tests.unit.operator.test_lifecycle import EVALUATED

PLAN = make_test_plan()
RECORD = make_record(*EVALUATED, claim_uid="claim")
LATER = NOW + seconds(2 * PROVING_SECONDS)


def label_of(plan, record=RECORD):
    return build_served(plan, record, is_on_one_node=True).label


def make_version(plan=PLAN, **fields):
    """Return the version that a plan asks for, with its pods ready."""
    served = build_served(plan, RECORD, is_on_one_node=True)
    base = {
        "name": served.name,
        "digest": served.digest,
        "job": plan.name,
        "job_uid": UID,
        "image": "server:1",
        "workspace": (plan.workspace.claim, plan.workspace.sub_path),
        "replicas": plan.serving.replicas,
        "ready_replicas": plan.serving.replicas,
        "is_ready": True,
    }
    return Version(fields.pop("label", served.label), **{**base, **fields})


OTHER = make_version(label="older-1", name="support-7b-older-1", digest="older", job="earlier", job_uid="other-uid")


def make_endpoint(version, **fields):
    """Return the Service with its traffic on a version."""
    base = {
        "is_ours": True,
        "holder": version.job,
        "holder_uid": version.job_uid,
        "digest": version.digest,
        "version": version.label,
        "switched_at": NOW,
        "is_ready": version.is_ready,
        "ready_replicas": version.ready_replicas,
    }
    return Endpoint(**{**base, **fields})


def make_smoke_job(label, plan=PLAN, **fields):
    name = plan.names.smoke_job(label)
    return Job(name, **{"uid": f"{name}-uid", "component": "smoke", "created_at": NOW, **fields})


def make_answered(label, plan=PLAN):
    """Return the Job of a smoke prompt that was answered, and its pod."""
    job = make_smoke_job(label, plan, is_succeeded=True)
    report = make_report("smoke", 0, "Completed", "", details=DETAILS["smoke"])
    return {"jobs": (job,), "pods": (make_pod(job, phase="Succeeded", exit=make_exit(report=report)),)}


def make_unanswered(label, code, message):
    job = make_smoke_job(label, is_failed=True)
    report = make_report("smoke", code, "SmokePromptFailed", message)
    return {"jobs": (job,), "pods": (make_pod(job, phase="Failed", exit=make_exit(code, report=report)),)}


def look(plan=PLAN, *, finished=False, now=LATER, **fields):
    """Return the step of a job whose model has passed its gates."""
    terminal = Terminal("Succeeded", "Serving", "message", to_text(NOW), "", plan.digest) if finished else None
    record = dataclasses.replace(RECORD, terminal=terminal)
    return next_step(plan, make_observed(plan, record, **{"has_finalizer": True, **fields}), now)


def read_live(step):
    """Return the version that a step gives the traffic to."""
    assert isinstance(step, Apply)
    (service,) = step.objects
    assert (service["kind"], service["metadata"]["name"]) == ("Service", "support-7b")
    return service["spec"]["selector"].get("finetune.dev/version", "first")


def test_the_finalizer_is_there_before_the_endpoint():
    assert look(has_finalizer=False).is_wanted is True


def test_a_retained_endpoint_needs_no_finalizer_once_it_answers():
    plan = make_test_plan(inference={"onDelete": "Retain"})
    version = make_version(plan)
    assert look(plan, has_finalizer=False).is_wanted is True
    step = look(plan, versions=(version,), endpoint=make_endpoint(version))
    assert isinstance(step, SetFinalizer)
    assert step.is_wanted is False


def test_an_endpoint_has_an_address_before_anything_answers():
    assert read_live(look()) == "none"


def test_a_version_is_made_then_asked_then_given_the_traffic():
    empty = Endpoint(is_ours=True, holder=PLAN.name, holder_uid=UID, version="none")
    step = look(endpoint=empty)
    assert [each["kind"] for each in step.objects][:3] == ["ConfigMap", "Deployment", "Service"]
    version = make_version(is_ready=False, ready_replicas=0)
    step = look(endpoint=empty, versions=(version,))
    assert isinstance(step, Create)
    assert [each["metadata"]["name"] for each in step.objects] == [PLAN.names.smoke_job(version.label)]
    ready = make_version()
    asked = make_smoke_job(ready.label)
    assert isinstance(look(endpoint=empty, versions=(ready,), jobs=(asked,)), Wait)
    assert isinstance(look(endpoint=empty, versions=(version,), **make_answered(version.label)), Wait)
    step = look(endpoint=empty, versions=(ready,), **make_answered(ready.label))
    assert read_live(step) == ready.label
    annotations = step.objects[0]["metadata"]["annotations"]
    assert json.loads(annotations["finetune.dev/smoke-prompt"]) == DETAILS["smoke"]


def test_the_smoke_job_goes_when_its_version_has_the_traffic_and_the_job_succeeds():
    version = make_version()
    step = look(endpoint=make_endpoint(version), versions=(version,), **make_answered(version.label))
    assert isinstance(step, Remove)
    step = look(endpoint=make_endpoint(version), versions=(version,))
    assert (step.record.terminal.result, step.record.deployed_digest) == ("Succeeded", "abc123")


def test_a_smoke_prompt_whose_answer_was_lost_is_asked_again():
    version = make_version()
    job = make_smoke_job(version.label, is_succeeded=True)
    step = look(endpoint=make_endpoint(OTHER), versions=(version, OTHER), jobs=(job,))
    assert [each.uid for each in step.references] == [job.uid]


def test_an_endpoint_without_replicas_is_not_asked():
    plan = make_test_plan(inference={"replicas": 0})
    version = make_version(plan)
    step = look(plan, endpoint=make_endpoint(OTHER), versions=(version, OTHER))
    assert read_live(step) == version.label


def test_a_version_that_answers_nonsense_takes_no_traffic_and_says_what_to_type():
    version = make_version()
    unanswered = make_unanswered(version.label, EXIT_REFUSED, "the smoke prompt was not answered: HTTP 500: boom")
    step = look(endpoint=make_endpoint(OTHER), versions=(version, OTHER), **unanswered)
    assert isinstance(step, Wait)
    assert (step.situation.reason, step.situation.is_stalled) == ("SmokePromptFailed", True)
    for told in ("HTTP 500: boom", "older of job earlier still answers", "kubectl delete job", "inference.version"):
        assert told in step.situation.message


def test_a_version_that_came_up_late_is_asked_again():
    unanswered = make_unanswered(make_version().label, EXIT_NO_ANSWER, "no answer in 300 s")
    waiting = make_version(is_ready=False, ready_replicas=0)
    assert isinstance(look(endpoint=make_endpoint(OTHER), versions=(waiting, OTHER), **unanswered), Wait)
    assert isinstance(look(endpoint=make_endpoint(OTHER), versions=(make_version(), OTHER), **unanswered), Remove)


def test_a_crashing_candidate_says_why():
    version = make_version(is_ready=False, ready_replicas=0)
    report = make_report(
        "serve", 66, "PromotionInvalid", "/workspace/output/x is no whole model", hint="Promote again."
    )
    pod = dataclasses.replace(
        make_pod(make_smoke_job(version.label), waiting_reason="CrashLoopBackOff"),
        version=version.label,
        restarts=3,
        last_exit=make_exit(66, report=report),
    )
    jobs = (make_smoke_job(version.label),)
    step = look(endpoint=make_endpoint(OTHER), versions=(version, OTHER), serving_pods=(pod,), jobs=jobs)
    assert (step.situation.reason, step.situation.is_stalled) == ("EndpointUnhealthy", True)
    for told in ("abc123", "is no whole model: Promote again.", "older of job earlier still answers"):
        assert told in step.situation.message


def test_the_version_before_stays_until_the_new_one_has_proved_itself():
    version = make_version()
    live = make_endpoint(version, previous=OTHER.label)
    early = look(finished=True, endpoint=live, versions=(version, OTHER), now=NOW + seconds(1))
    assert isinstance(early, Finish)
    assert early.until == NOW + seconds(PROVING_SECONDS)
    step = look(finished=True, endpoint=live, versions=(version, OTHER))
    assert isinstance(step, Scale)
    assert (step.name, step.replicas, step.job) == (OTHER.name, 0, ("", ""))
    assert {each.kind for each in step.surplus} >= {"Service", "Job"}
    retired = dataclasses.replace(OTHER, replicas=0)
    assert isinstance(look(finished=True, endpoint=live, versions=(version, retired)), Finish)


def test_another_jobs_candidate_is_left_alone():
    version = make_version()
    candidate = dataclasses.replace(OTHER, job="later", job_uid="later-uid", is_ready=False)
    assert isinstance(look(finished=True, endpoint=make_endpoint(version), versions=(version, candidate)), Finish)


def test_a_version_that_dies_under_the_traffic_gives_it_back():
    version = make_version(is_ready=False, ready_replicas=0)
    pod = dataclasses.replace(make_pod(make_smoke_job(version.label)), version=version.label, restarts=1)
    live = make_endpoint(version, previous=OTHER.label)
    world = {"endpoint": live, "versions": (version, OTHER), "serving_pods": (pod,)}
    step = look(finished=True, **world)
    assert read_live(step) == OTHER.label
    assert step.objects[0]["metadata"]["annotations"]["finetune.dev/refused-version"] == version.label
    gone = {**world, "versions": (version, dataclasses.replace(OTHER, replicas=0))}
    assert isinstance(look(finished=True, **gone), Finish)


def test_a_version_that_gave_the_traffic_back_is_not_tried_again():
    version = make_version()
    live = make_endpoint(OTHER, holder=PLAN.name, holder_uid=UID, refused=version.label)
    step = look(finished=True, endpoint=live, versions=(version, OTHER))
    assert isinstance(step, Scale)
    assert (step.name, step.replicas) == (version.name, 0)
    retired = dataclasses.replace(version, replicas=0)
    step = look(finished=True, endpoint=live, versions=(retired, OTHER))
    assert (step.situation.reason, step.situation.is_stalled) == ("VersionRefused", True)
    assert "kubectl annotate service support-7b finetune.dev/refused-version-" in step.situation.message


def test_going_back_to_a_version_of_ones_own_starts_it_from_the_workspace():
    plan = make_test_plan(inference={"version": "older"})
    mine = make_version()
    step = look(plan, finished=True, endpoint=make_endpoint(mine), versions=(mine,))
    (deployment,) = [each for each in step.objects if each["kind"] == "Deployment"]
    assert deployment["metadata"]["annotations"]["finetune.dev/model-digest"] == "older"
    assert deployment["metadata"]["name"] != mine.name


def test_going_back_to_another_jobs_version_takes_the_pods_that_served_it():
    plan = make_test_plan(inference={"version": "older", "replicas": 2})
    mine = make_version()
    kept = dataclasses.replace(OTHER, replicas=0, workspace=("earlier-workspace", ""))
    live = make_endpoint(mine)
    step = look(plan, finished=True, endpoint=live, versions=(mine, kept))
    assert isinstance(step, Scale)
    assert (step.name, step.replicas, step.job) == (kept.name, 2, (plan.name, UID))
    started = dataclasses.replace(kept, replicas=2, job=plan.name, job_uid=UID)
    step = look(plan, finished=True, endpoint=live, versions=(mine, started))
    assert isinstance(step, Create)
    assert step.objects[-1]["spec"]["template"]["spec"]["containers"][0]["image"] == kept.image
    answered = make_answered(kept.label, plan)
    step = look(plan, finished=True, endpoint=live, versions=(mine, started), **answered)
    assert read_live(step) == kept.label


def test_only_so_many_earlier_versions_are_kept():
    version = make_version()
    retired = tuple(
        dataclasses.replace(
            OTHER, label=f"v-{number}", name=f"e-v-{number}", replicas=0, created_at=NOW + seconds(number)
        )
        for number in range(KEPT_VERSIONS + 2)
    )
    step = look(finished=True, endpoint=make_endpoint(version), versions=(version, *retired))
    assert isinstance(step, Remove)
    assert [each.name for each in step.references if each.kind == "Deployment"] == ["e-v-0", "e-v-1"]


def test_an_endpoint_of_a_release_without_versions_goes_over_without_a_gap():
    first = make_version(label="first", name="support-7b")
    live = make_endpoint(first)
    assert isinstance(look(finished=True, endpoint=live, versions=(first,)), Apply)
    version = make_version()
    step = look(finished=True, endpoint=live, versions=(first, version), **make_answered(version.label))
    assert read_live(step) == version.label
    step = look(finished=True, endpoint=make_endpoint(version, previous="first"), versions=(first, version))
    assert {(each.kind, each.name) for each in step.references} == {
        ("Deployment", "support-7b"),
        ("ConfigMap", "support-7b-serve"),
    }


def test_a_taken_over_endpoint_is_left_alone():
    later = dataclasses.replace(OTHER, job="later", job_uid="later-uid")
    step = look(finished=True, endpoint=make_endpoint(later), versions=(later, make_version()), has_finalizer=False)
    assert isinstance(step, Finish)
    assert (step.kept, step.situation.reason) == ((), "TakenOver")


def test_a_foreign_service_of_that_name_is_left_alone():
    step = look(endpoint=Endpoint(is_ours=False))
    assert (step.situation.reason, step.situation.is_stalled) == ("EndpointTaken", True)


def test_switching_inference_off_removes_the_endpoint_at_once():
    plan = make_test_plan(inference={"enabled": False})
    version = make_version()
    step = look(plan, finished=True, endpoint=make_endpoint(version), versions=(version,))
    assert isinstance(step, Remove)
    # The Service last: as long as it is there, the rest is known to be this job's.
    assert step.references[-1].kind == "Service"
    assert isinstance(look(plan, finished=True), SetFinalizer)


@pytest.mark.parametrize("is_retained", [True, False])
def test_a_deleted_job_takes_its_endpoint_unless_it_is_retained(is_retained):
    version = make_version()
    world = make_observed(PLAN, RECORD, endpoint=make_endpoint(version), versions=(version,), has_finalizer=True)
    step = next_deletion_step(PLAN.names, UID, is_retained, world)
    assert isinstance(step, SetFinalizer if is_retained else Remove)


def test_a_deleted_job_takes_its_candidate_and_leaves_what_answers():
    candidate = make_version()
    world = make_observed(PLAN, RECORD, endpoint=make_endpoint(OTHER), versions=(OTHER, candidate), has_finalizer=True)
    step = next_deletion_step(PLAN.names, UID, False, world)
    assert {each.name for each in step.references} == {candidate.name}


@pytest.mark.parametrize(
    ("changed", "is_another"),
    [
        ({"inference": {"pod": {"resources": {"limits": {"memory": "4Gi"}}}}}, True),
        ({"inference": {"runtime": "transformers"}}, True),
        ({"inference": {"version": "older"}}, True),
        ({"inference": {"loadFrom": "S3"}, "promotion": {"destinations": [{"destination": "s3://a/b"}]}}, True),
        ({"promotion": {"destinations": [{"destination": "s3://a/b"}]}}, False),
        ({"inference": {"replicas": 3}}, False),
        ({"evaluation": {"gates": [{"task": "holdout", "metric": "loss", "min": 1}]}}, False),
        ({"ttlSecondsAfterFinished": 5}, False),
    ],
)
def test_what_the_pods_are_makes_another_version_and_nothing_else_does(changed, is_another):
    assert (label_of(make_test_plan(**changed)) != label_of(PLAN)) is is_another


def test_names_of_versions_fit_kubernetes():
    plan = make_test_plan(inference={"endpoint": "e" * 45})
    assert len(plan.names.smoke_job(label_of(plan))) <= 63


def find(plan, kind, **options):
    """Return the object of one kind among those of a plan's version; None when there is none."""
    objects = build_served(plan, RECORD, **options).objects
    return next((each for each in objects if each["kind"] == kind), None)


def test_serving_pods_accept_requests_and_ask_nobody():
    policy = find(PLAN, "NetworkPolicy")["spec"]
    assert policy["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]
    assert (policy["egress"], policy["policyTypes"]) == ([], ["Ingress", "Egress"])
    labels = find(PLAN, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()


def make_plan_from_s3(runtime="vllm", **inference):
    destinations = [
        {"destination": "hf://org/model"},
        {"destination": "s3://models/support/", "secretRef": {"name": "bucket"}},
    ]
    chosen = {"loadFrom": "S3", "runtime": runtime, **inference}
    return make_test_plan(inference=chosen, promotion={"destinations": destinations})


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_servers_that_read_a_copy_need_no_volume_and_run_anywhere(runtime):
    plan = make_plan_from_s3(runtime)
    template = find(plan, "Deployment")["spec"]["template"]
    pod, (server,) = template["spec"], template["spec"]["containers"]
    assert not [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
    assert not [each for each in server["volumeMounts"] if each["mountPath"] == "/workspace"]
    assert server["envFrom"] == [{"prefix": "FINETUNE_DESTINATION_1_", "secretRef": {"name": "bucket"}}]
    assert naming.LABEL_WORKSPACE not in template["metadata"]["labels"], "others need not be beside it"
    assert find(plan, "NetworkPolicy")["spec"]["egress"] == [{}], "where the bucket is, only the Secret knows"
    if runtime == "vllm":
        folder = "s3://models/support/abc123"
        assert server["args"][:6] == [
            *(f"--promoted={folder}", "--field=spec.promotion.destinations[1]"),
            *("--secret-prefix=FINETUNE_DESTINATION_1_", "--", "vllm", "serve"),
        ]
        assert server["args"][6] == folder
        assert "--load-format=runai_streamer" in server["args"]
    else:
        run = RunConfig.from_json(find(plan, "ConfigMap")["data"]["run.json"])
        assert (run.serving.source, run.promotion.digest) == ("s3://models/support", "abc123")


def test_what_reads_the_copy_is_no_matter_of_the_other_phases():
    training = build_run_config(make_plan_from_s3(), RECORD)
    assert training.serving == build_run_config(PLAN, RECORD).serving


def test_a_copy_s_servers_are_not_kept_on_the_node_of_the_volume():
    plan = make_plan_from_s3()
    record = RECORD.with_phase(Phase.PUBLISH, {"destinations": ["hf://org/model", "s3://models/support/abc123"]})
    world = make_observed(plan, record, has_finalizer=True, endpoint=make_endpoint(OTHER), versions=(OTHER,))
    step = next_step(plan, world, LATER)
    (deployment,) = [each for each in step.objects if each["kind"] == "Deployment"]
    assert "podAffinity" not in deployment["spec"]["template"]["spec"].get("affinity", {})


def test_going_back_from_s3_to_the_workspace_builds_the_version_anew():
    plan = make_test_plan(inference={"version": "older"})
    copied = dataclasses.replace(OTHER, workspace=("", ""), replicas=0, job=PLAN.name, job_uid=UID)
    mine = make_version()
    step = look(plan, finished=True, endpoint=make_endpoint(mine), versions=(mine, copied))
    (deployment,) = [each for each in step.objects if each["kind"] == "Deployment"]
    assert deployment["metadata"]["name"] != copied.name


def test_one_replica_may_be_evicted_and_one_of_several_at_a_time():
    assert find(PLAN, "PodDisruptionBudget") is None
    budget = find(make_test_plan(inference={"replicas": 2}), "PodDisruptionBudget")
    assert budget["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize(
    ("written", "metric", "target"),
    [
        ({"maxReplicas": 4}, "vllm:num_requests_waiting", {"type": "AverageValue", "averageValue": "5"}),
        ({"maxReplicas": 4, "metric": "queue", "target": 3}, "queue", {"type": "AverageValue", "averageValue": "3"}),
        ({"maxReplicas": 4, "metric": "cpu"}, "cpu", {"type": "Utilization", "averageUtilization": 80}),
    ],
)
def test_an_autoscaler_has_the_number_of_pods_to_itself(written, metric, target):
    plan = make_test_plan(inference={"autoscaling": written})
    spec = find(plan, "HorizontalPodAutoscaler")["spec"]
    (entry,) = spec["metrics"]
    told = entry.get("resource") or {**entry["pods"]["metric"], "target": entry["pods"]["target"]}
    assert (told["name"], told["target"]) == (metric, target)
    assert spec["scaleTargetRef"]["name"] == find(plan, "Deployment")["metadata"]["name"]
    assert "replicas" not in find(plan, "Deployment")["spec"]
    version = make_version(plan, replicas=3, ready_replicas=3)
    step = look(plan, finished=True, endpoint=make_endpoint(version), versions=(version,))
    assert isinstance(step, Finish)


def test_an_autoscaled_version_that_is_gone_back_to_gets_its_least_number_of_pods():
    plan = make_test_plan(inference={"autoscaling": {"minReplicas": 2, "maxReplicas": 4}})
    retired = make_version(plan, replicas=0, ready_replicas=0)
    live = make_endpoint(OTHER, holder=PLAN.name, holder_uid=UID)
    step = look(plan, finished=True, endpoint=live, versions=(retired, OTHER))
    assert isinstance(step, Scale)
    assert (step.name, step.replicas) == (retired.name, 2)


def test_on_a_volume_of_one_node_all_servers_of_it_are_on_that_node():
    for is_on_one_node in (True, False):
        template = find(PLAN, "Deployment", is_on_one_node=is_on_one_node)["spec"]["template"]
        near = template["spec"].get("affinity", {}).get("podAffinity", {})
        assert bool(near) is is_on_one_node
        if near:
            (term,) = near["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "kubernetes.io/hostname"
            # Kubernetes places the first pod of such a group only because the term matches the pod itself.
            assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_replicas_beyond_the_node_of_the_volume_are_told_the_way_out():
    version = make_version(is_ready=False, ready_replicas=0)
    condition = PodCondition("False", "Unschedulable", "0/3 nodes are available", since=NOW)
    pod = make_pod(make_smoke_job(version.label), phase="Pending", node="", conditions={"PodScheduled": condition})
    pods = (dataclasses.replace(pod, version=version.label),)
    world = {"endpoint": make_endpoint(OTHER), "versions": (version, OTHER), "serving_pods": pods}
    world["jobs"] = (make_smoke_job(version.label),)
    step = look(**world, now=NOW + seconds(3600))
    assert step.situation.reason == "Unschedulable"
    for told in (
        "0/3 nodes",
        "accessMode: ReadWriteMany",
        "inference.loadFrom: S3",
        "inference.replicas",
        "still answers",
    ):
        assert told in step.situation.message
    shared = Claim(
        PLAN.workspace.claim, uid="claim", phase="Bound", capacity_bytes=2**40, access_modes=("ReadWriteMany",)
    )
    step = look(endpoint=make_endpoint(OTHER), versions=(OTHER,), claim=shared)
    (deployment,) = [each for each in step.objects if each["kind"] == "Deployment"]
    assert "podAffinity" not in deployment["spec"]["template"]["spec"].get("affinity", {})


@pytest.mark.parametrize(
    ("runtime", "names"),
    [("transformers", {"INFERENCE_API_KEY"}), ("vllm", {"INFERENCE_API_KEY", "VLLM_API_KEY"})],
)
def test_the_api_key_reaches_server_and_smoke_prompt_by_reference(runtime, names):
    inference = {"runtime": runtime, "apiKeySecretRef": {"name": "keys"}}
    plan = make_test_plan(inference=inference)
    server = find(plan, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    job = build_smoke_job(plan, label_of(plan), "image", 300)
    smoke = job["spec"]["template"]["spec"]["containers"][0]
    for container, wanted in ((server, names), (smoke, names & {"INFERENCE_API_KEY"})):
        keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
        assert keys.keys() == wanted
        assert all(each == {"name": "keys", "key": "INFERENCE_API_KEY"} for each in keys.values())


def test_a_start_may_take_as_long_as_the_model_takes_to_read():
    def read(size):
        record = make_record(*EVALUATED).with_phase("promote", {"digest": "abc123", "bytes": size})
        server = build_served(PLAN, record).objects[1]["spec"]["template"]["spec"]["containers"][0]
        return server["startupProbe"]["failureThreshold"] * server["startupProbe"]["periodSeconds"]

    assert read(140_000_000_000) - read(0) == 1400


def test_a_release_with_more_settings_makes_no_other_version_and_older_images_can_read_it():
    text = find(PLAN, "ConfigMap")["data"]["run.json"]
    assert set(json.loads(text)) == {"dataset", "job", "model", "promotion", "serving", "version"}
    run = RunConfig.from_json(text)
    assert (run.promotion.digest, run.serving.model_name, run.job.uid) == ("abc123", "support-7b", UID)


def test_a_model_too_large_for_its_gpus_is_refused_with_the_numbers():
    plan = make_test_plan(placement={"preset": "aks-a100"}, resources={"gpusPerNode": 4})
    record = RECORD.with_phase("promote", {"digest": "abc123", "bytes": 141_000_000_000, "parameters": 70_500_000_000})
    world = {"has_finalizer": True, "endpoint": make_endpoint(OTHER), "versions": (OTHER,)}
    step = next_step(plan, make_observed(plan, record, **world), LATER)
    assert (step.situation.reason, step.situation.is_stalled) == ("ModelTooLarge", True)
    told = step.situation.message
    for text in ("141 GB", "2.0 bytes for each of 70.5 billion", "80 GB", "72 GB", "at least 2", "still answers"):
        assert text in told, told
    enough = make_test_plan(
        placement={"preset": "aks-a100"}, resources={"gpusPerNode": 4}, inference={"gpusPerReplica": 2}
    )
    assert isinstance(next_step(enough, make_observed(enough, record, **world), LATER), Apply)


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (None, "see kubectl logs"),
        (make_exit(137, "OOMKilled"), "raise inference.pod.resources.limits.memory"),
        (make_exit(1, report=make_report("serve", 1, "ServerFailed", "vLLM ended")), "vLLM ended: see kubectl logs"),
        (make_exit(1, message="Traceback\nValueError: no such flag\n\n"), "code 1: ValueError: no such flag"),
        (
            make_exit(66, report=make_report("serve", 66, "X", "a folder is damaged", hint="Promote again.")),
            "Promote again",
        ),
    ],
)
def test_a_server_that_crashes_is_quoted(ended, said):
    assert said in explain_crash(dataclasses.replace(make_pod(make_smoke_job("x")), last_exit=ended))


def test_a_server_that_takes_long_to_start_is_quoted_with_its_probe():
    version = make_version(is_ready=False, ready_replicas=0)
    pod = dataclasses.replace(make_pod(make_smoke_job(version.label)), version=version.label)
    world = {"endpoint": make_endpoint(OTHER), "versions": (version, OTHER), "serving_pods": (pod,)}
    world |= {"jobs": (make_smoke_job(version.label),), "warnings": {pod.uid: "Startup probe failed: HTTP 503"}}
    step = look(**world, now=NOW + seconds(10))
    assert step.situation.message == "the endpoint is starting; older of job earlier still answers"
    step = look(**world, now=NOW + seconds(100))
    assert (step.situation.reason, step.situation.is_stalled) == ("Deploying", False)
    assert "Startup probe failed: HTTP 503" in step.situation.message
