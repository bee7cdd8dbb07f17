"""Asks an endpoint at a steady rate and notes who answered; runs in a pod of the cluster, standard library only.

`python3 asker.py URL MODEL RATE REQUESTS` prints one JSON line per request: when it began, how long it took, the digest
that the answer carries, and how its first try failed if it did. A request counts as failed when neither the first try
nor one retry within five seconds brought a 200.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import sys
import threading
import time
import urllib.parse
from typing import Any

ASK_SECONDS = 5.0
"""How long one try may take."""
PAUSE_SECONDS = 1.0
"""Before the retry, as HTTP clients wait."""
WORKERS = 32
_LOCK = threading.Lock()


def ask(url: str, model: str, timeout_seconds: float) -> tuple[int, str]:
    """Ask once over a new connection, so that every request is routed anew; return the status and the digest."""
    place = urllib.parse.urlsplit(url)
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=timeout_seconds)
    try:
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body),
            {"Content-Type": "application/json", "Connection": "close"},
        )
        response = connection.getresponse()
        response.read()
        return response.status, response.getheader("x-model-digest") or ""
    finally:
        connection.close()


def try_once(url: str, model: str, timeout_seconds: float) -> tuple[str, str]:
    """Return what went wrong, empty when nothing did, and the digest."""
    try:
        status, digest = ask(url, model, timeout_seconds)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}", ""
    return ("" if status == 200 else f"HTTP {status}"), digest


def run(url: str, model: str, number: int) -> None:
    """Ask one request, with one retry, and print its line."""
    began, started = time.time(), time.monotonic()
    first, digest = try_once(url, model, ASK_SECONDS)
    last = first
    if first:
        time.sleep(PAUSE_SECONDS)
        last, digest = try_once(url, model, ASK_SECONDS - PAUSE_SECONDS)
    seconds = round(time.monotonic() - started, 4)
    line: dict[str, Any] = {"n": number, "at": began, "ended": time.time(), "seconds": seconds, "digest": digest}
    if first:
        line |= {"first": first, "failed": last}
    with _LOCK:
        print(json.dumps(line), flush=True)


def main() -> None:
    """Ask at the rate, on time whatever the answers take."""
    url, model, rate, requests = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for number in range(requests):
            time.sleep(max(0.0, started + number / rate - time.monotonic()))
            pool.submit(run, url, model, number)


if __name__ == "__main__":
    main()
