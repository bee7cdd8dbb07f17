"""Writes a run report: on the workspace under the model's digest, and beside the promoted model. No torch."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.workspace import Workspace
from finetune_trainer.report.facts import build_report
from finetune_trainer.report.page import build_page
from finetune_trainer.reporting import emit, emit_warning, read_object, write_json
from finetune_trainer.storage.publish import MODEL_CARD, REPORT_JSON, REPORT_PAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune_contract.run_config import RunConfig


def write_run_report(run: RunConfig, digest: str) -> dict[str, str]:
    """Write the report of a promoted model; return its path below the workspace as the detail `report`.

    Never raises: a phase that did its work does not fail for what is told of it. Without a digest nothing is written.
    """
    if not digest:
        return {}
    workspace = Workspace(pathlib.Path(run.workspace))
    try:
        page = write_report(workspace, build_report(workspace, run, digest))
    except Exception as error:
        emit_warning("the run report was not written", error=f"{type(error).__name__}: {error}")
        return {}
    return {"report": page.relative_to(workspace.root).as_posix()}


def write_report(workspace: Workspace, report: Mapping[str, Any]) -> pathlib.Path:
    """Write page, JSON and model card, and return the page's path. Files that would say the same stay untouched."""
    digest = report["model"].get("digest", "")
    name = f"run-{digest}" if digest else "run"
    workspace.reports.mkdir(parents=True, exist_ok=True)
    page = workspace.reports / f"{name}.html"
    _write_into(report, {"json": page.with_suffix(".json"), "html": page, "md": page.with_suffix(".md")})
    folder = workspace.promoted_model(digest)
    if digest and folder.is_dir():
        beside = {"json": folder / REPORT_JSON, "html": folder / REPORT_PAGE, "md": folder / MODEL_CARD}
        _write_into(report, beside)
    emit("run report", page=str(page))
    return page


def _write_into(report: Mapping[str, Any], paths: Mapping[str, pathlib.Path]) -> None:
    if all(path.exists() for path in paths.values()) and _says_the_same(read_object(paths["json"]), report):
        return
    # Here: the hub's library reads its environment when it is imported, which the torch commands still set.
    from finetune_trainer.report.card import build_card

    _write_text(paths["html"], build_page(report))
    _write_text(paths["md"], build_card(report))
    # Last: it is what says that the others are there and current.
    write_json(paths["json"], report)


def _says_the_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return {**old, "createdAt": ""} == {**new, "createdAt": ""}


def _write_text(path: pathlib.Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
