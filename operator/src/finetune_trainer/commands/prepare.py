"""`prepare`: fetch model and data into the workspace and prepare the data; or prepare one plain file without a cluster.

The data comes before the weights, so that a mistake in it shows before gigabytes are moved.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
from typing import TYPE_CHECKING, Any

from finetune_contract.parsing import to_plain
from finetune_contract.reports import ExitCode, ExitReport, Metric, Phase, Reason
from finetune_contract.run_config import DatasetConfig, FilterActions, FilterConfig, RunConfig, Source
from finetune_trainer.commands.common import add_run_config_argument, apply_workspace_lock, load_run_config
from finetune_trainer.commands.judge_options import add_judge_arguments, build_judge_config, fetch_judge
from finetune_trainer.commands.quality_options import add_quality_arguments, build_quality
from finetune_trainer.data.formats import FORMATS
from finetune_trainer.errors import TrainerError
from finetune_trainer.reporting import ProgressBar, ProgressReporter, emit, write_exit_report, write_json

if TYPE_CHECKING:
    import argparse

    from finetune_contract.workspace import Workspace
    from finetune_trainer.data.decontamination import ContaminationIndex
    from finetune_trainer.data.report import Counts

_ROWS_PERCENT = 20.0
"""Share of the phase's progress that the data is, which comes first; the rest is the model's download."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_run_config_argument(parser)
    plain = parser.add_argument_group(
        "without a cluster", "Prepare one source into a folder; no settings file is read."
    )
    plain.add_argument("--source", metavar="FILE", help="file, folder or URL of instruction rows")
    plain.add_argument("--out", metavar="DIR", type=pathlib.Path, help="folder for train.jsonl and its companions")
    plain.add_argument(
        "--dry-run", action="store_true", help="write the report and the lists of removed and bad rows, but no data"
    )
    plain.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="format of the rows")
    plain.add_argument("--rules", choices=("default", "legacy"), default="default", help="how refusals are found")
    plain.add_argument(
        "--phrases",
        metavar="FILE",
        type=pathlib.Path,
        help="phrases, one a line (legacy: instead of the built-in list)",
    )
    plain.add_argument(
        "--fields",
        metavar="NAMES",
        default="",
        help="fields to search: instruction,input,output (default: the answers)",
    )
    plain.add_argument(
        "--map", metavar="NAME=THEIRS", action="append", default=[], help="name of a field in the source's rows"
    )
    plain.add_argument(
        "--action",
        metavar="CATEGORY=ACTION",
        action="append",
        default=[],
        help="what follows from a match, as in disclaimer=remove-sentence: remove-row, remove-sentence or flag",
    )
    add_quality_arguments(plain)
    add_judge_arguments(plain)
    plain.add_argument("--language", default="", help="apply the rules of one language only, as in en")
    plain.add_argument("--holdout-fraction", type=float, default=0.0, help="share of rows to hold out")
    plain.add_argument("--max-bad-rows", type=int, default=0, help="rows that may be unusable before this fails")
    plain.add_argument("--seed", type=int, default=42, help="seed of the split")
    plain.add_argument("--revision", default="", help="revision of a hub repository, version of an S3 object")
    plain.add_argument("--tokenizer", metavar="DIR", type=pathlib.Path, help="model folder to count tokens with")


def run(args: argparse.Namespace) -> int:
    """Prepare what the arguments or the run's settings name."""
    if args.source is None:
        if args.dry_run:
            raise TrainerError(
                Reason.INVALID_CONFIG, ExitCode.USAGE, "--dry-run without --source", "Add --source FILE --out DIR."
            )
        return _run_job(args)
    if args.out is None:
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, "--source without --out", "Add --out DIR.")
    return _run_plain(args)


def _run_plain(args: argparse.Namespace) -> int:
    from finetune_trainer.data.prepare import Preparation
    from finetune_trainer.data.tokens import TokenCounter
    from finetune_trainer.fetch import list_remote_rows

    dataset = _build_dataset(args)
    if args.dry_run:
        # It lists all of them instead of failing at the first that is too many.
        dataset = dataclasses.replace(dataset, max_bad_rows=sys.maxsize)
    phrases = None if args.phrases is None else _read_phrases(args.phrases)
    args.out.mkdir(parents=True, exist_ok=True)
    remote = list_remote_rows(dataset, pathlib.Path(), 0)
    downloads = args.out / ".downloads"
    with ProgressBar("reading", remote.num_bytes, "B") as bar:
        rows = remote.describe_in_place() if remote.is_local else remote.download(downloads, bar.advance)
    contamination = _read_contamination(dataset, "", pathlib.Path())
    dataset, judge = fetch_judge(dataset, pathlib.Path(), downloads)
    with ProgressBar("filtering", None) as bar:
        steps = _RowSteps(bar)
        counter = TokenCounter(args.tokenizer, dataset.prompt_template)
        preparation = Preparation(
            dataset, args.out, counter, phrases, steps.advance, contamination=contamination, judge=judge
        )
        manifest = preparation.run([rows], dry=args.dry_run)
    shutil.rmtree(downloads, ignore_errors=True)
    _print_summary(manifest, args.out)
    if manifest["rowsBad"] > args.max_bad_rows:
        print(f"without --dry-run this fails: at most {args.max_bad_rows} bad rows are allowed (--max-bad-rows)")
    return 0


