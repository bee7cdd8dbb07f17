"""What the operator reads: settings, records, Kubernetes objects and texts of pods."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import ExitReport
from finetune_operator.errors import redact
from finetune_operator.observed import view_claim, view_job, view_pod
from finetune_operator.observed_endpoint import view_endpoint, view_version
from finetune_operator.record import MAX_ATTEMPTS, Attempt, Failure, Record, Terminal, read_record
from finetune_operator.settings import SettingsError, read_settings

SECRETS = {
    "hf_abcdefghijklmnopqrstuvwxyz": "401 for token hf_abcdefghijklmnopqrstuvwxyz on the hub",
    "AKIAIOSFODNN7EXAMPLE": "access denied for AKIAIOSFODNN7EXAMPLE",
    "wJalrXUtnFEMI": "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI",
    "s3cr3t-value": '{"password": "s3cr3t-value"}',
    "hunter22": "https://me:hunter22@host/path",
    "abc.def-ghi": "Authorization: Bearer abc.def-ghi",
    "eyJhbGciOiJSUzI1.eyJzdWIiOiJ4eXo.c2ln": "jwt eyJhbGciOiJSUzI1.eyJzdWIiOiJ4eXo.c2ln",
    "0123456789abcdef": "WANDB_API_KEY: 0123456789abcdef",
    "fe9807": "https://bucket/key?X-Amz-Signature=fe9807",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_what_looks_like_a_credential_is_masked(secret):
    text = redact(SECRETS[secret])
    assert secret not in text
    assert "[redacted]" in text


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens: 2048 exceeds the model's 1024",
        "tokens per second 1234.5",
        "KeyError: 'instruction' in s3://bucket/data.jsonl line 7",
        'secret "hub" not found',
        "checkpoint-800/model.safetensors: size 13476831232, expected 13476839424",
    ],
)
def test_other_texts_are_left_alone(text):
    assert redact(text) == text


@given(st.text(max_size=300))
def test_masking_twice_changes_nothing_more(text):
    assert redact(redact(text)) == redact(text)


def write(folder, text):
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_two_images_are_all_that_settings_need(tmp_path):
    settings = read_settings(write(tmp_path, "images: {trainer: t:1, inference: i:1}"))
    assert (settings.resync_seconds, settings.limits.trust_remote_code, settings.watch_namespaces) == (30, False, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images: {trainer: t:1}", "images.inference: Field required"),
        ("images: {trainer: t:1, inference: i:1}\nlimit: {}", "limit: Extra inputs"),
        ("images: [", "not YAML"),
        ("", "images: Field required"),
    ],
)
def test_settings_that_cannot_be_used_name_the_file_and_the_field(tmp_path, text, message):
    with pytest.raises(SettingsError) as caught:
        read_settings(write(tmp_path, text))
    assert "settings.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_settings_file_says_how_to_name_one(tmp_path):
    with pytest.raises(SettingsError, match="FINETUNE_OPERATOR_SETTINGS"):
        read_settings(str(tmp_path / "none.yaml"))


def test_a_record_survives_its_json():
    record = Record(
        uid="u",
        phases={"inspect": {"model_bytes": 1}},
        attempts=(Attempt(1, "x-train-1", nodes=("a", "b")),),
        last_failure=Failure("t", "r", "m"),
        terminal=Terminal("Failed", "r", "m", "t"),
    )
    assert read_record(record.to_json()) == record


def test_a_record_of_a_newer_release_is_read_as_far_as_it_is_known():
    data = json.loads(Record(uid="u").to_json()) | {"version": 9, "something_new": 1}
    assert read_record(json.dumps(data)).uid == "u"


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_what_is_no_record_is_an_error_not_an_empty_one(text):
    with pytest.raises(ValueError):
        read_record(text)


def test_only_the_newest_attempts_are_remembered():
    record = Record()
    for number in range(1, 30):
        record = record.with_attempt(Attempt(number, f"j-{number}"))
    assert [each.number for each in record.attempts] == list(range(30 - MAX_ATTEMPTS, 30))


def make_pod(**status):
    return {"metadata": {"name": "p", "labels": {"finetune.dev/attempt": "2"}}, "spec": {}, "status": status}


def test_a_report_is_told_from_the_last_lines_of_a_log():
    def view(message):
        terminated = {"exitCode": 1, "message": message}
        return view_pod(make_pod(containerStatuses=[{"name": "trainer", "state": {"terminated": terminated}}])).exit

    report = ExitReport("train", "RankFailed", "boom", exit_code=1)
    assert view(report.to_termination_message()).report == report
    log = view("Traceback ...\nKeyError: 3\n")
    assert (log.report, log.message) == (None, "Traceback ...\nKeyError: 3")


def test_sidecars_of_others_are_not_taken_for_the_trainer():
    sidecar = {"name": "istio-proxy", "state": {"terminated": {"exitCode": 3}}}
    assert view_pod(make_pod(containerStatuses=[sidecar])).exit is None


def test_a_pod_that_was_just_made_has_no_status_yet():
    pod = view_pod({"metadata": {"name": "p"}})
    assert (pod.phase, pod.node, pod.attempt, pod.exit) == ("Pending", "", 0, None)


def test_a_job_that_is_about_to_fail_has_not_failed_yet():
    def view(kind):
        return view_job({"metadata": {"name": "j"}, "status": {"conditions": [{"type": kind, "status": "True"}]}})

    assert not view("FailureTarget").is_failed
    assert view("Failed").is_failed
    assert view("Complete").is_succeeded


def test_a_claim_tells_what_it_asked_for_and_what_it_got():
    claim = view_claim(
        {
            "metadata": {"name": "c"},
            "spec": {"resources": {"requests": {"storage": "2Gi"}}, "accessModes": ["ReadWriteOnce"]},
            "status": {"phase": "Bound", "capacity": {"storage": "1Gi"}},
        }
    )
    assert (claim.requested_bytes, claim.capacity_bytes, claim.access_modes) == (2**31, 2**30, ("ReadWriteOnce",))


@pytest.mark.parametrize(
    ("status", "is_ready"),
    [
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, True),
        ({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 1, "availableReplicas": 1}, False),
        ({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1}, False),
        ({}, False),
    ],
)
def test_an_endpoint_is_ready_when_all_its_pods_are_new_and_answer(status, is_ready):
    labels = {"finetune.dev/version": "abc-1"}
    item = {"metadata": {"name": "e", "generation": 2, "labels": labels}, "spec": {"replicas": 1}, "status": status}
    service = {"metadata": {"name": "e"}, "spec": {"selector": labels}}
    assert view_endpoint(service, [view_version(item)]).is_ready is is_ready
    assert view_endpoint(service, []).is_ready is False


@pytest.mark.parametrize(("available", "is_ready"), [(1, False), (2, True), (4, True)])
def test_an_autoscaled_version_is_ready_with_its_least_number_of_pods(available, is_ready):
    meta = {"name": "e", "annotations": {"finetune.dev/least-replicas": "2"}}
    status = {"replicas": available, "updatedReplicas": available, "availableReplicas": available}
    assert view_version({"metadata": meta, "spec": {"replicas": 4}, "status": status}).is_ready is is_ready


def test_an_endpoint_tells_which_version_is_live_and_what_was_measured():
    service = {
        "metadata": {
            "name": "e",
            "labels": {"finetune.dev/endpoint": "e", "finetune.dev/job": "support-7b"},
            "annotations": {
                "finetune.dev/model-digest": "abc",
                "finetune.dev/job-uid": "uid",
                "finetune.dev/previous-version": "old-1",
                "finetune.dev/switched-at": "2026-01-01T12:00:00Z",
                "finetune.dev/smoke-prompt": '{"tokens_per_second": 12.5}',
            },
        },
        "spec": {"selector": {"finetune.dev/endpoint": "e", "finetune.dev/version": "abc-1"}},
    }
    endpoint = view_endpoint(service, [])
    assert (endpoint.is_ours, endpoint.holder, endpoint.holder_uid) == (True, "support-7b", "uid")
    assert (endpoint.version, endpoint.previous, endpoint.digest) == ("abc-1", "old-1", "abc")
    assert endpoint.figures == {"tokens_per_second": 12.5}


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"tokens_per_second": null}'])
def test_figures_that_cannot_be_read_are_none(text):
    annotations = {"finetune.dev/smoke-prompt": text}
    assert view_endpoint({"metadata": {"name": "e", "annotations": annotations}}, []).figures == {}


def test_an_endpoint_of_a_release_without_versions_is_its_first_version():
    service = {"metadata": {"name": "e"}, "spec": {"selector": {"finetune.dev/endpoint": "e"}}}
    status = {"replicas": 1, "updatedReplicas": 1, "availableReplicas": 1}
    first = view_version({"metadata": {"name": "e", "labels": {}}, "spec": {"replicas": 1}, "status": status})
    assert (first.label, view_endpoint(service, [first]).is_ready) == ("first", True)


def test_a_version_tells_where_its_model_lies():
    pod = {
        "containers": [{"image": "i", "volumeMounts": [{"name": "workspace", "mountPath": "/w", "subPath": "a"}]}],
        "volumes": [{"name": "tmp"}, {"name": "workspace", "persistentVolumeClaim": {"claimName": "claim"}}],
    }
    version = view_version({"metadata": {"name": "e"}, "spec": {"template": {"spec": pod}}})
    assert (version.workspace, version.image) == (("claim", "a"), "i")
