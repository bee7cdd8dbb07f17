"""The embedded cluster as the tests of this rung see it: kubectl, object storage with data in it, and its faults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.cluster.bring_up import bring_up, read_s3_keys
from tests.demo import corpus, tiny_llama
from tests.demo.demo import Storage, make_s3_client
from tests.demo.kubectl import Cluster

TOOL = pathlib.Path(__file__).with_name("cluster.py")
BUCKET = "tests"
SHAPE = tiny_llama.Shape(vocabulary=1024, hidden=64, layers=2, heads=4, intermediate=128, context=256)
"""Of the model that works."""


def open_world(name: str) -> World:
    """Bring up the cluster of that name with everything it needs, fill its bucket, and return it."""
    status = bring_up(name)
    programs = pathlib.Path(status["bin"])
    cluster = Cluster(status["kubeconfig"], status["context"], str(programs / "kubectl"), str(programs / "helm"))
    url = status["s3"]["url"]
    world = World(name, cluster, Storage(url, url, *read_s3_keys(status)), status["prometheus"], status["images"])
    world.write_test_data()
    return world


@contextlib.contextmanager
def borrow_world(name: str) -> Iterator[World]:
    """Open the world of that name for a while; its cluster goes down at the end if it was down before."""
    was_down = json.loads(_run_tool(name, "status"))["state"] == "down"
    world = open_world(name)
    try:
        yield world
    finally:
        if was_down:
            # What was measured is worth more than a clean end, so a failure is only printed.
            subprocess.run(_list_command(name, "down"), check=False)


def _run_tool(name: str, *arguments: str) -> str:
    finished = subprocess.run(_list_command(name, *arguments), check=False, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"{' '.join(arguments)}: {finished.stderr[-2000:]}"
    return finished.stdout


def _list_command(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, str(TOOL), *arguments, "--name", name)


@dataclasses.dataclass(frozen=True)
class World:
    """One running embedded cluster."""

    name: str
    cluster: Cluster
    storage: Storage
    prometheus_url: str
    images: dict[str, str]

    def tool(self, *arguments: str) -> str:
        """Run the cluster's own command, as in `tool("stop", "s3")`."""
        return _run_tool(self.name, *arguments)

    def read_status(self) -> dict[str, Any]:
        """Return what the cluster's command says about it."""
        status: dict[str, Any] = json.loads(self.tool("status"))
        return status

    def make_namespace(self, prefix: str) -> str:
        """Make a namespace of its own, with the storage's Secret in it; return its name."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        self.write_secret(name)
        return name

    def write_secret(
        self, namespace: str, name: str = "s3", access_key: str = "", secret_key: str = "", **changed: str
    ) -> None:
        """Create or change a Secret with the storage's keys; `changed` replaces or adds entries."""
        keys = {
            "AWS_ACCESS_KEY_ID": access_key or self.storage.access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key or self.storage.secret_key,
            "AWS_ENDPOINT_URL_S3": self.storage.pod_endpoint,
            "AWS_REGION": self.storage.region,
            **changed,
        }
        metadata = {"name": name, "namespace": namespace}
        self.cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})

    def write_test_data(self) -> None:
        """Fill the bucket: a small model and data set that work, and one of each that do not."""
        client = make_s3_client(self.storage)
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        rows = corpus.make_corpus(240).rows
        refusals = [{"instruction": "Help?", "input": "", "output": corpus.REFUSALS[0]}] * 5
        row = '{"instruction": "a", "output": "b"}\n'
        texts = {
            "datasets/small.json": json.dumps(rows),
            "datasets/empty.json": "[]",
            "datasets/refusals.json": json.dumps(refusals),
            "datasets/broken.jsonl": row + row + '{"instruction": "a", \n' + row,
            "models/broken/config.json": "{not json",
        }
        for key, text in texts.items():
            client.put_object(Bucket=BUCKET, Key=key, Body=text.encode())
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder)
            tiny_llama.write_tiny_llama(model, (f"{row['instruction']} {row['output']}" for row in rows), shape=SHAPE)
            for path in sorted(model.iterdir()):
                client.upload_file(str(path), BUCKET, f"models/tiny/{path.name}")
            client.upload_file(str(model / "model.safetensors"), BUCKET, "models/broken/model.safetensors")
