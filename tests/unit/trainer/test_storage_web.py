"""Files behind https:// URLs."""

from __future__ import annotations

import hashlib

import pytest

from finetune_trainer.errors import TrainerError
from finetune_trainer.storage import Access, open_store
from finetune_trainer.storage.transfer import download_files, list_with_retries
from tests.support.web_server import QuietHandler, running

CONTENT = b'{"instruction": "a", "output": "b"}\n' * 50_000
ACCESS = Access("spec.dataset", "dataset")


class FileServer:
    """Serves one file, and counts and misbehaves as told."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.cut_after: int | None = None
        self.statuses: list[int] = []
        self.refuses_head = False
        self.bytes_sent = 0
        server = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:  # noqa: N802
                self._serve()

            def do_HEAD(self) -> None:  # noqa: N802
                if server.refuses_head:
                    self.answer(405)
                else:
                    self._serve()

            def _serve(self) -> None:
                if self.path == "/missing":
                    self.answer(404)
                elif server.statuses:
                    self.answer(server.statuses.pop(0))
                else:
                    cut = server.cut_after if self.command == "GET" else None
                    server.cut_after = None if cut is not None else server.cut_after
                    etag = hashlib.sha256(server.content).hexdigest()
                    self.answer_file(server.content, etag, cut)

            def count_sent(self, num_bytes: int) -> None:
                server.bytes_sent += num_bytes

        self.handler = Handler


def fetch(url, folder, revision=""):
    store = open_store(url, revision, ACCESS, folder)
    listing = list_with_retries(store, ACCESS, url)
    download_files(store, listing.files, folder / "out", ACCESS)
    return listing


def test_a_file_is_fetched_over_tls_with_the_pods_ca(tmp_path, monkeypatch):
    server = FileServer()
    with running(server.handler, tmp_path) as url:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
        listing = fetch(f"{url}/data/rows.jsonl?signature=x", tmp_path)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == CONTENT
    assert listing.revision.startswith("etag:")


def test_an_unknown_ca_is_said_at_once(tmp_path):
    server = FileServer()
    with (
        running(server.handler, tmp_path) as url,
        pytest.raises(TrainerError, match="certificate is not trusted") as caught,
    ):
        fetch(f"{url}/rows.jsonl", tmp_path)
    assert caught.value.exit_code == 78
    assert "caBundle" in caught.value.hint


def test_a_broken_connection_is_carried_on(tmp_path):
    server = FileServer()
    server.cut_after = 1_100_000
    with running(server.handler) as url:
        fetch(f"{url}/rows.jsonl", tmp_path)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == CONTENT
    assert server.bytes_sent == len(CONTENT)


def test_a_server_without_head_will_do(tmp_path):
    server = FileServer()
    server.refuses_head = True
    with running(server.handler) as url:
        fetch(f"{url}/rows.jsonl", tmp_path)
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("statuses", "reason", "code"),
    [([403, 403], "CredentialsRefused", 77), ([401], "CredentialsRefused", 77), ([503] * 500, "SourceUnavailable", 69)],
)
def test_what_a_status_means(tmp_path, statuses, reason, code):
    server = FileServer()
    server.statuses = statuses
    with running(server.handler) as url, pytest.raises(TrainerError) as caught:
        fetch(f"{url}/rows.jsonl", tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == (reason, code)


def test_a_missing_file_is_missing(tmp_path):
    with running(FileServer().handler) as url, pytest.raises(TrainerError) as caught:
        fetch(f"{url}/missing", tmp_path)
    assert (caught.value.reason, caught.value.exit_code) == ("DatasetNotFound", 66)


def test_content_that_changed_since_the_plan_is_refused(tmp_path):
    server = FileServer()
    with running(server.handler) as url:
        revision = fetch(f"{url}/rows.jsonl", tmp_path).revision
        server.content = b"{}"
        with pytest.raises(TrainerError, match="revision etag:") as caught:
            fetch(f"{url}/rows.jsonl", tmp_path, revision)
    assert "spec.dataset.revision" in caught.value.hint