def _build_dataset(args: argparse.Namespace) -> DatasetConfig:
    fields = dict(item.split("=", 1) if "=" in item else (item, "") for item in args.map)
    if wrong := [name for name, theirs in fields.items() if not theirs]:
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.USAGE, f"--map {wrong[0]}: no `=`", "Write --map output=response."
        )
    searched = tuple(name.strip() for name in args.fields.split(",") if name.strip())
    return DatasetConfig(
        sources=(Source(args.source, args.revision, args.format),),
        fields=fields,
        filter=FilterConfig(rules=args.rules, fields=searched, language=args.language, actions=_parse_actions(args)),
        quality=build_quality(args),
        judge=build_judge_config(args),
        holdout_fraction=args.holdout_fraction,
        max_bad_rows=args.max_bad_rows,
        seed=args.seed,
    )


def _parse_actions(args: argparse.Namespace) -> FilterActions:
    known = [field.name.replace("_", "-") for field in dataclasses.fields(FilterActions)]
    given = dict(item.partition("=")[::2] for item in args.action)
    if wrong := [name for name in given if name not in known]:
        hint = f"Write CATEGORY=ACTION with one of {', '.join(known)}."
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, f"--action {wrong[0]}: unknown category", hint)
    if given and args.rules == "legacy":
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.USAGE,
            "--action beside --rules legacy, which removes whole rows",
            "Leave --action out, or use --rules default.",
        )
    return FilterActions(**{name.replace("-", "_"): action for name, action in given.items()})


