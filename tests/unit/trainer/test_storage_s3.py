"""Objects on the real S3 server: in, out, verified, and through its failures."""

from __future__ import annotations

import dataclasses
import json
import threading

import boto3
import pytest

from finetune_contract.run_config import (
    DatasetConfig,
    JobIdentity,
    ModelDestination,
    PromotionConfig,
    RunConfig,
    Source,
)
from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import Access, open_store, s3_upload
from finetune_trainer.storage.location import parse_location
from finetune_trainer.storage.publish import list_model_files, publish_folder
from finetune_trainer.storage.s3_upload import ChangedFileError, S3Folder, S3Target
from finetune_trainer.storage.transfer import download_files, list_with_retries
from tests.support.model_bytes import build_model
from tests.support.s3_server import running_s3

ACCESS = Access("spec.dataset", "dataset")
DESTINATION = Access("spec.promotion.destinations[0]", "destination", "FINETUNE_DESTINATION_0_", "destination")
BIG = bytes(range(256)) * 40_000


def make_client(server):
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name=server.variables["AWS_REGION"],
        aws_access_key_id=server.variables["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server.variables["AWS_SECRET_ACCESS_KEY"],
    )


def put(server, bucket, key, content):
    make_client(server).put_object(Bucket=bucket, Key=key, Body=content)


def fetch(url, folder, revision="", access=ACCESS):
    store = open_store(url, revision, access, folder)
    listing = list_with_retries(store, access, url)
    download_files(store, listing.files, folder / "in", access)
    return listing


@pytest.fixture
def promoted(tmp_path):
    """A promoted model of several files, one of them in several parts."""
    folder = tmp_path / "promoted" / "0123456789abcdef"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(BIG)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "sub" / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def destination(s3_session, monkeypatch):
    """Credentials under the prefix of the first destination."""
    for name, value in s3_session.variables.items():
        monkeypatch.setenv(f"FINETUNE_DESTINATION_0_{name}", value)
    return s3_session


def publish(folder, url, advance=lambda _: None):
    files = list_model_files(folder)
    return publish_folder(url, folder.name, files, DESTINATION, workspace_root=folder.parent, advance=advance)


