"""Errors by consequence, and what must never appear in them.

`InvalidJobError` needs a human, `ClusterUnavailableError` passes by itself, `ConflictError` means that somebody else
wrote first. Raised everywhere in the operator, turned into conditions by `reconcile`. Nothing here talks to a cluster.
"""

from __future__ import annotations

import re

SECRET_PATTERNS = (
    re.compile(r"hf_[A-Za-z0-9]{16,}"),
    re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"(?i)(?<=bearer )[A-Za-z0-9._~+/-]{8,}=*"),
    re.compile(
        r"(?i)(?<![a-z])((?:[a-z0-9_-]*(?:secret|token|password|passwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|signature))"
        r"[\"']?\s*[=:]\s*[\"']?)(?!\s)[^\s\"',;&]{4,}"
    ),
)
"""What a credential looks like in text that a pod wrote: the operator never reads Secrets, so it cannot know values."""

MASK = "[redacted]"


def redact(text: str) -> str:
    """Return text from a pod with everything that looks like a credential replaced."""
    for pattern in SECRET_PATTERNS:
        text = pattern.sub(lambda found: (found.group(1) if found.lastindex else "") + MASK, text)
    return text


class InvalidJobError(Exception):
    """The job cannot work as it is written; the message names the field and what to type instead."""

    def __init__(self, message: str, reason: str = "InvalidSpec") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason


class ClusterUnavailableError(Exception):
    """The API server did not answer, or refused for a reason that passes: try again later."""


class ConflictError(Exception):
    """Somebody else changed or made the object first: observe again."""


class RefusedError(Exception):
    """The API server refused an object for good: it, or the operator's rights, must change."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