def _read_phrases(path: pathlib.Path) -> tuple[str, ...]:
    from finetune_trainer.data.rules import parse_phrases

    try:
        return parse_phrases(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise TrainerError(
            Reason.INVALID_CONFIG,
            ExitCode.NO_INPUT,
            f"--phrases {path}: cannot be read: {error}",
            "Name a UTF-8 text file with one phrase a line.",
        ) from error


class _RowSteps:
    """Turns the counts of a preparation into a bar and progress posts."""

    def __init__(self, bar: ProgressBar, reporter: ProgressReporter | None = None) -> None:
        self._bar = bar
        self._reporter = reporter
        self._seen = 0

    def advance(self, share: float, counts: Counts) -> None:
        self._bar.advance(counts.read - self._seen, removed=counts.removed)
        self._seen = counts.read
        if self._reporter is not None:
            metrics = {Metric.ROWS_READ: float(counts.read), Metric.ROWS_REMOVED: float(counts.removed)}
            self._reporter.update(_ROWS_PERCENT * share, {str(name): value for name, value in metrics.items()})


def _print_summary(manifest: dict[str, Any], folder: pathlib.Path) -> None:
    from finetune_trainer.data.output import PAGE
    from finetune_trainer.data.plots import shorten

    names = {"read": "rowsRead", "kept": "rowsKept", "removed": "rowsRemoved", "bad": "rowsBad"}
    print("rows " + ", ".join(f"{name} {manifest[key]}" for name, key in names.items()))
    for rule, number in manifest["removedPerRule"].items():
        print(f"  {number:8d}  {shorten(rule, 100)}")
    print(f"report {folder / PAGE}")


def _run_job(args: argparse.Namespace) -> int:
    settings = load_run_config(args)
    workspace = apply_workspace_lock(settings)
    with ProgressReporter() as reporter:
        reporter.update(0, urgent=True)
        details = _prepare_workspace(settings, workspace, reporter)
        rows = {Metric.ROWS_READ: details["rows_read"], Metric.ROWS_REMOVED: details["rows_removed"]}
        reporter.update(100, {str(name): value for name, value in rows.items()}, urgent=True)
    message = (
        f"{details['rows_kept']} of {details['rows_read']} rows kept, {details['rows_removed']} removed; "
        f"data set {details['dataset_digest']}, model {details['model_digest']}"
    )
    write_exit_report(ExitReport(Phase.PREPARE, Reason.COMPLETED, message, details=details), workspace)
    emit("prepared", rows_read=details["rows_read"], rows_kept=details["rows_kept"], tokens=details["tokens"])
    return 0


def _prepare_workspace(settings: RunConfig, workspace: Workspace, reporter: ProgressReporter) -> dict[str, Any]:
    from finetune_trainer.fetch import BaseModel

    model = BaseModel(settings, workspace)
    reused = model.manifest is not None
    model.download_small_files()
    data = _prepare_dataset(settings, workspace, reporter)
    with ProgressBar("downloading the model", model.num_bytes, "B") as bar:
        total, done = max(model.num_bytes, 1), 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            bar.advance(amount)
            reporter.update(_ROWS_PERCENT + (100 - _ROWS_PERCENT) * min(done / total, 1))

        manifest = model.download_rest(advance)
    emit("the model is in place", reused=reused, revision=manifest["resolvedRevision"], digest=manifest["digest"])
    report = workspace.dataset(data["digest"]) / "report.json"
    return {
        "rows_read": data["rowsRead"],
        "rows_kept": data["rowsKept"],
        "rows_removed": data["rowsRemoved"],
        "rows_bad": data["rowsBad"],
        "rows_train": data["rowsTrain"],
        "rows_holdout": data["rowsHoldout"],
        "tokens": data["tokens"],
        "removed_per_category": data["removedPerCategory"],
        "dataset_digest": data["digest"],
        "report": report.relative_to(workspace.root).as_posix(),
        "model_digest": manifest["digest"],
        "model_revision": manifest["resolvedRevision"],
    }


def _prepare_dataset(settings: RunConfig, workspace: Workspace, reporter: ProgressReporter) -> dict[str, Any]:
    """Return the manifest of the prepared data: the one that is there, or a new one."""
    from finetune_trainer.data.output import read_manifest
    from finetune_trainer.data.prepare import Preparation, make_digest
    from finetune_trainer.data.tokens import TokenCounter
    from finetune_trainer.fetch import list_remote_rows

    dataset = settings.dataset
    request = _make_request(dataset)
    found = _read_current(workspace, request)
    if found is not None:
        emit("the prepared data is in place", digest=found["digest"])
        return found
    downloads = workspace.datasets / ".downloads"
    remotes = [list_remote_rows(dataset, workspace.root, index) for index in range(len(dataset.sources))]
    with ProgressBar("downloading the data", sum(remote.num_bytes for remote in remotes), "B") as bar:
        sources = [
            remote.describe_in_place()
            if remote.is_local
            else remote.download(downloads / _folder_name(remote.source, index), bar.advance)
            for index, remote in enumerate(remotes)
        ]
    contamination = _read_contamination(dataset, settings.evaluation.tasks_secret_prefix, workspace.root)
    dataset, judge = fetch_judge(dataset, workspace.root, downloads)
    digest = make_digest(sources, dataset, contamination=contamination)
    folder = workspace.dataset(digest)
    manifest = read_manifest(folder)
    if manifest is None or manifest["rowsBad"] > dataset.max_bad_rows:
        with ProgressBar("filtering the data", None) as bar:
            counter = TokenCounter(workspace.base_model, dataset.prompt_template)
            steps = _RowSteps(bar, reporter)
            preparation = Preparation(
                dataset, folder, counter, advance=steps.advance, contamination=contamination, judge=judge
            )
            manifest = preparation.run(sources)
    _keep_report(workspace, digest)
    write_json(workspace.current_dataset, {"digest": digest, "request": request})
    shutil.rmtree(downloads, ignore_errors=True)
    return manifest


def _read_contamination(dataset: DatasetConfig, secret_prefix: str, root: pathlib.Path) -> ContaminationIndex | None:
    """Return the texts of the evaluation tasks that must not be in the data, if the settings ask for it."""
    if not dataset.quality.contamination:
        return None
    from finetune_trainer.data.decontamination import make_index
    from finetune_trainer.evaluation.harness import read_texts
    from finetune_trainer.evaluation.task_files import fetch_tasks

    tasks = fetch_tasks(dataset.quality.contamination_tasks, secret_prefix, root)
    index = make_index(read_texts(tasks, root), dataset.quality)
    emit("the texts of the evaluation tasks are read", texts=index.num_texts, digest=index.digest)
    return index


def _keep_report(workspace: Workspace, digest: str) -> None:
    """Put the report beside those of the other phases, where it outlives the data."""
    from finetune_trainer.data.output import PAGE, REPORT

    workspace.reports.mkdir(parents=True, exist_ok=True)
    for name in (REPORT, PAGE):
        source = workspace.dataset(digest) / name
        if source.is_file():
            shutil.copyfile(source, workspace.reports / f"dataset-{digest}{source.suffix}")


def _make_request(dataset: DatasetConfig) -> str:
    """Return a text that changes when the job asks for other data."""
    from finetune_trainer.data.prepare import VERSION
    from finetune_trainer.data.rules import rules_digest

    facts = to_plain(dataset) | {"version": VERSION, "rules": rules_digest()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_current(workspace: Workspace, request: str) -> dict[str, Any] | None:
    from finetune_trainer.data.output import read_manifest

    try:
        current = json.loads(workspace.current_dataset.read_text(encoding="utf-8"))
        return read_manifest(workspace.dataset(current["digest"])) if current["request"] == request else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _folder_name(source: Source, index: int) -> str:
    mark = hashlib.sha256(f"{source.source} {source.revision}".encode()).hexdigest()[:12]
    return f"{index}-{mark}"