def list_keys(server, bucket):
    return [entry["Key"] for entry in make_client(server).list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_an_object_and_a_prefix_are_fetched(s3, bucket, tmp_path):
    put(s3, bucket, "data/rows.jsonl", BIG)
    put(s3, bucket, "data/more/extra.jsonl", b"{}")
    one = fetch(f"s3://{bucket}/data/rows.jsonl", tmp_path)
    assert (tmp_path / "in" / "rows.jsonl").read_bytes() == BIG
    assert one.revision.startswith(("etag:", "version:"))
    every = fetch(f"s3://{bucket}/data", tmp_path)
    assert [file.name for file in every.files] == ["more/extra.jsonl", "rows.jsonl"]
    assert (tmp_path / "in" / "more" / "extra.jsonl").read_bytes() == b"{}"


def test_a_partial_download_is_carried_on(s3, bucket, tmp_path, monkeypatch):
    put(s3, bucket, "rows.jsonl", BIG)
    store = open_store(f"s3://{bucket}/rows.jsonl", "", ACCESS, tmp_path)
    files = store.list_files().files
    starts = []
    whole = type(store).stream

    def broken(self, file, start=0, length=None):
        starts.append(start)
        for number, chunk in enumerate(whole(self, file, start, length)):
            if len(starts) == 1 and number == 2:
                raise s3_upload.TemporaryError("the cable was pulled")
            yield chunk

    monkeypatch.setattr(type(store), "stream", broken)
    download_files(store, files, tmp_path / "in", ACCESS)
    assert (tmp_path / "in" / "rows.jsonl").read_bytes() == BIG
    assert starts[0] == 0
    assert starts[1] == 2 * 1024 * 1024


def test_an_object_that_changed_since_the_plan_is_refused(s3, bucket, tmp_path):
    put(s3, bucket, "rows.jsonl", b"old")
    revision = fetch(f"s3://{bucket}/rows.jsonl", tmp_path).revision
    put(s3, bucket, "rows.jsonl", b"new")
    with pytest.raises(TrainerError, match=r"revision (etag|version):") as caught:
        fetch(f"s3://{bucket}/rows.jsonl", tmp_path, revision)
    assert "spec.dataset.revision" in caught.value.hint


@pytest.mark.parametrize(
    ("variables", "code", "reason", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 77, "CredentialsRefused", "HTTP 403"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, 77, "CredentialsRefused", "refused"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 77, "CredentialsRefused", "there are no credentials"),
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, 69, "SourceUnavailable", "did not answer"),
        ({"AWS_ENDPOINT_URL_S3": "not a url"}, 78, "InvalidConfig", "Invalid endpoint"),
    ],
)
def test_wrong_credentials_and_endpoints_name_the_secret(
    s3, bucket, tmp_path, monkeypatch, *, variables, code, reason, said
):
    put(s3, bucket, "rows.jsonl", b"{}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainerError, match=said) as caught:
        fetch(f"s3://{bucket}/rows.jsonl", tmp_path)
    assert (caught.value.exit_code, caught.value.reason) == (code, reason)
    assert "ecret" in caught.value.hint


@pytest.mark.parametrize("url", ["s3://{bucket}/none.jsonl", "s3://no-such-bucket-here/rows.jsonl"])
def test_a_missing_object_or_bucket_is_missing(s3, bucket, tmp_path, url):
    with pytest.raises(TrainerError) as caught:
        fetch(url.format(bucket=bucket), tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("DatasetNotFound", 66)


def test_two_sources_use_two_accounts(s3_session, bucket, tmp_path, monkeypatch):
    put(s3_session, bucket, "rows.jsonl", b"{}")
    for name, value in s3_session.variables.items():
        monkeypatch.setenv(f"FINETUNE_DATASET_0_{name}", value)
        monkeypatch.setenv(f"FINETUNE_DATASET_1_{name}", "wrong" if "KEY" in name else value)
    url = f"s3://{bucket}/rows.jsonl"
    assert fetch(url, tmp_path, access=Access("spec.dataset.sources[0]", "dataset", "FINETUNE_DATASET_0_"))
    with pytest.raises(TrainerError) as caught:
        fetch(url, tmp_path, access=Access("spec.dataset.sources[1]", "dataset", "FINETUNE_DATASET_1_"))
    assert "spec.dataset.sources[1].secretRef" in caught.value.hint


def test_a_model_is_published_in_parts_verified_and_marked_complete(
    destination, bucket, promoted, monkeypatch, tmp_path
):
    monkeypatch.setattr(s3_upload.S3Target.__init__, "__defaults__", (5 * 1024 * 1024,))
    done = []
    url = publish(promoted, f"s3://{bucket}/models/story", done.append)
    assert url == f"s3://{bucket}/models/story/{promoted.name}"
    assert sum(done) == len(BIG) + 2
    prefix = f"models/story/{promoted.name}/"
    assert sorted(list_keys(destination, bucket)) == [
        prefix + name for name in ("COMPLETE", "config.json", "model.safetensors", "sub/empty.txt")
    ]
    client = make_client(destination)
    assert client.get_object(Bucket=bucket, Key=f"{prefix}model.safetensors")["Body"].read() == BIG
    etag = client.head_object(Bucket=bucket, Key=f"{prefix}model.safetensors")["ETag"]
    assert etag.strip('"').endswith("-2")
    mark = json.loads(client.get_object(Bucket=bucket, Key=f"{prefix}COMPLETE")["Body"].read())
    assert mark["digest"] == promoted.name
    assert {entry["name"]: entry["size"] for entry in mark["files"]}["model.safetensors"] == len(BIG)


def test_publishing_again_sends_nothing(destination, bucket, promoted, monkeypatch):
    publish(promoted, f"s3://{bucket}/m")
    monkeypatch.setattr(S3Target, "write_file", lambda *_: pytest.fail("sent again"))
    monkeypatch.setattr(S3Target, "write_complete", lambda *_: pytest.fail("marked again"))
    assert publish(promoted, f"s3://{bucket}/m").endswith(promoted.name)


def test_an_interrupted_publication_sends_only_the_rest(destination, bucket, promoted, monkeypatch):
    sent = []
    write = S3Target.write_file

    def note(self, file):
        sent.append(file.name)
        if len(sent) == 2:
            raise KeyboardInterrupt
        write(self, file)

    monkeypatch.setattr(S3Target, "write_file", note)
    with pytest.raises(KeyboardInterrupt):
        publish(promoted, f"s3://{bucket}/m")
    assert "m/0123456789abcdef/COMPLETE" not in list_keys(destination, bucket)
    publish(promoted, f"s3://{bucket}/m")
    assert sent == ["config.json", "model.safetensors", "model.safetensors", "sub/empty.txt"]


@pytest.mark.parametrize("name", ["config.json", "COMPLETE"])
def test_other_content_under_the_same_digest_is_never_overwritten(destination, bucket, promoted, name):
    key = f"m/{promoted.name}/{name}"
    put(destination, bucket, key, b"somebody's own")
    with pytest.raises(TrainerError, match="holds other content") as caught:
        publish(promoted, f"s3://{bucket}/m")
    assert (caught.value.reason, caught.value.exit_code) == ("InvalidConfig", 78)
    assert "spec.promotion.destinations[0].destination" in caught.value.hint
    assert make_client(destination).get_object(Bucket=bucket, Key=key)["Body"].read() == b"somebody's own"


def test_an_etag_of_another_kind_is_checked_by_reading_back(destination, bucket, promoted, monkeypatch):
    read = []
    back = S3Target._read_back
    monkeypatch.setattr(S3Target, "_put", _put_and_lie)
    monkeypatch.setattr(S3Target, "_read_back", lambda self, key: read.append(key) or back(self, key))
    publish(promoted, f"s3://{bucket}/m")
    assert len(read) == 3


def _put_and_lie(target, key, file):
    content = file.path.read_bytes()
    target._client.put_object(Bucket=target._bucket, Key=key, Body=content, Metadata={"sha256": file.sha256})
    return "an ETag of another kind"


def test_a_copy_that_arrived_damaged_is_removed_and_reported(destination, bucket, promoted, monkeypatch):
    def damage(self, key, file):
        self._client.put_object(Bucket=self._bucket, Key=key, Body=b"damaged", Metadata={"sha256": file.sha256})
        return "x"

    monkeypatch.setattr(S3Target, "_put", damage)
    with pytest.raises(TrainerError, match=r"config\.json arrived with SHA-256") as caught:
        publish(promoted, f"s3://{bucket}/m")
    assert (caught.value.reason, caught.value.exit_code) == ("DestinationUnavailable", 69)
    assert list_keys(destination, bucket) == []


def test_no_parts_are_left_behind_when_an_upload_fails(destination, bucket, promoted, monkeypatch):
    location = parse_location(f"s3://{bucket}/m", DESTINATION)
    target = S3Target(location, promoted.name, DESTINATION, part_bytes=5 * 1024 * 1024)
    monkeypatch.setattr(S3Target, "_put_part", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    file = next(file for file in list_model_files(promoted) if file.name == "model.safetensors")
    with pytest.raises(s3_upload.TemporaryError):
        target.write_file(file)
    assert make_client(destination).list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


@pytest.mark.parametrize("part_bytes", [1 << 20, 1 << 30])
def test_a_file_that_is_not_what_its_digest_says_never_comes_into_being(destination, bucket, promoted, part_bytes):
    location = parse_location(f"s3://{bucket}/models", DESTINATION)
    folder = S3Folder(location, "run", DESTINATION, part_bytes)
    file = next(file for file in list_model_files(promoted) if file.size == len(BIG))
    file.path.write_bytes(BIG[:-1] + b"x")
    with pytest.raises(ChangedFileError, match="its content is not what was saved"):
        folder.upload(file)
    assert list_keys(destination, bucket) == []
    assert make_client(destination).list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def test_the_parts_of_an_upload_that_was_killed_are_removed(destination, bucket, promoted):
    client = make_client(destination)
    for key in ("models/run/shard.pt", "models/other/shard.pt"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * (5 << 20))
    S3Folder(parse_location(f"s3://{bucket}/models", DESTINATION), "run", DESTINATION).abort_uploads()
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [each["Key"] for each in left] == ["models/other/shard.pt"]


def test_a_server_that_is_down_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_trainer.storage.retry.DEFAULT.patience_seconds", 30.0)
    with running_s3(tmp_path / "buckets") as server:
        (server.folder / "bucket").mkdir()
        put(server, "bucket", "rows.jsonl", BIG)
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        server.stop()
        comes_back = threading.Timer(0.7, server.start)
        comes_back.start()
        fetch("s3://bucket/rows.jsonl", tmp_path)
        comes_back.join()
    assert (tmp_path / "in" / "rows.jsonl").read_bytes() == BIG


def test_a_destination_that_is_down_is_unavailable(destination, promoted, monkeypatch):
    monkeypatch.setenv("FINETUNE_DESTINATION_0_AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(TrainerError) as caught:
        publish(promoted, "s3://bucket/m")
    assert (caught.value.reason, caught.value.exit_code) == ("DestinationUnavailable", 69)


def test_a_job_runs_from_s3_to_s3(run_command, s3, bucket, *, destination, instructions, tmp_path):
    for name, content in build_model().items():
        put(s3, bucket, f"model/{name}", content)
    put(s3, bucket, "rows.json", (instructions / "alpaca.json").read_bytes())
    settings = RunConfig(
        Source(f"s3://{bucket}/model/"),
        DatasetConfig((Source(f"s3://{bucket}/rows.json"),)),
        job=JobIdentity("team", "story", "uid"),
        workspace=str(tmp_path / "workspace"),
    )
    seen = run_command("inspect", settings=settings).details
    assert seen["model_parameters"] == 4160
    prepared = run_command("prepare", settings=settings)
    assert prepared.details["rows_kept"] == 10
    assert prepared.details["model_revision"] == seen["model_revision"]
    output = tmp_path / "workspace" / "output" / "feed"
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    promotion = PromotionConfig(
        destinations=(
            ModelDestination(f"s3://{bucket}/out", "FINETUNE_DESTINATION_0_"),
            ModelDestination("pvc://exports"),
        ),
        digest="feed",
    )
    published = run_command("publish", settings=dataclasses.replace(settings, promotion=promotion))
    assert published.details["destinations"] == [f"s3://{bucket}/out/feed", "pvc://exports/feed"]
    assert "out/feed/COMPLETE" in list_keys(s3, bucket)
    assert (tmp_path / "workspace" / "exports" / "feed" / "COMPLETE").is_file()
