"""Starts vLLM in a pod, and says why when it fails.

vLLM's own last words are the traceback of its front end ("Engine core initialization failed. See root cause above."),
which fills what Kubernetes keeps of a log; the cause was told before, by another of its processes. This program stays
beside it, passes its output and the signals on, and leaves the first error of the end as the container's termination
message. A promoted model that is not whole is refused before vLLM is started: its folder, or its copy in S3, from which
vLLM then streams the weights.

A program of the standard library alone, like `smoke_prompt`, and for S3 of boto3, which the image has: the operator
mounts this file into pods whose image holds none of our packages. Arguments:
[--promoted FOLDER | --promoted s3://BUCKET/PREFIX --field FIELD [--secret-prefix PREFIX]] -- COMMAND...
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

MANIFEST = "finetune-model.json"
"""Of a promoted model: its digest, and each file with its size."""
COMPLETE = "COMPLETE"
"""Written last where a model is copied to."""
EXIT_NO_INPUT, EXIT_UNAVAILABLE, EXIT_NO_PERMISSION = 66, 69, 77
S3 = "s3://"
S3_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_CA_BUNDLE",
)
"""What a Secret may hold for a bucket, each under the destination's prefix."""
KEPT_LINES = 5000
FAILING_SECONDS = 60.0
"""Before the end: errors that were told earlier are others'."""
MAX_CAUSE = 500
_PROCESS = re.compile(r"(?:\x1b\[[\d;]*m)*(?:\([^()]* pid=\d+\))?(?:\x1b\[[\d;]*m)* ?(?:[A-Z]+ \S+ \S+ \[[^\]]+\] ?)?")
"""What vLLM writes before a line: the process, and of a log record its level, time and place."""
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?::.*)?$|vllm serve: error: .*")
_NO_CAUSE = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed")
_NO_DEVICE = re.compile(r"Failed to infer device type|No CUDA GPUs are available")
_OUT_OF_MEMORY = re.compile(r"out of memory|No available memory for the cache|KV cache|Free memory on device")


