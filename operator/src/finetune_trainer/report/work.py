"""What a training took: attempts, goodput, GPU-hours, throughput. From the operator, else from the log. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from finetune_trainer.reporting import to_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune_contract.run_config import RunConfig
    from finetune_trainer.report.history import History, Life

_GOOD_ENDS = ("Completed", "Suspended")


def describe_work(
    history: History, run: RunConfig | None, topology: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the sums of a training and its attempts."""
    if run is not None and run.history.attempts:
        work, attempts = _from_operator(history, run)
    elif history.lives:
        work, attempts = _from_log(history)
    else:
        return {}, []
    allocated, productive = work["allocatedSeconds"], work["productiveSeconds"]
    if allocated and productive is not None:
        work["goodput"] = round(min(1.0, productive / allocated), 4)
    devices = int(topology.get("nodes") or 1) * int(topology.get("gpus_per_node") or 0)
    hours = allocated / 3600
    work |= {
        "gpus": devices,
        "gpuHours": round(hours * devices, 4),
        "podHours": round(hours * int(topology.get("nodes") or 1), 4),
    }
    return work, attempts


def _from_operator(history: History, run: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    known = run.history
    work = {
        "source": "operator",
        "restarts": known.restarts,
        "restartsByReason": dict(known.restarts_by_reason),
        "productiveSeconds": known.productive_seconds,
        "allocatedSeconds": known.allocated_seconds,
        "stepsLost": known.steps_lost,
        "secondsLost": known.seconds_lost,
    }
    attempts = []
    for attempt in known.attempts:
        lives = [life for life in history.lives if life.attempt == attempt.number]
        attempts.append(
            {
                "number": attempt.number,
                "nodes": list(attempt.nodes),
                "startTime": attempt.start_time or None,
                "endTime": attempt.end_time or None,
                "reason": attempt.reason,
                "resumedFromStep": attempt.resumed_from_step,
                "reachedStep": attempt.reached_step,
                "stepsLost": attempt.steps_lost,
                "secondsLost": attempt.seconds_lost,
                "inPodRestarts": attempt.in_pod_restarts,
                "restartTimes": [to_text(life.started_at) for life in lives[1:]],
            }
        )
    return work, attempts


def _from_log(history: History) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lives = history.lives
    restarts = len(lives) - 1
    work = {
        "source": "log",
        "restarts": restarts,
        "restartsByReason": {},
        "productiveSeconds": history.productive_seconds,
        "allocatedSeconds": history.elapsed_seconds,
        "stepsLost": sum(life.steps_lost for life in lives),
        "secondsLost": None,
    }
    numbers = dict.fromkeys(life.attempt for life in lives)
    return work, [_describe_lives(number, [life for life in lives if life.attempt == number]) for number in numbers]


def _describe_lives(number: int, lives: list[Life]) -> dict[str, Any]:
    first, last = lives[0], lives[-1]
    return {
        "number": number,
        "nodes": [],
        "startTime": to_text(first.started_at),
        "endTime": to_text(last.ended_at),
        "reason": "",
        "resumedFromStep": first.first_step,
        "reachedStep": last.last_step,
        "stepsLost": sum(life.steps_lost for life in lives),
        "secondsLost": None,
        "inPodRestarts": len(lives) - 1,
        "restartTimes": [to_text(life.started_at) for life in lives[1:]],
    }


def is_good_end(attempt: Mapping[str, Any], *, is_last: bool) -> bool:
    """Did the attempt end as it was meant to? Where nobody said why it ended, only the last one did."""
    return attempt["reason"] in _GOOD_ENDS or (not attempt["reason"] and is_last)


def summarise(history: History) -> dict[str, Any]:
    """Return the figures that stand at the top: steps, last loss, median throughput."""
    losses, rates = history.list_values("loss"), history.list_values("tokens_per_second")
    summary: dict[str, Any] = {}
    if history.lives:
        summary = {"step": history.lives[-1].last_step, "totalSteps": history.total_steps or None}
    if losses:
        summary |= {"firstLoss": losses[0][1], "lastLoss": losses[-1][1]}
    if rates:
        summary["tokensPerSecond"] = statistics.median(rate for _, rate in rates)
    return summary
