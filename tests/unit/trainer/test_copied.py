"""A promoted model's copy in S3 as servers read it: by the trainer, and by the program that starts vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import boto3
import pytest

from finetune_contract import vllm_server
from finetune_contract.environment import CREDENTIAL_KEYS
from finetune_contract.reports import ExitReport
from finetune_contract.run_config import DatasetConfig, PromotionConfig, RunConfig, ServingConfig, Source
from finetune_trainer.errors import TrainerError
from finetune_trainer.promotion import promoted
from finetune_trainer.promotion.copied import fetch_copy
from finetune_trainer.storage.access import Access
from finetune_trainer.storage.publish import COMPLETE, list_model_files, publish_folder

FIELD, PREFIX = "spec.promotion.destinations[1]", "FINETUNE_DESTINATION_1_"
DESTINATION = Access(FIELD, "destination", PREFIX, "destination")


class Copy:
    """A published model, and what two kinds of servers say of its copy."""

    def __init__(self, server, bucket, folder):
        self.server, self.bucket, self.folder = server, bucket, folder
        self.source = f"s3://{bucket}/models"
        self.variables = {f"{PREFIX}{name}": value for name, value in server.variables.items()}
        publish_folder(self.source, folder.name, list_model_files(folder), DESTINATION, workspace_root=folder.parent)

    @property
    def client(self):
        plain = self.server.variables
        return boto3.client(
            "s3", endpoint_url=self.server.url, region_name=plain["AWS_REGION"],
            aws_access_key_id=plain["AWS_ACCESS_KEY_ID"], aws_secret_access_key=plain["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip

    def key(self, name):
        return f"models/{self.folder.name}/{name}"

    def replace(self, name, content, metadata=None):
        body = {"Bucket": self.bucket, "Key": self.key(name), "Body": content}
        self.client.put_object(**body, Metadata=metadata or {})

    def delete(self, name):
        self.client.delete_object(Bucket=self.bucket, Key=self.key(name))

    def fetch(self, downloads, digest=""):
        serving = ServingConfig("support", source=self.source, source_field=FIELD, secret_prefix=PREFIX)
        promotion = PromotionConfig(digest=digest or self.folder.name)
        return fetch_copy(RunConfig(Source("base"), DatasetConfig(()), promotion=promotion, serving=serving), downloads)

    def start_vllm(self, log, digest="", **variables):
        """Start the program that pods with vLLM run; in vLLM's place is one that tells what it is given."""
        tell = "import json, os; print(json.dumps(dict(os.environ)))"
        command = (
            *(sys.executable, vllm_server.__file__, f"--promoted={self.source}/{digest or self.folder.name}"),
            *(f"--field={FIELD}", f"--secret-prefix={PREFIX}", "--", sys.executable, "-c", tell),
        )
        environment = {"PATH": os.environ["PATH"], "FINETUNE_TERMINATION_LOG": str(log), **self.variables, **variables}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        report = ExitReport.from_termination_message(log.read_text()) if log.exists() else None
        assert bool(report) == bool(finished.returncode), finished.stderr
        return report, finished.stdout


@pytest.fixture
def copy(s3_session, bucket, tmp_path, monkeypatch):
    """The copy of a promoted model of several files."""
    for name, value in s3_session.variables.items():
        monkeypatch.setenv(f"{PREFIX}{name}", value)
    made = tmp_path / "made"
    (made / "adapter").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    (made / "config.json").write_text("{}")
    (made / "adapter" / "adapter_config.json").write_text("{}")
    digest = promoted.write_manifest(made)
    (made / "README.md").write_text("a card, which is no part of the model")
    return Copy(s3_session, bucket, made.rename(tmp_path / digest))


def test_the_model_comes_whole_and_is_taken_up_where_an_earlier_try_ended(copy, tmp_path):
    downloads = tmp_path / "downloads"
    (downloads / copy.folder.name).mkdir(parents=True)
    (downloads / copy.folder.name / "config.json").write_text("{}")
    folder = copy.fetch(downloads)
    manifest = promoted.read_manifest(folder)
    assert manifest["digest"] == folder.name == copy.folder.name
    for name in manifest["files"]:
        assert (folder / name).read_bytes() == (copy.folder / name).read_bytes()
    assert copy.fetch(downloads) == folder


