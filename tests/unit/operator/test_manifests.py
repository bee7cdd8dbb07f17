"""Whole child objects against goldens in tests/data/manifests, and the promises that no golden may break."""

from __future__ import annotations

import dataclasses
import json

import pytest

from finetune_contract.gates import GateConfig
from finetune_contract.reports import Phase
from finetune_contract.run_config import RunConfig, RunHistory
from finetune_operator.manifests.inference import build_served, build_service, build_smoke_job
from finetune_operator.manifests.memory import build_plan_map, build_record_map
from finetune_operator.manifests.phases import build_phase
from finetune_operator.manifests.training import build_attempt, build_disruption_budget, build_training_service
from finetune_operator.manifests.workspace import build_workspace_claim
from finetune_operator.record import Attempt, Exclusion
from tests.support.operator_parts import make_record, make_settings, make_test_plan

PHASES = (Phase.INSPECT, Phase.PREPARE, Phase.PROMOTE, Phase.EVALUATE, Phase.PUBLISH, Phase.COMPOSE)
RECORD = make_record(Phase.INSPECT, Phase.PREPARE, Phase.TRAIN, Phase.PROMOTE)
ADMINISTRATORS = {
    "proxies": {"httpsProxy": "http://proxy:3128", "noProxy": ".svc"},
    "caBundle": "PEM",
    "defaults": {"serviceAccountName": "trainer", "storageClassName": "fast"},
}
PRESETS = ("aks-a100", "aks-a100-spot", "gke-a100", "eks-a100")


def full_plan():
    """Return a plan that uses everything a manifest may hold."""
    return make_test_plan(
        make_settings(**ADMINISTRATORS, progress={"url": "https://progress:8443"}),
        model={"source": "hf://org/base", "secretRef": {"name": "hub"}},
        training={"tracking": {"wandb": {"secretRef": {"name": "wandb"}, "project": "support"}}},
        resources={"nodes": 2, "gpusPerNode": 4, "cpu": "88", "memory": "800Gi", "sharedMemory": "64Gi"},
        placement={"preset": "aks-a100", "zones": ["eastus-1"], "topologyKey": "rack", "queueName": "team-a"},
        pod={"imagePullSecrets": [{"name": "registry"}], "labels": {"team": "a"}, "priorityClassName": "high"},
        promotion={"destinations": [{"destination": "s3://bucket/out", "secretRef": {"name": "out"}}]},
        inference={"adapters": [{"name": "polite", "source": "s3://bucket/polite", "secretRef": {"name": "adapters"}}]},
    )


def cpu_plan():
    return make_test_plan(resources={"gpusPerNode": 0, "cpu": "4", "processesPerNode": 2})


def all_jobs(plan):
    jobs = [build_phase(plan, phase, RECORD, "CA")[1] for phase in PHASES]
    return [*jobs, build_attempt(plan, RECORD, 1, "CA")[1]]


def all_pods(plan):
    deployment = build_served(plan, RECORD).objects[1]
    smoke = build_smoke_job(plan, "abc123-0000", "server:1", 300)
    return [each["spec"]["template"]["spec"] for each in (*all_jobs(plan), deployment, smoke)]


def requirements(pod):
    affinity = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return [each for term in affinity.get("nodeSelectorTerms", ()) for each in term["matchExpressions"]]


@pytest.mark.parametrize("phase", PHASES)
def test_phase(phase, assert_golden):
    assert_golden(f"{phase}-full", build_phase(full_plan(), phase, RECORD, "CA")[1])


def test_training_on_gpus(assert_golden):
    plan = full_plan()
    assert_golden(
        "training-full",
        *build_attempt(plan, RECORD, 1, "CA"),
        build_training_service(plan),
        build_disruption_budget(plan),
    )


def test_training_on_a_cpu(assert_golden):
    assert_golden("training-cpu", *build_attempt(cpu_plan(), RECORD, 2, "CA"))


def _build_endpoint(plan):
    """Return the objects of an endpoint, without the text of the scripts that are files of their own."""
    served = build_served(plan, RECORD)
    config_map, *others = served.objects
    assert config_map["data"].pop("smoke_prompt.py").startswith('"""The smoke prompt')
    if plan.serving.runtime == "vllm":
        assert config_map["data"].pop("vllm_server.py").startswith('"""Starts vLLM in a pod')
    live = build_service(plan, served.label, served.digest)
    return config_map, *others, live, build_smoke_job(plan, served.label, plan.pods[Phase.SERVE].image, 300)


