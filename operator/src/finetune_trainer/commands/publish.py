"""`publish`: copy the promoted model to every destination of the job, or one folder to one place."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_contract.run_config import DatasetConfig, Destination, PromotionConfig, RunConfig, Source
from finetune_contract.workspace import Workspace
from finetune_trainer.commands.common import add_run_config_argument, apply_workspace_lock, load_run_config
from finetune_trainer.errors import TrainerError
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import ProgressBar, ProgressReporter, write_exit_report

if TYPE_CHECKING:
    import argparse

    from finetune_trainer.weight_diff.promoted import PromotedDiff


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_run_config_argument(parser)
    plain = parser.add_argument_group("without a cluster", "Copy one folder to one place.")
    plain.add_argument(
        "--model", metavar="DIR", type=pathlib.Path, help="folder of the promoted model, named by digest"
    )
    plain.add_argument("--destination", metavar="URL", help="s3:// or hf:// URL, or a folder")


def run(args: argparse.Namespace) -> int:
    """Make the weight diff that is wanted, copy, verify, and report where the model is found."""
    if args.model is not None:
        settings, workspace, folder = _read_plain(args)
    else:
        settings = load_run_config(args)
        workspace = apply_workspace_lock(settings)
        folder = workspace.promoted_model(settings.promotion.digest)
        if settings.evaluation.gates:
            # What goes out is told with the gates that let it out: they may have been edited since the evaluation.
            write_run_report(settings, settings.promotion.digest)
    if not settings.promotion.digest or not folder.is_dir():
        raise TrainerError(
            Reason.PROMOTION_INVALID,
            ExitCode.NO_INPUT,
            f"there is no promoted model at {folder}",
            "Run promote first; publish copies what it made.",
        )
    diff = _make_diff(settings) if settings.promotion.weight_diff else None
    urls = _publish_everywhere(settings, workspace, folder, diff)
    message = f"published to {', '.join(urls)}" if urls else "no destination is named"
    details: dict[str, Any] = {"destinations": urls}
    if diff is not None:
        details["weight_diff"] = diff.to_details(workspace)
        message += f"; weight diff at {diff.folder}"
    report = ExitReport(Phase.PUBLISH, Reason.COMPLETED, message, details=details)
    write_exit_report(report, workspace if args.model is None else None)
    return 0


def _make_diff(settings: RunConfig) -> PromotedDiff:
    from finetune_trainer.weight_diff.promoted import make_promoted_diff

    with ProgressBar("subtracting", None, "B") as bar:
        return make_promoted_diff(settings, bar.advance)


def _read_plain(args: argparse.Namespace) -> tuple[RunConfig, Workspace, pathlib.Path]:
    if not args.destination:
        raise TrainerError(
            Reason.INVALID_CONFIG, ExitCode.USAGE, "--model without --destination", "Add --destination URL."
        )
    folder = args.model.resolve()
    promotion = PromotionConfig(destinations=(Destination(args.destination),), digest=folder.name)
    settings = RunConfig(Source(str(folder)), DatasetConfig(()), promotion=promotion)
    return settings, Workspace(folder.parent), folder


def _publish_everywhere(
    settings: RunConfig, workspace: Workspace, folder: pathlib.Path, diff: PromotedDiff | None
) -> list[str]:
    """Copy the model, and the diff beside it, to each destination; return the models' URLs."""
    from finetune_trainer.storage import Access
    from finetune_trainer.storage.publish import WEIGHT_DIFF, list_model_files, publish_folder

    promotion = settings.promotion
    parts = {"": list_model_files(folder)}
    if diff is not None and promotion.destinations:
        parts[WEIGHT_DIFF] = list_model_files(diff.folder)
    total = max(sum(file.size for files in parts.values() for file in files) * len(promotion.destinations), 1)
    urls, done = [], 0
    with ProgressReporter() as reporter, ProgressBar("publishing", total, "B") as bar:

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            bar.advance(amount)
            reporter.update(100 * done / total)

        for index, destination in enumerate(promotion.destinations):
            field = f"spec.promotion.destinations[{index}]"
            access = Access(field, "destination", destination.secret_prefix, "destination")
            found = [
                publish_folder(
                    destination.destination,
                    promotion.digest,
                    files,
                    access,
                    workspace_root=workspace.root,
                    advance=advance,
                    part=part,
                )
                for part, files in parts.items()
            ]
            urls.append(found[0])
        reporter.update(100, urgent=True)
    return urls