def test_vllm_is_started_with_what_opens_the_bucket(copy, tmp_path):
    _, output = copy.start_vllm(tmp_path / "log", PREFIX_OF_ANOTHER="kept")
    given, plain = json.loads(output), copy.server.variables
    assert {name: given[name] for name in plain} == plain
    assert given["AWS_ENDPOINT_URL"] == copy.server.url
    assert given["AWS_DEFAULT_REGION"] == plain["AWS_REGION"]


def test_an_endpoint_that_is_no_url_is_told_with_what_to_check(copy, tmp_path):
    report, _ = copy.start_vllm(tmp_path / "log", **{f"{PREFIX}AWS_ENDPOINT_URL_S3": "minio:9000"})
    assert report.reason == "SourceUnavailable"
    assert "minio:9000" in report.message
    assert f"AWS_ENDPOINT_URL_S3 and AWS_REGION in {FIELD}.secretRef" in report.hint


def test_what_a_secret_may_hold_for_s3_reaches_vllm():
    """The program is mounted into images without our packages, so it has names of its own."""
    assert set(vllm_server.S3_VARIABLES) == {key for key in CREDENTIAL_KEYS if key.startswith("AWS_")}
    assert (vllm_server.MANIFEST, vllm_server.COMPLETE) == (promoted.MANIFEST, COMPLETE)


def test_a_ca_in_a_secret_becomes_a_file():
    text = "-----BEGIN CERTIFICATE-----\n"
    found = vllm_server.choose_variables({"X_AWS_CA_BUNDLE": text, "AWS_REGION": "eu-west-1"}, "X_")
    with open(found["AWS_CA_BUNDLE"]) as file:
        assert file.read() == text
    os.unlink(found["AWS_CA_BUNDLE"])
    assert found["AWS_DEFAULT_REGION"] == "eu-west-1"
    assert "AWS_ENDPOINT_URL" not in found, "AWS's own addresses follow from the region"


OTHER = json.dumps({"digest": "0" * 64, "files": {}}).encode()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda copy: copy.delete("model.safetensors"), "model.safetensors is missing"),
        (lambda copy: copy.delete("finetune-model.json"), "finetune-model.json is missing"),
        (lambda copy: copy.replace("config.json", b"[]"), "config.json"),
        (lambda copy: copy.replace("finetune-model.json", OTHER), "finetune-model.json"),
        (lambda copy: copy.replace("finetune-model.json", b"{"), "finetune-model.json"),
    ],
    ids=["no weights", "no manifest", "other content", "another model", "half a manifest"],
)
def test_a_copy_that_is_not_the_promoted_model_is_not_served(copy, tmp_path, harm, said):
    harm(copy)
    with pytest.raises(TrainerError, match=said) as raised:
        copy.fetch(tmp_path / "downloads")
    report, _ = copy.start_vllm(tmp_path / "log")
    for told in (raised.value, report):
        assert told.reason == "PromotionInvalid"
        assert said in str(told.message)
        assert "inference.loadFrom: Workspace" in told.hint


def test_a_copy_that_is_still_being_made_is_not_served(copy, tmp_path):
    copy.delete("COMPLETE")
    with pytest.raises(TrainerError, match="COMPLETE is missing"):
        copy.fetch(tmp_path / "downloads")
    report, _ = copy.start_vllm(tmp_path / "log")
    assert "COMPLETE is missing" in report.message


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "CredentialsRefused"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "SourceUnavailable"),
    ],
)
def test_what_keeps_the_bucket_shut_is_told_with_the_field(copy, tmp_path, monkeypatch, changed, reason):
    ((name, value),) = changed.items()
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(TrainerError) as raised:
        copy.fetch(tmp_path / "downloads")
    report, _ = copy.start_vllm(tmp_path / "log", **{PREFIX + name: value})
    for told in (raised.value, report):
        assert told.reason == reason
        assert f"{FIELD}.destination" in told.message
        assert f"{FIELD}.secretRef" in told.hint


def test_a_version_that_was_never_copied_is_told_as_such(copy, tmp_path):
    with pytest.raises(TrainerError) as raised:
        copy.fetch(tmp_path / "downloads", digest="f" * 64)
    report, _ = copy.start_vllm(tmp_path / "log", digest="f" * 64)
    for told in (raised.value, report):
        assert "f" * 64 in str(told.message)