def test_endpoint_on_gpus(assert_golden):
    assert_golden("endpoint-full", *_build_endpoint(full_plan()))


def test_endpoint_on_a_cpu(assert_golden):
    assert_golden("endpoint-cpu", *_build_endpoint(cpu_plan()))


def test_workspace(assert_golden):
    kept = build_workspace_claim(full_plan(), "1Ti")
    gone = make_test_plan(workspace={"retentionPolicy": {"whenDeleted": "Delete"}})
    assert_golden("workspace", kept, build_workspace_claim(gone, "5Gi"))


def test_memory(assert_golden):
    assert_golden("memory", build_plan_map(cpu_plan(), "1"), build_record_map(cpu_plan(), RECORD))


@pytest.mark.parametrize(
    ("spec", "per_parameter"),
    [
        # ZeRO-3 over two pods: half of the optimizer's shards each; without it the first pod has the weights too.
        ({"training": {"deepspeed": {"zeroStage": 3}}, "resources": {"nodes": 2}}, 6),
        ({"training": {"deepspeed": {"zeroStage": 2}}, "resources": {"nodes": 2}}, 8),
        ({"training": {"deepspeed": {"zeroStage": 3, "offload": "optimizer"}}, "resources": {"nodes": 2}}, 14),
        ({"training": {"deepspeed": {"zeroStage": 3}}, "resources": {"gpusPerNode": 0}}, 28),
        ({"training": {"method": "lora", "lora": {"rank": 32}}, "resources": {"nodes": 1}}, 14 * 0.02),
    ],
)
def test_a_training_pod_asks_for_the_memory_of_its_saves(spec, per_parameter):
    record = RECORD.with_phase(Phase.INSPECT, {"model_parameters": 7 << 30})

    (container,) = build_attempt(make_test_plan(**spec), record, 1, "CA")[1]["spec"]["template"]["spec"]["containers"]

    assert container["resources"]["requests"]["memory"] == f"{int(7 * 1024 * per_parameter)}Mi"
    assert "memory" not in container["resources"]["limits"]


def test_what_the_job_says_about_memory_is_asked_for_as_it_is():
    plan = make_test_plan(resources={"memory": "3Gi"})

    (container,) = build_attempt(plan, RECORD, 1, "CA")[1]["spec"]["template"]["spec"]["containers"]

    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"] == "3Gi"


def test_no_more_memory_is_asked_for_than_the_pod_s_own_limit_allows():
    record = RECORD.with_phase(Phase.INSPECT, {"model_parameters": 7 << 30})
    plan = make_test_plan(training={"pod": {"resources": {"limits": {"memory": "96Mi"}}}})

    (container,) = build_attempt(plan, record, 1, "CA")[1]["spec"]["template"]["spec"]["containers"]

    # Kubernetes asks for the limit where a pod says nothing else, and refuses a pod that asks for more.
    assert container["resources"]["limits"]["memory"] == "96Mi"
    assert "memory" not in container["resources"]["requests"]


@pytest.mark.parametrize("plan", [full_plan(), cpu_plan()], ids=["full", "cpu"])
def test_every_pod_fits_the_restricted_pod_security_standard(plan):
    for pod in all_pods(plan):
        security = pod["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 65532)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert own["readOnlyRootFilesystem"] is True
        allowed = {"configMap", "emptyDir", "projected", "persistentVolumeClaim"}
        assert {kind for volume in pod["volumes"] for kind in volume if kind != "name"} <= allowed


def test_no_user_secret_is_mounted_into_a_pod_that_does_not_need_it():
    by_phase = {phase: build_phase(full_plan(), phase, RECORD, "CA")[1] for phase in PHASES}
    used = {
        phase: {each["secretRef"]["name"] for each in _container(job)["envFrom"]} for phase, job in by_phase.items()
    }
    assert used == {
        Phase.INSPECT: {"hub"},
        Phase.PREPARE: {"hub"},
        Phase.PROMOTE: set(),
        Phase.EVALUATE: {"hub"},
        Phase.PUBLISH: {"out"},
        Phase.COMPOSE: {"adapters"},
    }


def _container(job):
    return job["spec"]["template"]["spec"]["containers"][0]


def test_every_job_waits_in_the_queue_and_without_one_none_does():
    for job in all_jobs(full_plan()):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert job["spec"]["suspend"] is True
    for job in all_jobs(cpu_plan()):
        assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]
        assert "suspend" not in job["spec"]


