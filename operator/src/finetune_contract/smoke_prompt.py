"""The smoke prompt: a real chat completion that a served version must answer before it takes traffic.

A program of the standard library alone, because it also runs in images that hold none of our packages: the operator
mounts this file into the pods of an endpoint. `smoke` waits for a server, asks it and reports what it measured as a
container's termination message; `check` asks once, as a probe; `drain` waits until vLLM has no requests under way.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

API_KEY = "INFERENCE_API_KEY"
"""Environment variable with the key that requests carry; unset: none."""
PROMPT = "Say hello in one short sentence."
ANSWER_TOKENS = 16
ASK_SECONDS = 60.0
"""How long one answer may take."""
TRIES = 3
"""Wrong answers, half a second apart, before the version is refused; a server that is not there yet is no answer."""
LOOK_SECONDS = 5.0
"""How long one look at the metrics may take."""
NOT_YET = (502, 503, 504)
EXIT_REFUSED, EXIT_NO_ANSWER = 65, 69
MAX_MESSAGE = 600
RUNNING_METRICS = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class WrongAnswerError(Exception):
    """The server answered, and not with a completion."""


class NotThereError(Exception):
    """The server cannot be reached yet, or says that it is not ready."""


def ask(url: str, model: str, max_tokens: int, timeout_seconds: float = ASK_SECONDS) -> dict[str, float]:
    """Ask for one streamed chat completion; return its figures. Raises NotThereError and WrongAnswerError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    started = time.monotonic()
    try:
        with _open(f"{url}/v1/chat/completions", json.dumps(body).encode(), timeout_seconds) as response:
            return _read_stream(response, started)
    except urllib.error.HTTPError as error:
        text = error.read(MAX_MESSAGE).decode(errors="replace").strip()
        if error.code in NOT_YET:
            raise NotThereError(f"HTTP {error.code}: {text}") from error
        raise WrongAnswerError(f"HTTP {error.code}: {text}") from error
    except TimeoutError as error:
        raise WrongAnswerError(f"no answer within {timeout_seconds:.0f} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise NotThereError(f"{type(error).__name__}: {error}") from error


def _open(url: str, data: bytes | None, timeout_seconds: float) -> Any:
    request = urllib.request.Request(url, data, make_headers())  # noqa: S310 - the operator sets the URL, nobody else
    # The server is inside the cluster: a proxy of the environment cannot reach it.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_seconds)


def make_headers() -> dict[str, str]:
    """Return the headers of a request with a body of JSON, with the key where the environment has one."""
    key = os.environ.get(API_KEY)
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def _read_stream(response: Any, started: float) -> dict[str, float]:
    """Read server-sent events to their end; each that carries text counts as a token."""
    times: list[float] = []
    has_ended = False
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            has_ended = True
            break
        event = json.loads(data)
        if "error" in event:
            raise WrongAnswerError(str(event["error"])[:MAX_MESSAGE])
        for choice in event.get("choices") or ():
            if (choice.get("delta") or {}).get("content"):
                times.append(time.monotonic())
            has_ended = has_ended or bool(choice.get("finish_reason"))
    if not has_ended:
        raise WrongAnswerError("the answer broke off")
    return _measure(times, started, time.monotonic())


def _measure(times: Sequence[float], started: float, ended: float) -> dict[str, float]:
    first = times[0] if times else ended
    # The tokens after the first one took the time after it; a single one took all of it.
    speed = (
        (len(times) - 1) / (times[-1] - first)
        if len(times) > 1 and times[-1] > first
        else len(times) / (ended - started)
    )
    return {
        "time_to_first_token_seconds": round(first - started, 4),
        "tokens_per_second": round(speed, 2),
        "answer_seconds": round(ended - started, 4),
        "tokens": len(times),
    }


def smoke(url: str, model: str, within_seconds: float) -> int:
    """Wait for the server, ask it, and report; return the exit code."""
    deadline = time.monotonic() + within_seconds
    tries, problem = 0, "it was never asked"
    while time.monotonic() < deadline and tries < TRIES:
        try:
            ask(url, model, 1)
            figures = ask(url, model, ANSWER_TOKENS)
        except NotThereError as error:
            problem = str(error)
            time.sleep(0.2)
        except (WrongAnswerError, ValueError) as error:
            tries, problem = tries + 1, str(error)
            time.sleep(0.5)
        else:
            _report("Completed", "the smoke prompt was answered", 0, figures)
            return 0
    code = EXIT_REFUSED if tries else EXIT_NO_ANSWER
    text = (
        f"the smoke prompt was not answered: {problem}" if tries else f"no answer in {within_seconds:.0f} s: {problem}"
    )
    _report("SmokePromptFailed", text, code, {})
    return code


def _report(reason: str, message: str, code: int, details: dict[str, float]) -> None:
    """Write an exit report, in the form of `finetune_contract.reports`, where Kubernetes looks for it."""
    report = {"phase": "smoke", "reason": reason, "message": message, "exit_code": code, "details": details}
    text = json.dumps(report)
    print(text, flush=True)
    path = os.environ.get("FINETUNE_TERMINATION_LOG")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def check(url: str, model: str) -> int:
    """Ask for one token; return 0 when it came."""
    try:
        ask(url, model, 1)
    except (NotThereError, WrongAnswerError, ValueError) as error:
        print(f"smoke prompt: {error}", flush=True)
        return 1
    return 0


def drain(url: str, within_seconds: float) -> int:
    """Wait until two looks at vLLM's metrics in a row tell of no request under way, for at most that long.

    Only a server that takes no connections is gone. One that does not answer has its hands full.
    """
    deadline = time.monotonic() + within_seconds
    idle_looks = 0
    while time.monotonic() < deadline:
        try:
            idle_looks = 0 if _has_requests(url) else idle_looks + 1
        except ConnectionRefusedError:
            return 0
        except (OSError, http.client.HTTPException):
            idle_looks = 0
        # vLLM counts a request some time after it took it.
        if idle_looks == 2:
            return 0
        time.sleep(LOOK_SECONDS / 10)
    return 0


def _has_requests(url: str) -> bool:
    try:
        with _open(f"{url}/metrics", None, LOOK_SECONDS) as response:
            lines = response.read().decode().splitlines()
    except urllib.error.URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else error) from None
    return any(float(line.rpartition(" ")[2]) for line in lines if line.startswith(RUNNING_METRICS))


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("smoke", "check", "drain"))
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--within", type=float, default=60.0, help="seconds")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds to wait before draining")
    args = parser.parse_args()
    if args.mode == "smoke":
        return smoke(args.url, args.model, args.within)
    if args.mode == "check":
        return check(args.url, args.model)
    time.sleep(args.delay)
    return drain(args.url, args.within)


if __name__ == "__main__":
    sys.exit(main())
