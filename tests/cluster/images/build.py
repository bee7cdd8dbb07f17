#!/usr/bin/env python3
"""Build the project's images into an embedded cluster's store: `build.py [--name CLUSTER] [operator trainer]`.

`make images`, the demo and the cluster tests call it. Unchanged images cost a second; changed sources a few; a changed
lock reinstalls. Progress goes to stderr; the references go to stdout and to build/images.json as one JSON object.
Standard library only, because nothing may be installed yet.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from base import build_base_reference, write_base_archive
from buildkit import build_programs, running_daemon
from common import CACHE, ROOT, ImageBuildError, held_lock, show
from recipes import Recipe, stage_recipe

CLUSTER_TOOL = ROOT / "tests/cluster/cluster.py"
REFERENCES = ROOT / "build/images.json"
KEPT_BUILDS = 4


class Store:
    """The containerd of one cluster, as far as images go."""

    def __init__(self, ctr: list[str]) -> None:
        self._ctr = ctr

    def list_images(self) -> dict[str, str]:
        """Read the digest that each reference stands for."""
        listed = subprocess.run([*self._ctr, "images", "ls"], check=True, capture_output=True, text=True).stdout
        rows = [line.split() for line in listed.splitlines()[1:]]
        return {row[0]: row[2] for row in rows}

    def import_archive(self, archive: Path) -> None:
        subprocess.run([*self._ctr, "images", "import", str(archive)], check=True, stdout=subprocess.DEVNULL)

    def remove(self, references: list[str]) -> None:
        """Remove images with the second name that kubelet's runtime gives each, or their layers would stay."""
        images = self.list_images()
        kept = {digest for name, digest in images.items() if not name.startswith("sha256:") and name not in references}
        going = {images[reference] for reference in references if reference in images} - kept
        names = [name for name, digest in images.items() if name in references or digest in going]
        if names:
            subprocess.run([*self._ctr, "images", "rm", *names], check=True, stdout=subprocess.DEVNULL)


def read_cluster_status(name: str) -> dict[str, Any]:
    """Start the cluster's containerd, unless it runs, and return where everything is."""
    command = [sys.executable, str(CLUSTER_TOOL), "runtime-up", "--name", name]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise ImageBuildError(f"{' '.join(command)} failed; its messages are above")
    status: dict[str, Any] = json.loads(finished.stdout)
    return status


def make_tools() -> tuple[Path, Path]:
    """Compile BuildKit and make the base image at the same time: one computes while the other downloads."""
    failures: list[Exception] = []

    def write_base() -> None:
        try:
            with held_lock(CACHE / "images/.lock"):
                write_base_archive(CACHE / "images")
        except (OSError, subprocess.CalledProcessError) as error:
            failures.append(error)

    thread = threading.Thread(target=write_base)
    thread.start()
    try:
        programs = build_programs()
    finally:
        thread.join()
    if failures:
        raise ImageBuildError(f"making the base image from Debian's packages failed: {failures[0]}")
    return programs, write_base_archive(CACHE / "images")


def build_options(recipe: Recipe) -> list[str]:
    """Say to buildctl where everything is; layers stay uncompressed, as they are unpacked at once."""
    arguments = {**recipe.build_arguments, "REVISION": recipe.reference.rpartition(":")[2]}
    bundle = os.environ.get("SSL_CERT_FILE")
    return [
        f"--local=context={recipe.folder}",
        f"--local=dockerfile={recipe.folder / 'images' / recipe.name}",
        "--opt=image-resolve-mode=local",
        *(f"--opt=build-arg:{name}={value}" for name, value in arguments.items()),
        *([f"--secret=id=ca-bundle,src={bundle}"] if bundle and Path(bundle).is_file() else []),
        f"--output=type=image,name={recipe.reference},unpack=true,compression=uncompressed",
    ]


def build_missing(status: dict[str, Any], recipes: list[Recipe], store: Store) -> None:
    present = store.list_images()
    missing = [recipe for recipe in recipes if recipe.reference not in present]
    if not missing:
        return
    programs, archive = make_tools()
    if build_base_reference() not in present:
        store.import_archive(archive)
    with running_daemon(programs, status, CACHE / "clusters" / status["name"] / "containerd/buildkit") as buildkit:
        for recipe in missing:
            started = time.monotonic()
            buildkit.build(recipe.name, build_options(recipe))
            show(f"built {recipe.reference} in {time.monotonic() - started:.0f} s")
        buildkit.forget_old_layers()


def remove_old_builds(recipes: list[Recipe], store: Store, history: Path) -> None:
    """Keep the last builds of each image: pods of a moment ago may start again, but disks are finite."""
    known: dict[str, list[str]] = json.loads(history.read_text()) if history.exists() else {}
    old: list[str] = []
    for recipe in recipes:
        used = [recipe.reference, *(other for other in known.get(recipe.name, []) if other != recipe.reference)]
        known[recipe.name], old = used[:KEPT_BUILDS], old + used[KEPT_BUILDS:]
    history.write_text(json.dumps(known))
    if old:
        store.remove(old)


def build(name: str, images: list[str], torch_index_url: str) -> dict[str, str]:
    """Build what the store of cluster `name` lacks and return the reference of every image asked for."""
    status = read_cluster_status(name)
    store = Store(status["containerd"]["ctr"])
    folder = CACHE / "clusters" / name
    index = {"TORCH_INDEX_URL": torch_index_url} if torch_index_url else {}
    with held_lock(folder / "images.lock"), tempfile.TemporaryDirectory() as context:
        recipes = [stage_recipe(image, Path(context) / image, index if image == "trainer" else {}) for image in images]
        build_missing(status, recipes, store)
        remove_old_builds(recipes, store, folder / "containerd/finetune-images.json")
    return {recipe.name: recipe.reference for recipe in recipes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="operator, trainer; both when none is named")
    parser.add_argument("--name", default="default", help="the cluster (default: %(default)s)")
    parser.add_argument("--torch-index-url", default=os.environ.get("TORCH_INDEX_URL", ""), help="index of CPU wheels")
    arguments = parser.parse_args()
    if unknown := set(arguments.images) - {"operator", "trainer"}:
        parser.error(f"{', '.join(sorted(unknown))}: only operator and trainer are built for the embedded cluster")
    try:
        references = build(arguments.name, arguments.images or ["operator", "trainer"], arguments.torch_index_url)
    except ImageBuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    REFERENCES.parent.mkdir(exist_ok=True)
    known = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
    REFERENCES.write_text(json.dumps({**known, **references}, indent=1) + "\n")
    print(json.dumps(references))
    return 0


if __name__ == "__main__":
    sys.exit(main())
