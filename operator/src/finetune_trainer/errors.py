"""The trainer's one exception with consequences, and the removal of secrets from what people read.

Every module raises `TrainerError` for what a user, an administrator or a remote service can mend; `__main__` turns it,
and every other exception, into an exit report. Nothing here imports torch, storage clients or the network.
"""

from __future__ import annotations

import errno
import os
import re
import traceback
from typing import TYPE_CHECKING, Any

from finetune_contract.parsing import RunConfigError
from finetune_contract.reports import ExitCode, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY_ID|ACCESS_KEY)$")
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_URL_SIGNATURE = re.compile(r"\?[^\s'\"]*(?:[Ss]ignature|[Tt]oken|[Cc]redential|sig)=[^\s'\"]*")
_SHORTEST_SECRET = 6
"""Shorter values of secret-looking variables are left alone: replacing them would garble ordinary words."""


class TrainerError(Exception):
    """Why a phase cannot go on, for the exit report."""

    def __init__(
        self,
        reason: Reason,
        exit_code: int,
        message: str,
        hint: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.exit_code = exit_code
        self.message = message
        """One line: what happened, where."""
        self.hint = hint
        """What to do, in the words of the job's spec."""
        self.details = dict(details or {})
        self.rank = -1
        """Rank that failed first; set by the supervisor of the ranks."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it travel between processes whole."""
        return type(self), (self.reason, self.exit_code, self.message, self.hint, self.details)


class StopRequested(BaseException):
    """SIGTERM arrived. Not an `Exception`, so that no library's broad handler swallows it."""


def as_trainer_error(error: BaseException) -> TrainerError:
    """Return what `error` means for the job; a `TrainerError` is returned as it is."""
    if isinstance(error, TrainerError):
        return error
    if isinstance(error, StopRequested):
        return TrainerError(Reason.SUSPENDED, ExitCode.SUSPENDED, "stopped on request (SIGTERM)")
    if isinstance(error, RunConfigError):
        return TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.CONFIG,
            str(error),
            "Use trainer and operator images of the same release.",
        )
    if is_disk_full(error):
        return storage_full(error)
    if type(error).__name__ == "OutOfMemoryError":
        return TrainerError(
            Reason.OUT_OF_MEMORY,
            ExitCode.OUT_OF_MEMORY,
            f"the accelerator ran out of memory: {first_line(error)}",
            "Halve spec.training.perDeviceBatchSize and double spec.training.gradientAccumulationSteps.",
        )
    return TrainerError(Reason.USER_CODE_ERROR, ExitCode.USER_CODE, f"{type(error).__name__}: {first_line(error)}")


def is_disk_full(error: BaseException) -> bool:
    """Return whether `error` says that a file system has no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def storage_full(error: BaseException) -> TrainerError:
    """Return the error for a full workspace."""
    name = getattr(error, "filename", None)
    where = f" while writing {name}" if name else ""
    return TrainerError(
        Reason.STORAGE_FULL,
        ExitCode.STORAGE_FULL,
        f"no space left on the workspace{where}",
        "Raise spec.workspace.size, or lower spec.checkpoint.retention.latest.",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the error's text, with the place it was raised at."""
    text = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text} ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})".strip()


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Return `text` without the values of secret variables, and without credentials in URLs."""
    values = os.environ if environment is None else environment
    secrets = {value for name, value in values.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        # A variable that holds a path, such as the projected token's, is no secret itself.
        if not secret.startswith("/"):
            text = text.replace(secret, "***")
    text = _URL_CREDENTIALS.sub("***@", text)
    return _URL_SIGNATURE.sub("?***", text)
