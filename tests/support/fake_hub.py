"""A model hub on the loopback that speaks what `huggingface_hub` asks of it, with faults on request."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import Iterator

from tests.support.web_server import QuietHandler, running


@dataclasses.dataclass
class Repository:
    """One repository: its commits, newest last, and its tags."""

    commits: list[tuple[str, dict[str, bytes]]] = dataclasses.field(default_factory=list)
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    token: str = ""
    """Needed to see it; empty: public."""
    is_gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit and return its id."""
        facts = json.dumps([[name, hashlib.sha256(files[name]).hexdigest()] for name in sorted(files)])
        commit = hashlib.sha1(f"{len(self.commits)} {facts}".encode()).hexdigest()
        self.commits.append((commit, dict(files)))
        return commit

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit that a branch, tag or id names."""
        if revision in ("main", ""):
            return self.commits[-1] if self.commits else None
        wanted = self.tags.get(revision, revision)
        return next((entry for entry in self.commits if entry[0] == wanted), None)


@dataclasses.dataclass
class FakeHub:
    """The hub's content, what was asked of it, and the faults it is to show."""

    url: str = ""
    repositories: dict[str, Repository] = dataclasses.field(default_factory=dict)
    """By `models/owner/name` or `datasets/owner/name`."""
    requests: list[str] = dataclasses.field(default_factory=list)
    """Method and path of each request."""
    bytes_sent: int = 0
    """Bytes of files."""
    failures: list[int] = dataclasses.field(default_factory=list)
    """Statuses to answer the next requests with."""
    spoiled: set[str] = dataclasses.field(default_factory=set)
    """Names of files of which the next commit keeps something else."""
    cuts: dict[str, int] = dataclasses.field(default_factory=dict)
    """File name -> bytes after which its next download breaks."""

    def add(self, kind: str, name: str, files: dict[str, bytes], **options: str | bool) -> str:
        """Add a commit to a repository; return its id."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository())
        for option, value in options.items():
            setattr(repository, option, value)
        return repository.commit(files)


@contextlib.contextmanager
def running_hub() -> Iterator[FakeHub]:
    """Serve an empty hub until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with running(handler) as url:
        hub.url = url
        yield hub


class _Handler(QuietHandler):
    hub: FakeHub

    def do_GET(self) -> None:  # noqa: N802
        self._route()

    def do_HEAD(self) -> None:  # noqa: N802
        self._route()

    def do_POST(self) -> None:  # noqa: N802
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._read_chunks()
        self._route()

    def _read_chunks(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failures:
            self.answer(self.hub.failures.pop(0))
            return
        if path == "/api/repos/create":
            self._create()
            return
        if path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
            return
        parts = path.removeprefix("/api/").strip("/").split("/")
        is_api = path.startswith("/api/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        key, rest = "/".join([kind, *parts[:2]]), parts[2:]
        repository = self.hub.repositories.get(key)
        if repository is None:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if not self._is_allowed(repository):
            return
        if not is_api and rest[:1] == ["resolve"]:
            self._send_file(repository, rest[1], "/".join(rest[2:]))
        elif not rest or rest[0] == "revision":
            self._send_info(repository, "/".join(rest[1:]), "/".join(parts[:2]))
        else:
            getattr(self, f"_api_{rest[0]}")(repository, "/".join(rest[1:]))

    def _is_allowed(self, repository: Repository) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository.is_gated and given != repository.token:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return False
        if repository.token and given != repository.token:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return False
        return True

    def _send_info(self, repository: Repository, revision: str, name: str) -> None:
        found = repository.find(revision)
        if found is None:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = found
        siblings = [_describe(path, content) for path, content in files.items()]
        self._send_json({"id": name, "sha": commit, "siblings": siblings})

    def _send_file(self, repository: Repository, revision: str, path: str) -> None:
        found = repository.find(revision)
        if found is None or path not in found[1]:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = found[1][path]
        cut = self.hub.cuts.pop(path, None) if self.command == "GET" else None
        self.answer_file(content, hashlib.sha1(content).hexdigest(), cut, X_Repo_Commit=found[0])

    def count_sent(self, num_bytes: int) -> None:
        self.hub.bytes_sent += num_bytes

    def _create(self) -> None:
        body = json.loads(self.body)
        owner = body.get("organization") or "me"
        key = f"models/{owner}/{body['name']}"
        url = f"{self.hub.url}/{owner}/{body['name']}"
        if key in self.hub.repositories:
            self._send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repositories[key] = Repository()
        self._send_json({"url": url})

    def _api_refs(self, repository: Repository, _rest: str) -> None:
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": commit}
            for name, commit in repository.tags.items()
        ]
        self._send_json({"branches": [], "tags": tags, "converts": []})

    def _api_tree(self, repository: Repository, revision: str) -> None:
        found = repository.find(revision)
        files = {} if found is None else found[1]
        self._send_json(
            [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()]
        )

    def _api_preupload(self, _repository: Repository, _revision: str) -> None:
        wanted = json.loads(self.body)["files"]
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in wanted]
        self._send_json({"files": files})

    def _api_commit(self, repository: Repository, _revision: str) -> None:
        files = dict(repository.commits[-1][1]) if repository.commits else {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                files[entry["value"]["path"]] = self._spoil(entry["value"]["path"], content)
        commit = repository.commit(files)
        self._send_json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/me/x/commit/{commit}"})

    def _spoil(self, name: str, content: bytes) -> bytes:
        if name not in self.hub.spoiled:
            return content
        self.hub.spoiled.remove(name)
        return bytes(len(content))

    def _api_tag(self, repository: Repository, revision: str) -> None:
        found = repository.find(revision)
        assert found is not None
        repository.tags[json.loads(self.body)["tag"]] = found[0]
        self._send_json({})

    def _send_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _describe(path: str, content: bytes) -> dict[str, object]:
    facts: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": _hash_as_git(content)}
    if path.endswith((".safetensors", ".parquet")):
        facts["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return facts


def _hash_as_git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