@pytest.mark.parametrize("preset", PRESETS)
def test_only_pods_with_gpus_are_sent_to_the_gpu_pool(preset):
    plan = make_test_plan(placement={"preset": preset, "zones": ["z1"]}, resources={"gpusPerNode": 4})
    for job in all_jobs(plan):
        pod = job["spec"]["template"]["spec"]
        component = job["metadata"]["labels"]["finetune.dev/component"]
        has_gpus = component in ("train", "evaluate", "compose")
        keys = {each["key"] for each in requirements(pod)}
        assert "topology.kubernetes.io/zone" in keys, "every pod mounts the volume, so every pod is in its zone"
        assert (len(keys) > 1) == has_gpus
        assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == has_gpus
        assert any(each["key"] == "nvidia.com/gpu" for each in pod.get("tolerations", ())) == has_gpus


def test_what_a_user_writes_about_nodes_is_joined_with_the_preset():
    written = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "pool", "operator": "In", "values": [pool]}]} for pool in ("a", "b")
                ]
            }
        }
    }
    plan = make_test_plan(placement={"preset": "eks-a100"}, pod={"affinity": written})
    pod = build_attempt(plan, RECORD, 1, "CA")[1]["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [[each["key"] for each in term["matchExpressions"]] for term in terms] == [
        ["pool", "node.kubernetes.io/instance-type"],
        ["pool", "node.kubernetes.io/instance-type"],
    ]


def test_training_refuses_voluntary_eviction_and_leaves_excluded_nodes_alone():
    plan = cpu_plan()
    record = make_record(
        Phase.INSPECT, Phase.PREPARE, excluded_nodes=(Exclusion("bad-node", "XidError", "2099-01-01T00:00:00Z"),)
    )
    template = build_attempt(plan, record, 3, "CA")[1]["spec"]["template"]
    assert template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert requirements(template["spec"]) == [
        {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["bad-node"]}
    ]
    budget = build_disruption_budget(plan)["spec"]
    labels = template["metadata"]["labels"]
    assert budget["minAvailable"] > 1024
    assert budget["selector"]["matchLabels"].items() <= labels.items()


def test_a_pod_without_gpus_says_so_to_torch_and_shares_its_cores():
    names = {each["name"]: each["value"] for each in _container(build_attempt(cpu_plan(), RECORD, 1, "CA")[1])["env"]}
    assert (names["CUDA_VISIBLE_DEVICES"], names["DS_ACCELERATOR"], names["OMP_NUM_THREADS"]) == ("", "cpu", "2")


def test_inspect_reads_a_claim_only_when_a_source_lies_on_it():
    plan = make_test_plan(model={"source": "pvc://models/base"}, workspace={"existingClaim": "shared"})
    mounts = _container(build_phase(plan, Phase.INSPECT, make_record(), "CA")[1])["volumeMounts"]
    (workspace,) = [each for each in mounts if each["name"] == "workspace"]
    assert workspace == {"name": "workspace", "mountPath": "/workspace", "subPath": "support-7b", "readOnly": True}


def test_users_environment_wins_over_ours():
    plan = make_test_plan(pod={"env": [{"name": "OMP_NUM_THREADS", "value": "7"}]}, resources={"gpusPerNode": 0})
    env = _container(build_attempt(plan, RECORD, 1, "CA")[1])["env"]
    assert [each["value"] for each in env if each["name"] == "OMP_NUM_THREADS"] == ["7"]


def training_pod(record=RECORD, **spec):
    return build_attempt(make_test_plan(**spec), record, 1, "CA")[1]["spec"]["template"]["spec"]


def environment_of(pod):
    return {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}


def test_a_training_pod_may_take_as_long_to_stop_as_a_step_and_two_saves():
    measured = dataclasses.replace(RECORD, save_seconds=400.0, step_seconds=20.0)
    pod = training_pod(measured)
    assert pod["terminationGracePeriodSeconds"] == 840
    assert environment_of(pod)["FINETUNE_NOTICE_SECONDS"] == "840"
    assert environment_of(pod)["FINETUNE_SAVE_SECONDS"] == "400.0"
    assert training_pod(dataclasses.replace(RECORD, save_seconds=1.0))["terminationGracePeriodSeconds"] == 120
    assert training_pod(dataclasses.replace(RECORD, save_seconds=9e9))["terminationGracePeriodSeconds"] == 3600


