"""The operator as a process: killed, doubled, asked how it is, and posted to by pods."""

from __future__ import annotations

import json
import pathlib
import ssl
import urllib.error
import urllib.request

import pytest
import yaml

from tests.support.manifests import REPOSITORY
from tests.support.operator_process import OperatorProcess
from tests.support.played_job import PlayedJob
from tests.support.waiting import eventually


@pytest.fixture
def make_operator(crd, namespace, tmp_path):
    """Start copies that look at the test's namespace only; all are gone at the end."""
    made = []

    def make(name: str) -> OperatorProcess:
        process = OperatorProcess(tmp_path / name, crd.kubeconfig, watchNamespaces=[namespace])
        process.settings["progress"]["namespace"] = namespace
        made.append(process)
        return process

    yield make
    for process in made:
        process.stop()


def make_token(kubelet, pod: dict, audience: str = "finetune.dev/progress") -> str:
    """Return a token bound to a pod, as the kubelet projects it."""
    body = {
        "spec": {
            "audiences": [audience],
            "boundObjectRef": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": pod["metadata"]["name"],
                "uid": pod["metadata"]["uid"],
            },
        }
    }
    path = f"/api/v1/namespaces/{kubelet.namespace}/serviceaccounts/default/token"
    return kubelet.rest.request("POST", path, body)["status"]["token"]


def post(process: OperatorProcess, job: PlayedJob, pod: dict, token: str, path: str = "", **metrics) -> int:
    """Post progress as a pod does, with what it has mounted; return the HTTP status."""
    ca = job.child("/api/v1", "configmaps", pod["spec"]["volumes"][0]["configMap"]["name"])["data"]["progress-ca.crt"]
    (url,) = [
        each["value"] for each in pod["spec"]["containers"][0]["env"] if each["name"] == "KUBEFLOW_TRAINER_SERVER_URL"
    ]
    body = {
        "trainerStatus": {
            "progressPercentage": metrics.pop("percentage", 50),
            "metrics": [{"name": name, "value": str(value)} for name, value in metrics.items()],
        }
    }
    origin = url.partition("/apis/")[0]
    request = urllib.request.Request(
        origin + path if path else url,
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl.create_default_context(cadata=ca))
    )
    try:
        with opener.open(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_an_operator_killed_in_every_phase_carries_on(make_operator, kubelet):
    job = PlayedJob(kubelet, "killed").apply(inference={"enabled": True})
    process = make_operator("one").start()
    for component in ("inspect", "prepare", "train", "promote", "evaluate"):
        (pod,) = kubelet.wait_for_pods("killed", component, within=60)
        process.kill()
        kubelet.succeed(pod, component)
        process.start()
    kubelet.wait_for_pods("killed", "smoke", within=60)
    process.kill()
    kubelet.answer("killed")
    process.start()
    status = job.wait_for_state("Succeeded", within=60)
    assert [(each["number"], each["reason"]) for each in status["attempts"]] == [(1, "Completed")]
    assert (status["restarts"], job.jobs()) == (0, ["evaluate", "inspect", "prepare", "promote", "train-1"])


def test_a_pod_that_failed_while_the_operator_was_away_is_found_afterwards(make_operator, kubelet):
    job = PlayedJob(kubelet, "away").apply()
    process = make_operator("one").start()
    job.prepare()
    (pod,) = job.train()
    process.kill()
    kubelet.fail(pod, 1, "RankFailed", "boom")
    process.start()
    status = job.complete(attempt=2)
    assert (status["restarts"], status["attempts"][0]["reason"]) == (1, "RankFailed")


def test_two_copies_started_by_mistake_make_nothing_twice(make_operator, kubelet):
    job = PlayedJob(kubelet, "twice")
    for name in ("one", "two"):
        make_operator(name).start()
    job.apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 1, "RankFailed", "boom")
    status = job.complete(attempt=2)
    assert (status["restarts"], status["restartsCountTowardsMax"]) == (1, 1)
    assert job.jobs() == ["evaluate", "inspect", "prepare", "promote", "train-1", "train-2"]


