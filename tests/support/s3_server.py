"""The embedded cluster's own S3 server as a plain process on the loopback: a real server, started in a moment."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from tests.support.waiting import eventually

CLUSTER_TOOLS = pathlib.Path(__file__).resolve().parents[1] / "cluster"
ACCESS_KEY = "loopback-access-key"
SECRET_KEY = "loopback-secret-key"
REGION = "us-east-1"


def build_server() -> pathlib.Path:
    """Return the server's binary; it is compiled once for its sources."""
    sys.path.insert(0, str(CLUSTER_TOOLS))
    try:
        from embedded.tools import S3, build_program

        return build_program(S3)
    finally:
        sys.path.remove(str(CLUSTER_TOOLS))


class S3Server:
    """One server, which can be stopped and started again on the same port."""

    def __init__(self, folder: pathlib.Path, binary: pathlib.Path) -> None:
        self.folder = folder
        """One sub-folder is one bucket, one file one object."""
        self._binary = binary
        self._port = _find_free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def variables(self) -> dict[str, str]:
        """The keys of a Secret that opens it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_REGION": REGION,
        }

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(self._binary), f"-address=127.0.0.1:{self._port}", f"-folder={self.folder}", f"-region={REGION}",
        ]  # fmt: skip
        variables = {**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
        self._process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(self._answers, within=20, otherwise="the S3 server does not answer", every=0.02)

    def stop(self) -> None:
        """Stop it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=1) as answer:
            return answer.status == 200
        return False


@contextlib.contextmanager
def running_s3(folder: pathlib.Path) -> Iterator[S3Server]:
    """Run a server until the block ends."""
    server = S3Server(folder, build_server())
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
