"""Starts vLLM in a pod, and says why when it fails.

vLLM's own last words are the traceback of its front end ("Engine core initialization failed. See root cause above."),
which fills what Kubernetes keeps of a log; the cause was told before, by another of its processes. This program stays
beside it, passes its output and the signals on, and leaves the first error of the end as the container's termination
message. A promoted folder that is not whole is refused before vLLM is started.

A program of the standard library alone, like `smoke_prompt`: the operator mounts this file into pods whose image holds
none of our packages. Arguments: [--promoted FOLDER] -- COMMAND...
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

MANIFEST = "finetune-model.json"
"""Of a promoted model: its digest, and each file with its size."""
EXIT_NO_INPUT = 66
KEPT_LINES = 5000
FAILING_SECONDS = 60.0
"""Before the end: errors that were told earlier are others'."""
MAX_CAUSE = 500
_PROCESS = re.compile(r"(?:\x1b\[[\d;]*m)*(?:\([^()]* pid=\d+\))?(?:\x1b\[[\d;]*m)* ?(?:[A-Z]+ \S+ \S+ \[[^\]]+\] ?)?")
"""What vLLM writes before a line: the process, and of a log record its level, time and place."""
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)(?::.*)?$|vllm serve: error: .*")
_NO_CAUSE = re.compile(r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed")
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
    parser.add_argument("--promoted", type=pathlib.Path, help="folder of the promoted model that must be whole")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    damage = find_damage(args.promoted) if args.promoted else ""
    if damage:
        report("PromotionInvalid", damage, EXIT_NO_INPUT, "Promote again; if the folder is damaged, remove it first.")
        return EXIT_NO_INPUT
    return run(args.command)


if __name__ == "__main__":
    sys.exit(main())
