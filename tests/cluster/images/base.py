"""The base image of the embedded path: Debian 12 with Python and a compiler, made from Debian's packages.

build.py calls it, because no registry is at hand to pull an official base from. It makes an archive that
`ctr image import` reads, once per content; it must not talk to containerd itself.
"""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

PACKAGES = ["python3", "python3-pip", "python3-dev", "g++", "ca-certificates"]
# Nobody reads manuals in a pod, and every file is unpacked once per cluster.
LEFT_OUT = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*"]
VARIANT = ["--variant=minbase", f"--include={','.join(PACKAGES)}", '--aptopt=APT::Install-Recommends "false"']


def build_base_key() -> str:
    return hashlib.sha256(json.dumps([VARIANT, LEFT_OUT]).encode()).hexdigest()[:16]


def build_base_reference() -> str:
    return f"finetune.local/base:{build_base_key()}"


def write_base_archive(folder: Path) -> Path:
    """Make the archive unless the cache has it, and return its path."""
    archive = folder / f"base-{build_base_key()}.tar"
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    layer = folder / f"base-{build_base_key()}.layer"
    excluded = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    subprocess.run(["mmdebstrap", "--quiet", *VARIANT, *excluded, "--format=tar", "bookworm", str(layer)], check=True)
    unfinished = archive.with_suffix(".part")
    write_image_archive(layer, build_base_reference(), unfinished)
    unfinished.rename(archive)
    layer.unlink()
    return archive


def write_image_archive(layer: Path, reference: str, archive: Path) -> None:
    """Wrap one layer as an image in the format of `docker save`."""
    with layer.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]
    with tarfile.open(archive, "w") as tar:
        for path, content in ((name, config), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        tar.add(layer, "layer.tar")
