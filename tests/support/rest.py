"""A small client of the API server for tests that read and play: plain objects, one kept connection, no kubectl."""

from __future__ import annotations

import base64
import http.client
import json
import pathlib
import ssl
import tempfile
import threading
import urllib.parse
from typing import Any

import yaml

Json = dict[str, Any]


class RestError(AssertionError):
    """The API server answered with an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"HTTP {code}: {message}")
        self.code = code


class Rest:
    """Requests as the kubeconfig's current user, thread by thread."""

    def __init__(self, kubeconfig: str) -> None:
        config = yaml.safe_load(pathlib.Path(kubeconfig).read_text())
        context = next(each for each in config["contexts"] if each["name"] == config["current-context"])["context"]
        cluster = next(each for each in config["clusters"] if each["name"] == context["cluster"])["cluster"]
        user = next(each for each in config["users"] if each["name"] == context["user"])["user"]
        self._address = urllib.parse.urlsplit(cluster["server"]).netloc
        self._tls = _build_tls(cluster, user)
        self._token = user.get("token", "")
        self._local = threading.local()

    def get(self, path: str) -> Json:
        """Return an object or a list."""
        return self.request("GET", path)

    def find(self, path: str) -> Json | None:
        """Return an object, or None when there is none."""
        try:
            return self.get(path)
        except RestError as error:
            if error.code == 404:
                return None
            raise

    def items(self, path: str) -> list[Json]:
        """Return the items of a list."""
        found: list[Json] = self.get(path)["items"]
        return found

    def merge(self, path: str, patch: Json) -> Json:
        """Merge a patch into an object."""
        return self.request("PATCH", path, patch, "application/merge-patch+json")

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Json:
        """Send one request and return the answer. Raises RestError."""
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        for is_last in (False, True):
            connection = getattr(self._local, "connection", None) or self._connect()
            try:
                connection.request(method, path, json.dumps(body) if body is not None else None, headers)
                response = connection.getresponse()
                data = response.read()
                break
            except (http.client.HTTPException, OSError):
                # A kept connection may have been closed by the other side meanwhile.
                self._local.connection = None
                if is_last:
                    raise
        answer: Json = json.loads(data) if data else {}
        if response.status >= 400:
            raise RestError(response.status, str(answer.get("message")))
        return answer

    def _connect(self) -> http.client.HTTPSConnection:
        host, _, port = self._address.partition(":")
        self._local.connection = http.client.HTTPSConnection(host, int(port or 443), context=self._tls, timeout=30)
        return self._local.connection


def _build_tls(cluster: Json, user: Json) -> ssl.SSLContext:
    if "certificate-authority-data" in cluster:
        ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
    else:
        ca = pathlib.Path(cluster["certificate-authority"]).read_text()
    tls = ssl.create_default_context(cadata=ca)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in ("client-certificate", "client-key"):
            if f"{name}-data" in user:
                path = pathlib.Path(folder) / name
                path.write_bytes(base64.b64decode(user[f"{name}-data"]))
                paths.append(str(path))
            elif name in user:
                paths.append(user[name])
        if paths:
            tls.load_cert_chain(*paths)
    return tls
