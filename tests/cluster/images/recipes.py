"""What an image is made of, and the reference that follows from it.

build.py calls it. A reference is a hash of everything that goes in, so an unchanged image is never built twice and a
changed one never hides behind an old tag. What goes in is copied first: sources may change while a build runs.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from base import build_base_reference
from common import ROOT


@dataclass(frozen=True)
class Recipe:
    """One Dockerfile of images/ with everything it copies, as it was when the build was asked for."""

    name: str
    folder: Path
    """The build context: a copy of the Dockerfile and of the files it takes from the checkout."""
    build_arguments: dict[str, str]
    reference: str


def stage_recipe(name: str, folder: Path, build_arguments: dict[str, str]) -> Recipe:
    """Copy what the image is made of into `folder` and name the image after it."""
    dockerfile = Path("images") / name / "Dockerfile"
    files = [dockerfile, *list_copied((ROOT / dockerfile).read_text())]
    for file in files:
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, target)
    arguments = {"BASE_IMAGE": build_base_reference(), **build_arguments}
    digest = hashlib.sha256(repr(sorted(arguments.items())).encode())
    for file in files:
        digest.update(f"{file}\0{(folder / file).stat().st_mode & 0o111}\0".encode())
        digest.update(hashlib.sha256((folder / file).read_bytes()).digest())
    return Recipe(name, folder, arguments, f"finetune.local/{name}:{digest.hexdigest()[:16]}")


def list_copied(dockerfile: str) -> list[Path]:
    """List every file that the COPY lines take from the checkout, relative to its root."""
    files: set[Path] = set()
    for line in re.findall(r"^COPY +(.+)$", dockerfile, re.MULTILINE):
        for source in line.split()[:-1]:
            path = ROOT / source
            files.update([path] if path.is_file() else path.rglob("*"))
    return sorted(file.relative_to(ROOT) for file in files if file.is_file() and "__pycache__" not in file.parts)
