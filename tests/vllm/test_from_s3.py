"""Real vLLM that streams the promoted model's copy from a real S3 server, with nothing of it on a volume."""

from __future__ import annotations

import pytest

from finetune_trainer.__main__ import main
from finetune_trainer.serving.generate import Generator
from tests.support.s3_server import running_s3
from tests.support.vllm_pod import STARTING_SECONDS, VllmPod, build_objects
from tests.support.waiting import eventually

BUCKET = "s3://models/support"
QUESTION = {"role": "user", "content": "What does path.joins do?"}


@pytest.fixture(scope="module")
def bucket(promoted, tmp_path_factory):
    """The S3 server, with the model's copy."""
    with running_s3(tmp_path_factory.mktemp("buckets")) as server, pytest.MonkeyPatch.context() as patch:
        (server.folder / "models").mkdir()
        for name, value in server.variables.items():
            patch.setenv(name, value)
        assert main(["publish", "--model", str(promoted), "--destination", BUCKET]) == 0
        yield server


def start(run, server, folder, **changed):
    """Start the pod on a machine without the workspace."""
    return VllmPod(
        build_objects(run, bucket=BUCKET)[1].objects, folder / "none", folder / "container", server.variables | changed
    )


def test_the_model_s_copy_answers_as_the_model_does(run, promoted, bucket, tmp_path):
    pod = start(run, bucket, tmp_path)
    try:
        eventually(pod.is_started, within=STARTING_SECONDS, otherwise=lambda: pod.log[-3000:])
        body = {"model": "support-7b", "messages": [QUESTION], "max_tokens": 100, "temperature": 0}
        (choice,) = pod.ask("/v1/chat/completions", body)["choices"]
        assert choice["message"]["content"] == Generator(promoted, promoted=promoted).answer([QUESTION], 100).text
        assert bucket.variables["AWS_SECRET_ACCESS_KEY"] not in pod.log
    finally:
        pod.end()
    assert not list(tmp_path.rglob("*.safetensors")), "the weights are streamed, not kept"


def test_a_bucket_that_is_shut_is_told_before_vllm_is_started(run, bucket, tmp_path):
    pod = start(run, bucket, tmp_path, AWS_SECRET_ACCESS_KEY="wrong")
    try:
        assert pod.process.wait(60) == 77
    finally:
        pod.end()
    assert pod.report.reason == "CredentialsRefused"
    assert "spec.promotion.destinations[0].secretRef" in pod.report.hint
