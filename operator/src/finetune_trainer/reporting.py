"""What a pod says: progress posts (KEP-2779), log lines, a progress bar, and the exit report.

Every command uses it. Reporting never raises and never blocks the work: posts leave from a background thread that keeps
only the newest report.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import pathlib
import ssl
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any, Self

from finetune_contract import environment
from finetune_contract.reports import ExitReport, ProgressReport
from finetune_trainer.errors import redact

if TYPE_CHECKING:
    import types
    from collections.abc import Mapping

    from finetune_contract.workspace import Workspace

POST_INTERVAL_SECONDS = 2.0
POST_TIMEOUT_SECONDS = 5.0
PLAIN_LINE_SECONDS = 10.0
"""Without a terminal a progress bar becomes one line at most this often."""

logger = logging.getLogger("finetune_trainer")


class _LogfmtFormatter(logging.Formatter):
    """`time level message key=value ...`: readable in `kubectl logs`, and parsed by every log collector."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = to_text(record.created)
        parts = [stamp, record.levelname.lower(), record.getMessage()]
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        parts += [f"{name}={_quote(value)}" for name, value in fields.items()]
        text = " ".join(parts)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


def _quote(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n') else text


def configure_logging(verbose: bool = False) -> None:
    """Send this program's log lines to standard error; standard output stays free for results."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LogfmtFormatter())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def emit(message: str, /, **fields: Any) -> None:
    """Log one line with structured fields."""
    logger.info(message, extra={"fields": fields})


def emit_warning(message: str, /, **fields: Any) -> None:
    """Log one warning with structured fields."""
    logger.warning(message, extra={"fields": fields})


def now_text() -> str:
    """Return the time as RFC 3339 in UTC."""
    return to_text(time.time())


def to_text(seconds: float) -> str:
    """Return a time in seconds since 1970 as RFC 3339 in UTC."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class ProgressReporter:
    """Posts progress to the operator; without a URL in the environment it does nothing.

    `update` keeps the metrics of earlier calls, so that each caller passes only what changed.
    """

    def __init__(
        self,
        url: str | None = None,
        interval_seconds: float = POST_INTERVAL_SECONDS,
        timeout_seconds: float = POST_TIMEOUT_SECONDS,
    ) -> None:
        self._url = os.environ.get(environment.PROGRESS_URL, "") if url is None else url
        self._interval_seconds = interval_seconds
        self._timeout_seconds = timeout_seconds
        self._condition = threading.Condition()
        self._metrics: dict[str, float] = {}
        self._pending: ProgressReport | None = None
        self._urgent = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self.num_posted = 0
        """Posts that the operator accepted."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(
        self,
        percentage: float,
        metrics: Mapping[str, float] | None = None,
        eta_seconds: float | None = None,
        urgent: bool = False,
    ) -> None:
        """Note the newest state; it is posted soon, and at once when `urgent` (a checkpoint, the end)."""
        if not self._url:
            return
        with self._condition:
            if self._closed:
                return
            self._metrics.update({name: float(value) for name, value in (metrics or {}).items()})
            self._pending = ProgressReport(
                percentage=max(0, min(100, int(percentage))),
                eta_seconds=None if eta_seconds is None else max(0, int(eta_seconds)),
                metrics=dict(self._metrics),
                updated_at=now_text(),
            )
            self._urgent = self._urgent or urgent
            if self._thread is None:
                self._thread = threading.Thread(target=self._post_until_closed, name="progress", daemon=True)
                self._thread.start()
            self._condition.notify()

    def close(self) -> None:
        """Post what is still pending, waiting no longer than one post may take."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(self._timeout_seconds + 1)

    def _post_until_closed(self) -> None:
        last_post = float("-inf")
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._pending is not None or self._closed)
                due = last_post + self._interval_seconds
                while not (self._urgent or self._closed) and (left := due - time.monotonic()) > 0:
                    self._condition.wait(left)
                report, self._pending, self._urgent = self._pending, None, False
                closed = self._closed
            if report is not None:
                last_post = time.monotonic()
                self._post(report)
            if closed:
                return

    def _post(self, report: ProgressReport) -> None:
        try:
            headers = {"Content-Type": "application/json"}
            token_path = os.environ.get(environment.PROGRESS_TOKEN, "")
            if token_path:
                # Read each time: the kubelet replaces a projected token before it expires.
                headers["Authorization"] = f"Bearer {pathlib.Path(token_path).read_text().strip()}"
            ca_path = os.environ.get(environment.PROGRESS_CA_CERT) or None
            handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
            if self._url.startswith("https:"):
                handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_path)))
            request = urllib.request.Request(  # noqa: S310 - the operator sets the URL, nobody else
                self._url, data=json.dumps(report.to_body()).encode(), headers=headers, method="POST"
            )
            # No proxy: the operator is in the cluster, and the token is for nobody else.
            with urllib.request.build_opener(*handlers).open(request, timeout=self._timeout_seconds) as response:
                response.read()
            self.num_posted += 1
        except Exception as error:
            logger.debug("progress was not posted: %s", error)


class ProgressBar:
    """A bar on a terminal, now and then a line elsewhere. Use as a context manager."""

    def __init__(self, title: str, total: int | None, unit: str = "rows") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._done = 0
        self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            import tqdm

            scaled = unit == "B"
            self._bar = tqdm.tqdm(total=total, desc=title, unit=unit, unit_scale=scaled, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int, **fields: Any) -> None:
        """Count `amount` more units as done; `fields` are shown beside the count."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
            if fields:
                self._bar.set_postfix(fields, refresh=False)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            share = {"percent": round(100 * self._done / self._total)} if self._total else {}
            emit(self._title, done=self._done, unit=self._unit, **share, **fields)


def write_exit_report(report: ExitReport, workspace: Workspace | None = None) -> None:
    """Write how the phase ended, to the termination log first and then to the workspace; secrets are removed.

    Never raises: a full disk must not hide the reason it caused.
    """
    clean = ExitReport(
        phase=report.phase,
        reason=str(report.reason),
        message=redact(report.message),
        exit_code=int(report.exit_code),
        hint=redact(report.hint),
        attempt=report.attempt or int(os.environ.get(environment.ATTEMPT) or 0),
        rank=report.rank,
        details=report.details,
    )
    text = clean.to_termination_message()
    termination_log = os.environ.get(environment.TERMINATION_LOG)
    if termination_log:
        with contextlib.suppress(OSError):
            pathlib.Path(termination_log).write_text(text)
    if workspace is not None and workspace.root.is_dir():
        try:
            workspace.reports.mkdir(parents=True, exist_ok=True)
            write_json(workspace.reports / f"{clean.phase}.json", json.loads(text))
        except OSError as error:
            logger.warning("the exit report was not written to the workspace: %s", error)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