def test_posts_of_the_jobs_own_pods_become_progress_and_others_are_refused(make_operator, kubelet):
    process = make_operator("one").start().wait_until_healthy()
    job, other = PlayedJob(kubelet, "posting").apply().prepare(), PlayedJob(kubelet, "other").apply()
    (pod,) = job.train()
    (stranger,) = kubelet.wait_for_pods("other", "inspect")
    token = make_token(kubelet, pod)
    figures = {"current_step": 50, "total_steps": 100, "loss": 1.23456, "latest_checkpoint_step": 40}
    figures |= {"productive_seconds": 0.5, "checkpoint_bytes": 4096, "checkpoint_timestamp_seconds": 1767268800}
    assert post(process, job, pod, token, **figures) == 200
    progress = job.wait(lambda status: status.get("progress"))["progress"]
    assert {name: progress[name] for name in ("percentage", "step", "totalSteps", "loss")} == {
        "percentage": 50,
        "step": 50,
        "totalSteps": 100,
        "loss": 1.2346,
    }
    kubeflow = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{job.namespace}/trainjobs/posting/status"
    assert post(process, job, pod, token, kubeflow, **{**figures, "current_step": 60}) == 200
    job.wait(lambda status: status["progress"]["step"] == 60)
    assert job.status()["progress"].get("etaSeconds") is not None
    assert job.status()["progress"]["productiveSeconds"] <= job.status()["progress"]["allocatedSeconds"]
    assert job.status()["checkpoints"]["time"] == "2026-01-01T12:00:00Z"
    assert post(process, job, pod, make_token(kubelet, stranger), **figures) == 403
    assert post(process, job, pod, make_token(kubelet, pod, "somebody.else"), **figures) == 401
    assert post(process, job, pod, "no-token", **figures) == 401
    assert post(process, job, pod, token, percentage=400) == 422
    assert post(process, job, pod, token, **{f"metric-{number}": 1 for number in range(5000)}) == 413
    metrics = process.read("metrics", "/metrics")
    assert f'finetune_job_loss{{name="posting",namespace="{job.namespace}"}} 1.2346' in metrics
    assert f'finetune_job_progress_ratio{{name="posting",namespace="{job.namespace}"}}' in metrics
    assert f'finetune_job_goodput_ratio{{name="posting",namespace="{job.namespace}"}}' in metrics
    assert f'finetune_job_checkpoint_bytes{{name="posting",namespace="{job.namespace}"}} 4096.0' in metrics
    assert f'finetune_job_rows_removed{{name="posting",namespace="{job.namespace}"}} 50.0' in metrics
    assert other.status()["state"] == "Pending"


def test_an_api_server_that_was_away_is_heard_again(make_operator, kubelet, restart_api_server):
    process = make_operator("one").start().wait_until_healthy()
    job = PlayedJob(kubelet, "patient").apply().prepare()
    (pod,) = job.train()
    restart_api_server("stop")
    eventually(lambda: "trying again" in process.log() or "cannot list jobs" in process.log(), within=30)
    assert process.read("health", "/healthz") == "ok\n"
    restart_api_server("start")
    kubelet.fail(pod, 1, "RankFailed", "boom")
    status = job.complete(attempt=2)
    assert (status["restarts"], process.is_running()) == (1, True)


def test_counters_and_avoided_nodes_survive_a_restart_of_the_operator(make_operator, kubelet):
    process = make_operator("one").start().wait_until_healthy()
    rule = {"name": "flaky", "onLogPattern": "^link [0-9]+ down", "action": "RestartJobIgnoreLimit"}
    job = PlayedJob(kubelet, "counted").apply(failurePolicy={"maxRestarts": 1, "rules": [rule]}).prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 81, "XidError", "rank 0: Xid 79")
    (pod,) = job.train(attempt=2)
    kubelet.fail(pod, 1, "UserCodeError", "rank 0: boom", details={"last_lines": "step 3\nlink 4 down"})
    kubelet.wait_for_pods("counted", "train", attempt=3)
    process.kill()
    make_operator("two").start().wait_until_healthy()
    (pod,) = job.train(attempt=3)
    kubelet.fail(pod, 1, "UserCodeError", "rank 0: boom")
    status = job.wait_for_state("Failed")
    assert (status["restarts"], status["restartsCountTowardsMax"]) == (2, 1)
    assert job.condition("Finished")["reason"] == "RestartsExhausted"
    assert [each["name"] for each in status["excludedNodes"]] == ["node-a"]


