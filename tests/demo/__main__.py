"""`make demo`: bring the embedded cluster up, or take the context that the user names, and run the demo there."""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import time

from tests.cluster.bring_up import BringUpError, bring_up, read_s3_keys
from tests.demo.demo import Storage, run_demo
from tests.demo.kubectl import Cluster
from tests.demo.own_cluster import OwnClusterError, check_context, read_images, read_storage

CLUSTER_TOOL = pathlib.Path(__file__).resolve().parents[1] / "cluster" / "cluster.py"


def main() -> int:
    """Run the demo. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--cluster", default="default", help="name of the embedded cluster")
    parser.add_argument("--context", default="", help="run on this kubectl context instead")
    arguments = parser.parse_args()
    started = time.monotonic()
    if arguments.context:
        return _run_on_context(arguments.context)
    try:
        status = bring_up(arguments.cluster)
    except BringUpError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"The cluster is up after {time.monotonic() - started:.0f} s; its kubeconfig: {status['kubeconfig']}",
        flush=True,
    )
    programs = pathlib.Path(status["bin"])
    cluster = Cluster(status["kubeconfig"], status["context"], str(programs / "kubectl"), str(programs / "helm"))
    url = status["s3"]["url"]
    code = run_demo(cluster, Storage(url, url, *read_s3_keys(status)), status["images"])
    print(f"make demo took {time.monotonic() - started:.0f} s. The cluster stays up; make cluster-down ends it.")
    return code


def _run_on_context(context: str) -> int:
    kubeconfig = os.environ.get("KUBECONFIG") or str(pathlib.Path.home() / ".kube" / "config")
    try:
        storage = read_storage(os.environ)
        images = read_images(os.environ["DEMO_IMAGES"])
        tools = subprocess.run((sys.executable, str(CLUSTER_TOOL), "tools"), check=True, capture_output=True, text=True)
        programs = pathlib.Path(tools.stdout.strip())
        cluster = Cluster(kubeconfig, context, str(programs / "kubectl"), str(programs / "helm"))
        check_context(cluster)
    except OwnClusterError as error:
        print(f"CONTEXT={context}: {error}", file=sys.stderr)
        return 2
    return run_demo(cluster, storage, images)


if __name__ == "__main__":
    sys.exit(main())