def find_damage(promoted: pathlib.Path) -> str:
    """Return what is wrong with the folder of a promoted model, as its manifest tells; empty when it is whole."""
    if not promoted.is_dir():
        return f"{promoted} does not exist"
    try:
        manifest = json.loads((promoted / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{promoted} is no whole promoted model: {MANIFEST} is missing or not whole"
    if manifest.get("digest") != promoted.name:
        return f"{promoted} holds another model, {manifest.get('digest')}"
    for name, size in sizes.items():
        path = promoted / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{promoted} is no whole promoted model: {name} is missing or has another size"
    return ""


class CopyError(Exception):
    """A copy in S3 that cannot be served: the report's reason, what is wrong, the exit code, and what to do."""

    def __init__(self, reason: str, message: str, code: int, hint: str) -> None:
        super().__init__(message)
        self.details = (reason, message, code, hint)


def check_copy(url: str, field: str) -> None:
    """Compare a promoted model's copy in S3 with the digest that its URL ends with. Raises CopyError.

    The manifest must give that digest; each file must be there with the size of the manifest, and its SHA-256 as it was
    noted when the file was uploaded and verified.
    """
    import boto3

    bucket, _, prefix = url.removeprefix(S3).partition("/")
    name = MANIFEST
    try:
        client = boto3.client("s3")
        text = client.get_object(Bucket=bucket, Key=f"{prefix}/{MANIFEST}")["Body"].read()
        files = _read_files(url, text)
        name = COMPLETE
        client.head_object(Bucket=bucket, Key=f"{prefix}/{COMPLETE}")
        for name, (size, sha256) in files.items():
            head = client.head_object(Bucket=bucket, Key=f"{prefix}/{name}")
            if (head["ContentLength"], head["Metadata"].get("sha256")) != (size, sha256):
                raise _damaged(url, f"{name} is not what was promoted")
    except CopyError:
        raise
    except Exception as error:
        raise _explain(url, name, field, error) from error


def _read_files(url: str, manifest: bytes) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file, of a manifest that gives the digest at the end of the URL."""
    try:
        entries = json.loads(manifest)["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in sorted(entries.items())}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(url, f"{MANIFEST} is not whole") from error
    lines = (f"{sha256} {size} {name}\n" for name, (size, sha256) in files.items())
    if hashlib.sha256("".join(lines).encode()).hexdigest() != url.rpartition("/")[2]:
        raise _damaged(url, f"{MANIFEST} is that of another model")
    return files


def _damaged(url: str, problem: str) -> CopyError:
    hint = "Write inference.loadFrom: Workspace, or copy the model from /workspace/output there again."
    return CopyError(
        "PromotionInvalid", f"{url} is no whole copy of the promoted model: {problem}", EXIT_NO_INPUT, hint
    )


def _explain(url: str, name: str, field: str, error: Exception) -> CopyError:
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = str(error).splitlines()[0][:MAX_CAUSE]
    if status == 404:
        return _damaged(url, f"{name} is missing")
    if status in (401, 403) or "redentials" in type(error).__name__:
        hint = (
            f"Name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {field}.secretRef, or give the pod's "
            "service account the right to it."
        )
        message = f"{field}.destination: access to {url} was refused: {said}"
        return CopyError("CredentialsRefused", message, EXIT_NO_PERMISSION, hint)
    hint = f"Check AWS_ENDPOINT_URL_S3 and AWS_REGION in {field}.secretRef, and that pods may reach it."
    message = f"{field}.destination: {url} did not answer: {said}"
    return CopyError("SourceUnavailable", message, EXIT_UNAVAILABLE, hint)


def choose_variables(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the variables with which boto3 and vLLM's streamer find the bucket that a Secret with a prefix is for."""
    found = {name: environ.get(prefix + name) or environ.get(name, "") for name in S3_VARIABLES}
    found = {name: value for name, value in found.items() if value}
    if "-----BEGIN" in found.get("AWS_CA_BUNDLE", ""):
        with tempfile.NamedTemporaryFile("w", suffix=".crt", delete=False) as file:
            file.write(found["AWS_CA_BUNDLE"])
        found["AWS_CA_BUNDLE"] = file.name
    endpoint = found.get("AWS_ENDPOINT_URL_S3")
    if endpoint:
        # Servers other than AWS's own have seldom a host name for each bucket.
        found |= {"AWS_ENDPOINT_URL": endpoint, "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
        found.setdefault("AWS_REGION", "us-east-1")
    if "AWS_REGION" in found:
        found["AWS_DEFAULT_REGION"] = found["AWS_REGION"]
    return found


def find_cause(lines: Iterable[str]) -> str:
    """Return the first error among these lines that names a cause, or else the last line that says anything."""
    last = ""
    for line in lines:
        text = _PROCESS.sub("", line.rstrip(), count=1)
        if _ERROR.match(text) and not _NO_CAUSE.search(text):
            return text[:MAX_CAUSE]
        last = text.strip() or last
    return last[:MAX_CAUSE]


def advise(cause: str) -> str:
    """Return what to do about a cause; empty when nothing is known."""
    if _OUT_OF_MEMORY.search(cause):
        return "Its GPUs have too little memory: write a larger inference.gpusPerReplica."
    if _NO_DEVICE.search(cause):
        return (
            "Its container sees no GPU: check the node's driver, container runtime and device plugin with nvidia-smi."
        )
    return ""


def run(command: Sequence[str]) -> int:
    """Run the server until it ends; return its exit code as a shell gives it."""
    asked_to_stop: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        asked_to_stop.append(number)
        if process is not None:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if asked_to_stop:
        process.send_signal(asked_to_stop[0])
    assert process.stdout is not None
    lines: collections.deque[tuple[float, str]] = collections.deque(maxlen=KEPT_LINES)
    reader = threading.Thread(target=_copy, args=(process.stdout, lines), daemon=True)
    reader.start()
    code = process.wait()
    # Its other processes may keep the pipe open a little longer, or for ever.
    reader.join(2.0)
    code = 128 - code if code < 0 else code
    if code and not asked_to_stop:
        since = time.monotonic() - FAILING_SECONDS
        cause = find_cause([text for written, text in list(lines) if written >= since])
        report("ServerFailed", f"vLLM ended with code {code}: {cause}", code, advise(cause))
    return code


def _copy(source: BinaryIO, lines: collections.deque[tuple[float, str]]) -> None:
    for line in source:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        lines.append((time.monotonic(), line.decode(errors="replace")))


def report(reason: str, message: str, code: int, hint: str) -> None:
    """Write an exit report, in the form of `finetune_contract.reports`, where Kubernetes looks for it."""
    fields = {"phase": "serve", "reason": reason, "message": message, "exit_code": code, "hint": hint}
    text = json.dumps(fields)
    print(text, flush=True)
    path = os.environ.get("FINETUNE_TERMINATION_LOG")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def main() -> int:
    """Look at the model, then run the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promoted", default="", help="folder of the promoted model, or URL of its copy, to be whole")
    parser.add_argument("--field", default="spec.promotion.destinations[0]", help="where the job names the copy")
    parser.add_argument("--secret-prefix", default="", help="of the variables with the credentials for the copy")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    if args.promoted.startswith(S3):
        os.environ.update(choose_variables(os.environ, args.secret_prefix))
        try:
            check_copy(args.promoted, args.field)
        except CopyError as error:
            reason, message, code, hint = error.details
            report(reason, message, code, hint)
            return code
        return run(args.command)
    damage = find_damage(pathlib.Path(args.promoted)) if args.promoted else ""
    if damage:
        report("PromotionInvalid", damage, EXIT_NO_INPUT, "Promote again; if the folder is damaged, remove it first.")
        return EXIT_NO_INPUT
    return run(args.command)


if __name__ == "__main__":
    sys.exit(main())
