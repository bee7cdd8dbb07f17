"""What an image is made of, and the reference that follows from it. Pure but for reading the checkout.

build.py calls it. A reference is a hash of everything that goes in, so an unchanged image is never built twice and a
changed one never hides behind an old tag.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from base import build_base_reference
from common import ROOT

SOURCE_STAGE = re.compile(r"^FROM stack$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """One Dockerfile of images/, as two images: the stack (what is installed) and, on top of it, our sources."""

    name: str
    build_arguments: tuple[tuple[str, str], ...] = ()
    """Arguments of the stack that a user set, such as TORCH_INDEX_URL."""

    @property
    def dockerfile(self) -> str:
        return (ROOT / "images" / self.name / "Dockerfile").read_text()

    @property
    def stack_reference(self) -> str:
        stack = SOURCE_STAGE.split(self.dockerfile, maxsplit=1)[0]
        made_from = [stack, hash_files(list_copied(stack)), build_base_reference(), repr(self.build_arguments)]
        return f"finetune.local/{self.name}-stack:{hash_texts(made_from)}"

    @property
    def reference(self) -> str:
        made_from = [self.stack_reference, self.dockerfile, hash_files(list_copied(self.dockerfile))]
        return f"finetune.local/{self.name}:{hash_texts(made_from)}"


def list_copied(dockerfile: str) -> list[Path]:
    """List every file that the COPY lines take from the checkout."""
    files: set[Path] = set()
    for line in re.findall(r"^COPY +(.+)$", dockerfile, re.MULTILINE):
        words = line.split()
        if words[0].startswith("--from"):
            continue
        for source in words[:-1]:
            path = ROOT / source
            files.update([path] if path.is_file() else path.rglob("*"))
    return sorted(file for file in files if file.is_file() and "__pycache__" not in file.parts)


def hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0{file.stat().st_mode & 0o111}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def hash_texts(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
