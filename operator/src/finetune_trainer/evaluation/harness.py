"""lm-eval tasks by name or from local YAML, with the shots of the first Open LLM Leaderboard as one group."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.errors import TrainerError, first_line

GROUPS: Mapping[str, Mapping[str, int]] = {
    "open-llm-v1": {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0},
}
"""Our groups: lm-eval tasks and their number of examples in the prompt."""

Scores = dict[str, dict[str, float]]
"""By task and metric."""


@dataclasses.dataclass
class TaskResults:
    """What one model reached on tasks, and under which versions of them."""

    scores: Scores = dataclasses.field(default_factory=dict)
    errors: Scores = dataclasses.field(default_factory=dict)
    """Standard errors, of the scores that have one."""
    shots: dict[str, int] = dataclasses.field(default_factory=dict)
    """By task: examples in the prompt."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """By task, as lm-eval counts them."""


_BOOTSTRAPS = 100
"""Resamplings for the standard error of metrics that have no formula for it."""


def expand_tasks(names: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return each task with its shots; None keeps those of the task."""
    expanded: list[tuple[str, int | None]] = []
    for name in names:
        expanded += list(GROUPS[name].items()) if name in GROUPS else [(name, None)]
    return expanded


def is_local(name: str) -> bool:
    """Return whether a task is a file."""
    return name.endswith((".yaml", ".yml"))


def score_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], limit: int, root: pathlib.Path
) -> tuple[Scores, Scores]:
    """Return the scores of one model and their standard errors. Relative task files lie below `root`."""
    results = run_tasks(model, tokenizer, names, limit, root)
    return results.scores, results.errors


def run_tasks(model: Any, tokenizer: Any, names: Sequence[str], limit: int, root: pathlib.Path) -> TaskResults:
    """Return what one model reaches on tasks. Relative task files lie below `root`."""
    from finetune_trainer.evaluation.language_model import SharingModel

    results = TaskResults()
    wrapped = SharingModel(model, tokenizer)
    for name, shots in expand_tasks(names):
        found = _score_task(wrapped, name, shots, limit, root)
        for task, metrics in found["results"].items():
            results.scores[task] = _numbers(metrics, is_error=False)
            results.errors[task] = _numbers(metrics, is_error=True)
        results.shots |= {task: int(count) for task, count in found.get("n-shot", {}).items()}
        results.versions |= {task: str(version) for task, version in found.get("versions", {}).items()}
    return results


def _score_task(model: Any, name: str, shots: int | None, limit: int, root: pathlib.Path) -> Mapping[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    path = _find_file(name, root)
    try:
        # A local task's data files are named relative to its own folder.
        with _working_folder(path.parent if path else pathlib.Path.cwd()):
            result = lm_eval.simple_evaluate(
                model,
                tasks=[str(path or name)],
                num_fewshot=shots,
                limit=limit or None,
                log_samples=False,
                bootstrap_iters=_BOOTSTRAPS,
                task_manager=TaskManager(include_defaults=path is None),
            )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        raise _make_error(name, error) from error
    found: Mapping[str, Any] = result or {"results": {}}
    return found


def read_texts(names: Sequence[str], root: pathlib.Path) -> Iterator[str]:
    """Yield the prompt of every document of the tasks, without examples: what training data must not hold.

    A name may also be that of a text file with one prompt a line. Raises TrainerError.
    """
    for name, _ in expand_tasks(names):
        if name.endswith(".txt"):
            yield from _read_lines(root / name)
            continue
        from lm_eval.tasks import TaskManager

        path = _find_file(name, root)
        try:
            with _working_folder(path.parent if path else pathlib.Path.cwd()):
                tasks = TaskManager(include_defaults=path is None).load([str(path or name)])["tasks"]
                texts = [str(task.doc_to_text(document)) for task in tasks.values() for document in task.eval_docs]
        except (KeyError, ValueError, OSError, ConnectionError) as error:
            raise _make_error(name, error) from error
        yield from texts


def _read_lines(path: pathlib.Path) -> Iterator[str]:
    try:
        yield from path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.NO_INPUT,
            f"{path}: cannot be read: {first_line(error)}",
            "Name a UTF-8 text file with one prompt a line.",
        ) from error


def _find_file(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Return the file of a local task, None for a task of lm-eval. Raises TrainerError when it is not there."""
    path = (root / name.removeprefix("pvc://")).resolve() if is_local(name) else None
    if path is not None and not path.is_file():
        raise TrainerError(
            Reason.EVALUATION_FAILED,
            ExitCode.NO_INPUT,
            f"spec.evaluation.tasks: no file {path}",
            "Name an lm-eval task, open-llm-v1, or the path of a task file below the workspace.",
        )
    return path


def _make_error(name: str, error: Exception) -> TrainerError:
    return TrainerError(
        Reason.EVALUATION_FAILED,
        ExitCode.NO_INPUT,
        f"task {name}: {first_line(error)}",
        "Check the task's name, and that its data can be reached or lies in the Hugging Face cache.",
    )


def _numbers(metrics: Mapping[str, Any], *, is_error: bool) -> dict[str, float]:
    """Return the plain metrics or their standard errors; lm-eval names them `metric,filter`, `metric_stderr,filter`."""
    kept: dict[str, float] = {}
    for name, value in metrics.items():
        metric, _, variant = name.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and variant and metric.endswith("_stderr") is is_error:
            metric = metric.removesuffix("_stderr")
            kept[metric if variant == "none" else f"{metric},{variant}"] = float(value)
    return kept


@contextlib.contextmanager
def _working_folder(folder: pathlib.Path) -> Iterator[None]:
    previous = pathlib.Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(previous)
