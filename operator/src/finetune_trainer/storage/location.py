"""What a source's or destination's URL means. Pure."""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import TYPE_CHECKING

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError

if TYPE_CHECKING:
    from finetune_trainer.storage.access import Access

SCHEMES = ("hf", "s3", "https", "http", "pvc", "file")


@dataclasses.dataclass(frozen=True)
class Location:
    """A parsed URL."""

    scheme: str
    """hf, s3, https, http, pvc, or file for a plain path."""
    container: str
    """Bucket, or `owner/name` of a hub repository; empty elsewhere."""
    path: str
    """Path inside the container; the whole URL for https and http."""
    text: str
    """As the user wrote it."""


def parse_location(text: str, access: Access) -> Location:
    """Parse a URL or path. Raises TrainerError that names the field."""
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Location("file", "", text, text)
    if scheme not in SCHEMES:
        raise _invalid(access, text, f"unknown scheme {scheme}://", "Use hf://, s3://, https:// or pvc://.")
    if scheme in ("https", "http"):
        return Location(scheme, "", text, text)
    rest = urllib.parse.unquote(rest) if scheme == "file" else rest
    if scheme in ("pvc", "file"):
        return Location(scheme, "", rest, text)
    if scheme == "s3":
        bucket, _, key = rest.partition("/")
        if not bucket or not key.strip("/"):
            raise _invalid(access, text, "no bucket or no path", "Write s3://BUCKET/PATH.")
        return Location(scheme, bucket, key, text)
    return _parse_hub(rest, text, access)


def _parse_hub(rest: str, text: str, access: Access) -> Location:
    for prefix in ("datasets/", "models/"):
        rest = rest.removeprefix(prefix)
    owner, _, tail = rest.strip("/").partition("/")
    name, _, path = tail.partition("/")
    if not owner or not name:
        raise _invalid(access, text, "no repository", "Write hf://OWNER/NAME, for one file hf://OWNER/NAME/PATH.")
    return Location("hf", f"{owner}/{name}", path, text)


def _invalid(access: Access, text: str, why: str, hint: str) -> TrainerError:
    return TrainerError(Reason.INVALID_CONFIG, ExitCode.CONFIG, f"{access.field}: {text!r}: {why}", hint)
