"""`publish`: copy the promoted model, or its adapter, to every destination of the job, or one folder to one place."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, ExitReport, Phase, Reason
from finetune_contract.run_config import (
    CONTENTS,
    DatasetConfig,
    ModelDestination,
    PromotionConfig,
    RunConfig,
    Source,
)
from finetune_contract.workspace import Workspace
from finetune_trainer.commands.common import add_run_config_argument, apply_workspace_lock, load_run_config
from finetune_trainer.errors import TrainerError
from finetune_trainer.report.write import write_run_report
from finetune_trainer.reporting import ProgressBar, ProgressReporter, write_exit_report

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from finetune_trainer.storage.publish import Advance, LocalFile
    from finetune_trainer.weight_diff.promoted import PromotedDiff


@dataclasses.dataclass(frozen=True)
class _Copy:
    """One folder that a destination gets."""

    digest: str
    files: tuple[LocalFile, ...]
    part: str = ""
    """What it is beside a model; empty: it is what was asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_run_config_argument(parser)
    plain = parser.add_argument_group("without a cluster", "Copy one folder to one place.")
    plain.add_argument(
        "--model", metavar="DIR", type=pathlib.Path, help="folder of the promoted model, named by digest"
    )
    plain.add_argument("--destination", metavar="URL", help="s3:// or hf:// URL, or a folder")
    plain.add_argument(
        "--content", choices=CONTENTS, default="Model", help="the model, or its LoRA adapter alone (default: Model)"
    )


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
    promotion = PromotionConfig(
        destinations=(ModelDestination(args.destination, content=args.content),), digest=folder.name
    )
    settings = RunConfig(Source(str(folder)), DatasetConfig(()), promotion=promotion)
    return settings, Workspace(folder.parent), folder


def _publish_everywhere(
    settings: RunConfig, workspace: Workspace, folder: pathlib.Path, diff: PromotedDiff | None
) -> list[str]:
    """Copy to each destination what it is to hold; return the URLs, of model and diff the model's."""
    destinations, urls, done = settings.promotion.destinations, [], 0
    with tempfile.TemporaryDirectory(prefix="adapter-") as beside:
        copies = _list_copies(settings, folder, diff, pathlib.Path(beside))
        listed = [copies[each.content] for each in destinations]
        total = max(sum(file.size for group in listed for copy in group for file in copy.files), 1)
        with ProgressReporter() as reporter, ProgressBar("publishing", total, "B") as bar:

            def advance(amount: int) -> None:
                nonlocal done
                done += amount
                bar.advance(amount)
                reporter.update(100 * done / total)

            for index, group in enumerate(listed):
                found = [_publish(settings, index, copy, workspace.root, advance) for copy in group]
                urls.append(found[0])
            reporter.update(100, urgent=True)
    return urls


def _list_copies(
    settings: RunConfig, folder: pathlib.Path, diff: PromotedDiff | None, beside: pathlib.Path
) -> Mapping[str, list[_Copy]]:
    """Return by content what is copied where that is asked for; only what is asked for anywhere is read."""
    from finetune_trainer.promotion.adapter import list_adapter_files
    from finetune_trainer.storage.publish import WEIGHT_DIFF, list_model_files

    wanted = [each.content for each in settings.promotion.destinations]
    copies: dict[str, list[_Copy]] = {}
    # First: what it refuses is known before a large model is read.
    if "Adapter" in wanted:
        copies["Adapter"] = [_Copy(*list_adapter_files(folder, beside, _name_field(wanted.index("Adapter"))))]
    if "Model" in wanted:
        digest = settings.promotion.digest
        copies["Model"] = [_Copy(digest, list_model_files(folder))]
        if diff is not None:
            copies["Model"].append(_Copy(digest, list_model_files(diff.folder), WEIGHT_DIFF))
    return copies


def _name_field(index: int) -> str:
    return f"spec.promotion.destinations[{index}]"


def _publish(settings: RunConfig, index: int, copy: _Copy, root: pathlib.Path, advance: Advance) -> str:
    from finetune_trainer.storage import Access
    from finetune_trainer.storage.publish import publish_folder

    destination = settings.promotion.destinations[index]
    access = Access(_name_field(index), "destination", destination.secret_prefix, "destination")
    return publish_folder(
        destination.destination,
        copy.digest,
        copy.files,
        access,
        workspace_root=root,
        advance=advance,
        part=copy.part,
    )