def test_before_a_save_has_been_measured_its_time_follows_from_the_models_size():
    details = {**RECORD.details(Phase.INSPECT), "model_parameters": 7_000_000_000}
    grace = training_pod(RECORD.with_phase(Phase.INSPECT, details))["terminationGracePeriodSeconds"]
    assert 1200 < grace < 3600
    lora = training_pod(RECORD.with_phase(Phase.INSPECT, details), training={"method": "lora"})
    assert lora["terminationGracePeriodSeconds"] == 120


def test_on_spot_nodes_a_pod_counts_on_the_clouds_notice_only():
    pod = training_pod(placement={"preset": "aks-a100-spot"})
    assert environment_of(pod)["FINETUNE_NOTICE_SECONDS"] == "30"
    assert pod["terminationGracePeriodSeconds"] >= 120


@pytest.mark.parametrize(
    ("spec", "restarts_counted", "allowed"),
    [
        ({}, 0, 3),
        ({}, 4, 1),
        ({"failurePolicy": {"maxRestarts": 2}}, 0, 2),
        ({"failurePolicy": {"maxRestarts": 2}}, 5, 0),
        ({"resources": {"nodes": 2}, "workspace": {"accessMode": "ReadWriteMany"}}, 0, 0),
        (
            {"failurePolicy": {"rules": [{"name": "r", "onExitCodes": {"values": [1]}, "action": "FailJob"}]}},
            *(0, 0),
        ),
    ],
)
def test_ranks_restart_inside_their_pod_only_where_the_job_allows_restarts(spec, restarts_counted, allowed):
    record = dataclasses.replace(RECORD, restarts_counted=restarts_counted)
    config_map, _ = build_attempt(make_test_plan(**spec), record, 1, "CA")
    assert json.loads(config_map["data"]["run.json"])["topology"]["in_pod_restarts"] == allowed


def test_a_phase_that_runs_again_with_another_gate_is_told_of_it():
    def build_settings(phase, least):
        gates = [{"task": "holdout", "metric": "loss", "max": least}]
        config_map, _ = build_phase(make_test_plan(evaluation={"gates": gates}), phase, RECORD, "CA")
        return config_map["metadata"]["name"], RunConfig.from_json(config_map["data"]["run.json"]).evaluation.gates

    for phase in (Phase.EVALUATE, Phase.PUBLISH):
        (before, old), (after, new) = build_settings(phase, 2), build_settings(phase, 3)
        # A ConfigMap is made once: under the old name the pod would find the old gate.
        assert before != after
        assert (old, new) == (
            (GateConfig("holdout", "loss", "max", 2.0),),
            (GateConfig("holdout", "loss", "max", 3.0),),
        )


def test_the_phases_behind_training_are_told_what_the_operator_alone_knows():
    attempts = (
        Attempt(1, "support-7b-train-1", nodes=("node-a",), reason="NodeLost", reached_step=40, steps_lost=8),
        Attempt(2, "support-7b-train-2", nodes=("node-b",), reason="Completed", resumed_from_step=32, reached_step=100),
    )
    known = dataclasses.replace(
        RECORD,
        attempts=attempts,
        restarts=1,
        restarts_by_reason={"NodeLost": 1},
        productive_seconds=90.0,
        training_seconds=180.0,
        steps_lost=8,
    )
    for phase in (Phase.PROMOTE, Phase.EVALUATE, Phase.PUBLISH):
        config_map, _ = build_phase(cpu_plan(), phase, known, "CA")
        history = RunConfig.from_json(config_map["data"]["run.json"]).history
        assert [(one.number, one.nodes, one.reason, one.steps_lost) for one in history.attempts] == [
            (1, ("node-a",), "NodeLost", 8),
            (2, ("node-b",), "Completed", 0),
        ]
        assert (history.attempts[1].resumed_from_step, history.attempts[1].reached_step) == (32, 100)
        assert (history.restarts, history.restarts_by_reason, history.steps_lost) == (1, {"NodeLost": 1}, 8)
        assert (history.productive_seconds, history.allocated_seconds) == (90.0, 180.0)
        assert set(history.images) == {"trainer", "inference"}
    early = build_phase(cpu_plan(), Phase.PREPARE, make_record(Phase.INSPECT), "CA")[0]
    assert RunConfig.from_json(early["data"]["run.json"]).history == RunHistory()
