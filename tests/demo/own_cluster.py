"""What `make demo CONTEXT=...` is told of a cluster that it did not make itself, checked before anything is done."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

from tests.demo.demo import Storage
from tests.demo.kubectl import Cluster, ClusterError

NEEDED = ("DEMO_IMAGES", "S3_ENDPOINT", "S3_ACCESS_KEY", "S3_SECRET_KEY")
SECTION = 'README.md, "The demo on your own cluster", says what each is'


class OwnClusterError(ValueError):
    """Something the user gave, or did not give, cannot work; the message says what to give instead."""


def read_storage(environment: Mapping[str, str]) -> Storage:
    """Return the S3 account that the variables name. Raises OwnClusterError."""
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise OwnClusterError(f"also set {', '.join(missing)}; {SECTION}")
    endpoint = environment["S3_ENDPOINT"]
    return Storage(
        pod_endpoint=endpoint,
        local_endpoint=environment.get("S3_LOCAL_ENDPOINT") or endpoint,
        access_key=environment["S3_ACCESS_KEY"],
        secret_key=environment["S3_SECRET_KEY"],
        region=environment.get("S3_REGION") or "us-east-1",
    )


def read_images(path: str) -> dict[str, str]:
    """Return the image references of a JSON file; on CPUs the trainer image also serves. Raises OwnClusterError."""
    example = '{"operator": "registry.example.com/operator:v1", "trainer": "registry.example.com/trainer:v1"}'
    try:
        images = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OwnClusterError(f"DEMO_IMAGES={path} cannot be read ({error}): write {example} there") from error
    for name in ("operator", "trainer"):
        reference = images.get(name) if isinstance(images, dict) else None
        if not isinstance(reference, str) or ":" not in reference.rpartition("/")[2]:
            raise OwnClusterError(f"DEMO_IMAGES={path}: {name} has to be an image with its tag, as in {example}")
    return {"inference": images["trainer"], **images}


def check_context(cluster: Cluster) -> None:
    """Ask the API server whether it is there. Raises OwnClusterError."""
    try:
        cluster.run("version", "--request-timeout=20s", timeout=40)
    except ClusterError as error:
        raise OwnClusterError(
            f"context {cluster.context} of {cluster.kubeconfig} gives no answer: {error}; "
            "`kubectl config get-contexts` lists those that there are, KUBECONFIG names another file"
        ) from error
