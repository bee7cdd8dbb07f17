"""Progress posts: who may send them, what they become, and how long training still takes."""

from __future__ import annotations

import asyncio
import ssl

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import Metric, ProgressReport
from finetune_operator.certificates import Certificates, from_secret, is_usable, make_certificates, to_secret
from finetune_operator.progress import ProgressStore, estimate_seconds
from finetune_operator.progress_server import DeniedError, Verifier, build_tls
from tests.support.operator_parts import NOW, seconds

KEY = ("team-a", "support-7b")


def report(step, total=100, **metrics):
    return ProgressReport(int(step), None, {Metric.STEP: float(step), Metric.TOTAL_STEPS: float(total), **metrics}, "")


def test_the_time_to_go_comes_from_steps_made_since_the_first_post():
    store = ProgressStore(NOW)
    for number, step in enumerate((9000, 9010, 9020)):
        store.put(KEY, 2, report(step, 10000), NOW + seconds(10 * number))
    # The trainer resumed at 9000; counting from 0 would say that 20 s made 9020 steps and 2 s are left.
    assert store.read(KEY).eta_seconds == 980


def test_one_post_tells_no_time():
    store = ProgressStore(NOW)
    store.put(KEY, 1, report(5), NOW)
    assert store.read(KEY).eta_seconds is None


def test_a_new_attempt_starts_afresh_and_an_older_one_is_not_heard():
    store = ProgressStore(NOW)
    store.put(KEY, 1, report(50), NOW)
    assert store.put(KEY, 2, report(40), NOW + seconds(60))
    assert not store.put(KEY, 1, report(51), NOW + seconds(61))
    assert (store.read(KEY).attempt, store.read(KEY).report.metrics[Metric.STEP]) == (2, 40.0)


def test_ranks_that_fell_back_inside_their_pod_do_not_give_a_negative_time():
    store = ProgressStore(NOW)
    for number, step in enumerate((10, 20, 12, 14)):
        store.put(KEY, 1, report(step), NOW + seconds(number))
    assert store.read(KEY).eta_seconds == 43


def test_a_post_with_fewer_figures_keeps_the_others():
    store = ProgressStore(NOW)
    store.put(KEY, 1, report(10, **{Metric.LATEST_CHECKPOINT: 10.0}), NOW)
    store.put(KEY, 1, ProgressReport(11, None, {Metric.STEP: 11.0}, ""), NOW + seconds(1))
    progress = store.read(KEY)
    assert progress.report.metrics[Metric.LATEST_CHECKPOINT] == 10
    assert progress.moved_at == NOW + seconds(1)


def test_posts_without_a_step_do_not_count_as_movement():
    store = ProgressStore(NOW)
    for number in range(3):
        store.put(KEY, 1, report(10), NOW + seconds(number))
    assert store.read(KEY).moved_at == NOW


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=30), st.one_of(st.none(), st.floats(0, 1e7)))
def test_an_estimate_is_never_negative(points, total):
    estimate = estimate_seconds(tuple((NOW + seconds(time), step) for time, step in points), total)
    assert estimate is None or estimate >= 0


def make_verifier(clock=lambda: 0.0, **status):
    """Return a verifier whose API server knows one token of one pod, and the list of its questions."""
    asked = []
    user = {
        "username": "system:serviceaccount:team-a:default",
        "extra": {
            "authentication.kubernetes.io/pod-name": ["pod-1"],
            "authentication.kubernetes.io/pod-uid": ["uid-1"],
        },
    }

    async def review_token(token, audience):
        asked.append(token)
        return {"authenticated": token == "good", "audiences": [audience], "user": user, **status}

    async def read_pod(namespace, name):
        labels = {"finetune.dev/job": "support-7b", "finetune.dev/component": "train", "finetune.dev/attempt": "2"}
        return {"metadata": {"uid": "uid-1", "labels": labels}} if (namespace, name) == ("team-a", "pod-1") else None

    return Verifier(review_token, read_pod, clock), asked


def test_a_pods_token_tells_its_job_and_attempt():
    verifier, _ = make_verifier()
    poster = asyncio.run(verifier.verify("Bearer good", "team-a"))
    assert (poster.job, poster.component, poster.attempt) == ("support-7b", "train", 2)


def test_a_token_is_asked_for_once_in_five_minutes():
    now = [0.0]
    verifier, asked = make_verifier(lambda: now[0])
    for time in (0, 100, 299, 301):
        now[0] = time
        asyncio.run(verifier.verify("Bearer good", "team-a"))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("header", "namespace", "status", "code"),
    [
        ("", "team-a", {}, 401),
        ("Basic good", "team-a", {}, 401),
        ("Bearer bad", "team-a", {}, 401),
        ("Bearer good", "team-a", {"audiences": ["another"]}, 401),
        ("Bearer good", "team-b", {}, 403),
        ("Bearer good", "team-a", {"user": {"username": "system:serviceaccount:team-a:default"}}, 403),
        ("Bearer good", "team-a", {"user": {"username": "kubernetes-admin"}}, 403),
    ],
)
def test_other_tokens_are_refused(header, namespace, status, code):
    verifier, _ = make_verifier(**status)
    with pytest.raises(DeniedError) as caught:
        asyncio.run(verifier.verify(header, namespace))
    assert caught.value.code == code


def test_a_token_that_was_good_in_one_namespace_is_not_good_in_another():
    verifier, _ = make_verifier()
    asyncio.run(verifier.verify("Bearer good", "team-a"))
    with pytest.raises(DeniedError):
        asyncio.run(verifier.verify("Bearer good", "team-b"))


@pytest.mark.parametrize("url", ["https://progress.finetune-system.svc:8443", "https://10.0.0.7:8443"])
def test_certificates_are_for_their_host_and_signed_by_their_ca(url):
    made = make_certificates(url, NOW)
    assert is_usable(made, url, NOW)
    assert not is_usable(made, "https://elsewhere:8443", NOW)
    assert not is_usable(made, url, NOW + seconds(3650 * 86400))
    ca = x509.load_pem_x509_certificate(made.ca.encode())
    x509.load_pem_x509_certificate(made.certificate.encode()).verify_directly_issued_by(ca)
    assert build_tls(made).verify_mode == ssl.CERT_NONE


def test_certificates_survive_their_secret_and_an_empty_one_is_not_usable():
    made = make_certificates("https://progress:8443", NOW)
    assert from_secret(to_secret(made, "tls", "system")) == made
    assert not is_usable(from_secret({}), "https://progress:8443", NOW)
    assert not is_usable(Certificates("", "nonsense", ""), "https://progress:8443", NOW)