def test_metrics_and_health_tell_how_it_is(make_operator, kubelet):
    process = make_operator("one").start().wait_until_healthy()
    job = PlayedJob(kubelet, "measured").apply().prepare()
    (pod,) = job.train()
    kubelet.fail(pod, 1, "RankFailed", "boom")
    job.complete(attempt=2)
    wanted = f'finetune_job_restarts{{name="measured",namespace="{job.namespace}",reason="RankFailed"}} 1.0'
    metrics = eventually(lambda: (text := process.read("metrics", "/metrics")) and wanted in text and text, within=15)
    assert f'finetune_jobs{{namespace="{job.namespace}",state="Succeeded"}} 1.0' in metrics
    assert "finetune_reconcile_seconds_count" in metrics
    job.delete()
    eventually(lambda: 'name="measured"' not in process.read("metrics", "/metrics"), within=20)


def test_roles_in_one_namespace_are_all_that_a_limited_install_needs(crd, kubelet, namespace, tmp_path):
    values = {
        "config": {
            "images": {"trainer": "example.org/trainer:1", "inference": "example.org/inference:1"},
            "watchNamespaces": [namespace],
        },
        "crds": {"enabled": False},
        "image": {"repository": "example.org/operator"},
    }
    values_file = tmp_path / "values.yaml"
    values_file.write_text(yaml.safe_dump(values))
    chart = str(REPOSITORY / "charts" / "finetune-operator")
    rendered = crd.run_helm("template", "limited", chart, "--namespace", namespace, "--values", str(values_file))
    objects = [each for each in yaml.safe_load_all(rendered) if each]
    assert "ClusterRoleBinding" not in {each["kind"] for each in objects}
    rights = [each for each in objects if each["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    crd.apply(*({**each, "metadata": {"namespace": namespace, **each["metadata"]}} for each in rights))
    (account,) = [each["metadata"]["name"] for each in rights if each["kind"] == "ServiceAccount"]
    process = OperatorProcess(tmp_path, make_kubeconfig(crd, kubelet, account, tmp_path), watchNamespaces=[namespace])
    rules = [rule for each in rights if each["kind"] == "Role" for rule in each["rules"]]
    names = next(rule["resourceNames"] for rule in rules if "secrets" in rule["resources"] and "resourceNames" in rule)
    process.settings["progress"] |= {"namespace": namespace, "tlsSecretName": names[0]}
    try:
        process.start().wait_until_healthy()
        job = PlayedJob(kubelet, "limited").apply(inference={"enabled": True}).prepare()
        (pod,) = job.train()
        assert post(process, job, pod, make_token(kubelet, pod), current_step=5, total_steps=10) == 200
        assert post(process, job, pod, make_token(kubelet, pod, "somebody.else"), current_step=5) == 401
        job.wait(lambda status: (status.get("progress") or {}).get("step") == 5)
        assert job.complete(served=True)["restarts"] == 0
        job.delete()
        eventually(lambda: job.read() is None, within=20, otherwise=process.log)
        # Before it is stopped: how Kopf cuts its watches off may be told with a traceback.
        assert "Traceback" not in process.log()
    finally:
        process.stop()
    assert "forbidden" not in process.log().replace("tokenreviews", "")


def make_kubeconfig(crd, kubelet, account: str, folder) -> str:
    """Return a kubeconfig with nothing but the rights of a ServiceAccount."""
    path = f"/api/v1/namespaces/{kubelet.namespace}/serviceaccounts/{account}/token"
    token = kubelet.rest.request("POST", path, {"spec": {}})["status"]["token"]
    config = yaml.safe_load(pathlib.Path(crd.kubeconfig).read_text())
    config["users"] = [{"name": each["name"], "user": {"token": token}} for each in config["users"]]
    limited = folder / "limited.kubeconfig"
    limited.write_text(yaml.safe_dump(config))
    return str(limited)


def test_an_operator_without_settings_says_what_is_missing(crd, tmp_path):
    process = OperatorProcess(tmp_path, crd.kubeconfig)
    process.settings.pop("images")
    process.start()
    eventually(lambda: not process.is_running(), within=20)
    assert "images: Field required" in process.log()
