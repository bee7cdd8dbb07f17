"""Downloads from a hub survive what networks do, and its refusals are told in the job's words."""

from __future__ import annotations

import pytest

from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import Access, open_store
from finetune_trainer.storage.base import read_bytes
from finetune_trainer.storage.transfer import download_files, list_with_retries

BIG = bytes(range(256)) * 12_000
ACCESS = Access("spec.model", "model", "FINETUNE_MODEL_")


def open_hub(tmp_path, source="hf://acme/m", revision="", access=ACCESS):
    return open_store(source, revision, access, tmp_path)


def fetch(tmp_path, source="hf://acme/m", access=ACCESS):
    store = open_hub(tmp_path, source, access=access)
    listing = list_with_retries(store, access, source)
    return listing, download_files(store, listing.files, tmp_path / "out", access)


def test_files_arrive_with_their_digests_at_the_pinned_commit(hub, tmp_path):
    commit = hub.add("models", "acme/m", {"a.safetensors": BIG, "sub/b.json": b"{}"})
    listing, digests = fetch(tmp_path)
    assert listing.revision == commit
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == BIG
    assert (tmp_path / "out" / "sub" / "b.json").read_bytes() == b"{}"
    assert len(digests["a.safetensors"]) == 64


def test_a_broken_connection_is_carried_on_where_it_broke(hub, tmp_path):
    hub.add("models", "acme/m", {"a.safetensors": BIG})
    hub.cuts["a.safetensors"] = 1_500_000
    fetch(tmp_path)
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == BIG
    assert hub.bytes_sent == len(BIG)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_fault_of_the_server_is_waited_out(hub, tmp_path, status):
    hub.add("models", "acme/m", {"a.json": b"{}"})
    hub.failures += [status]
    fetch(tmp_path)
    hub.failures += [status, status]
    (tmp_path / "out" / "a.json").unlink()
    fetch(tmp_path)
    assert (tmp_path / "out" / "a.json").read_bytes() == b"{}"


def test_a_damaged_file_is_never_given_its_name(hub, tmp_path):
    commit = hub.add("models", "acme/m", {"a.safetensors": BIG})
    store = open_hub(tmp_path)
    files = store.list_files().files
    hub.repositories["models/acme/m"].commits = [(commit, {"a.safetensors": BIG[:-1] + b"!"})]
    with pytest.raises(TrainerError, match=r"a\.safetensors arrived with SHA-256") as caught:
        download_files(store, files, tmp_path / "out", ACCESS)
    assert caught.value.exit_code == 69
    assert not list((tmp_path / "out").iterdir())


def test_the_token_comes_from_the_sources_own_variables(hub, tmp_path, monkeypatch):
    hub.add("models", "acme/m", {"a.json": b"{}"}, token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(TrainerError) as caught:
        fetch(tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("CredentialsRefused", 77)
    assert "HF_TOKEN in spec.model.secretRef" in caught.value.hint
    monkeypatch.setenv("FINETUNE_MODEL_HF_TOKEN", "hf_right")
    fetch(tmp_path)
    assert (tmp_path / "out" / "a.json").exists()


def test_a_sources_own_endpoint_wins_over_the_pods(hub, tmp_path, monkeypatch):
    hub.add("models", "acme/m", {"a.json": b"{}"})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("FINETUNE_MODEL_HF_ENDPOINT", hub.url)
    assert fetch(tmp_path)[1]


def test_a_hub_that_is_down_is_unavailable_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrainerError) as caught:
        fetch(tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("SourceUnavailable", 69)
    assert "hf://acme/m did not answer" in caught.value.message


def test_one_file_of_a_repository_can_be_named(hub, tmp_path):
    hub.add("datasets", "acme/d", {"a/x.json": b"[1]", "a/y.json": b"[2]"})
    access = Access("spec.dataset", "dataset")
    listing, _ = fetch(tmp_path, "hf://datasets/acme/d/a/y.json", access)
    assert [file.name for file in listing.files] == ["y.json"]
    assert (tmp_path / "out" / "y.json").read_bytes() == b"[2]"
    folder = open_hub(tmp_path, "hf://acme/d/a", access=access).list_files()
    assert [file.name for file in folder.files] == ["x.json", "y.json"]


def test_a_stretch_of_a_file_is_read_without_the_rest(hub, tmp_path):
    hub.add("models", "acme/m", {"a.safetensors": BIG})
    store = open_hub(tmp_path)
    assert read_bytes(store, store.list_files().files[0], 100, 50) == BIG[100:150]
    assert hub.bytes_sent == 50


def test_a_file_that_would_leave_the_folder_is_refused(hub, tmp_path):
    hub.add("models", "acme/m", {"../../evil.json": b"{}"})
    with pytest.raises(TrainerError, match="leaves the folder"):
        fetch(tmp_path)
    assert not (tmp_path.parent / "evil.json").exists()
