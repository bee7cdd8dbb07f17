"""The story of a job's composition: fetch the adapters, check them against the model, compose, measure.

The base of a full fine-tune's adapters is the promoted model. A LoRA job's own adapter is the first part of its
composition, over the base model that it was trained on; unless the other adapters were trained on its promoted model,
in which the own one is merged already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.workspace import Workspace
from finetune_trainer.adapters.base import find_adapter_base, read_model_base
from finetune_trainer.adapters.compose import Part, Settings
from finetune_trainer.adapters.composition import PROFILE, check_base, make_profile, write_composition
from finetune_trainer.adapters.folder import read_adapter
from finetune_trainer.adapters.profile import COMPOSITION, Profile, check_settings, read_profile
from finetune_trainer.adapters.sources import fetch_adapter
from finetune_trainer.errors import TrainerError
from finetune_trainer.evaluation.evaluate import read_holdout
from finetune_trainer.evaluation.task_files import fetch_tasks
from finetune_trainer.promotion import promoted
from finetune_trainer.promotion.promoted import ADAPTER, find_promoted
from finetune_trainer.reporting import emit, write_json
from finetune_trainer.storage import Access
from finetune_trainer.training import modeling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune_contract.run_config import AdapterConfig, RunConfig
    from finetune_trainer.adapters.measure import Measurement

FIELD = "spec.inference"
OWN = "own"
"""What a LoRA job's own adapter is called in its composition."""


@dataclasses.dataclass(frozen=True)
class Composed:
    """A composition that may be served."""

    profile: Profile
    folder: pathlib.Path
    model: pathlib.Path
    """Folder of the model that it is served over."""
    rank: int
    largest_error: float
    measurement: Measurement


def compose_for_job(run: RunConfig) -> Composed:
    """Compose and measure what `run.composition` names. Raises TrainerError naming the entry that cannot be used."""
    from finetune_trainer.adapters import measure as measuring

    workspace = Workspace(pathlib.Path(run.workspace))
    settings = _read_settings(run)
    model_folder = find_promoted(run)
    downloads = workspace.adapters / ".downloads"
    try:
        parts = [_fetch(index, entry, workspace, downloads) for index, entry in enumerate(run.composition.adapters)]
        names = [entry.name for entry in run.composition.adapters]
        model = _choose_model(run, model_folder, parts)
        if model != model_folder:
            own = read_adapter(model_folder / ADAPTER, f"the adapter of job {run.job.name or 'this workspace'}")
            parts, names = [Part(own, 1.0), *parts], [OWN, *names]
        profile = _name_sources(run, make_profile(parts, settings, names, read_model_base(model).digests[0]))
        check_base(parts, profile, model)
        folder, results = _write(workspace, profile, parts)
        sides = measuring.load_sides(model, folder, profile, parts, trust=run.trust_remote_code)
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    tokenizer = modeling.load_tokenizer(model_folder, run.trust_remote_code)
    scored = fetch_tasks(run.evaluation.tasks, run.evaluation.tasks_secret_prefix, workspace.root)
    tasks = measuring.Tasks(scored, run.evaluation.limit, workspace.root)
    template, limit = run.dataset.prompt_template, run.evaluation.limit
    questions = measuring.Questions(template, limit) if run.evaluation.refusals else None
    measurement = measuring.measure(sides, tokenizer, _read_rows(run), tasks, questions)
    write_json(folder / measuring.NAME, measurement.to_dict(profile, results["digest"]))
    return Composed(profile, folder, model, results["rank"], results["largestError"], measurement)


def _read_settings(run: RunConfig) -> Settings:
    wanted = run.composition
    settings = Settings(wanted.method, wanted.rank, wanted.density, wanted.seed)
    check_settings(settings, f"{FIELD}.composition.")
    if not wanted.adapters:
        message = f"{FIELD}.adapters: there are none to compose"
        raise TrainerError(Reason.INVALID_CONFIG, ExitCode.USAGE, message, "Name at least one.")
    return settings


def _fetch(index: int, entry: AdapterConfig, workspace: Workspace, downloads: pathlib.Path) -> Part:
    access = Access(f"{FIELD}.adapters[{index}]", "model", entry.secret_prefix)
    mark = hashlib.sha256(f"{entry.source} {entry.revision}".encode()).hexdigest()[:12]
    folder = fetch_adapter(entry.source, entry.revision, access, downloads / f"{index}-{mark}", workspace.root)
    return Part(read_adapter(folder, f"{access.field} ({entry.name})"), entry.weight)


def _choose_model(run: RunConfig, promoted_folder: pathlib.Path, parts: Sequence[Part]) -> pathlib.Path:
    """Return the model that the adapters go onto: the promoted one, or the base of a LoRA job's own adapter."""
    if not (promoted_folder / ADAPTER).is_dir():
        return promoted_folder
    promoted_digests = set(read_model_base(promoted_folder).digests)
    if all(promoted_digests & set(part.adapter.base.digests) for part in parts):
        return promoted_folder
    base = modeling.find_base_model(run)
    trained_on = find_adapter_base(promoted_folder / ADAPTER, {})
    if trained_on.differs_from(read_model_base(base)):
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"{base} is not the model that the promoted adapter was trained on ({trained_on.label})",
            f"Bring it back, or train the adapters of {FIELD}.adapters on the promoted model.",
        )
    return base


def _name_sources(run: RunConfig, profile: Profile) -> Profile:
    """Give the entries the sources that the job names, instead of where they were fetched to."""
    wanted = [(entry.name, entry.source, entry.revision) for entry in run.composition.adapters]
    own = [("", f"pvc://output/{run.promotion.digest}", "")] * (len(profile.entries) - len(wanted))
    entries = [
        dataclasses.replace(entry, name=name or entry.name, source=source, revision=revision)
        for entry, (name, source, revision) in zip(profile.entries, [*own, *wanted], strict=True)
    ]
    return dataclasses.replace(profile, entries=tuple(entries))


def _write(workspace: Workspace, profile: Profile, parts: Sequence[Part]) -> tuple[pathlib.Path, dict[str, Any]]:
    """Return the folder of the composition and its results; one that is there and whole is used again."""
    folder = workspace.composed_adapter(profile.digest)
    if folder.exists():
        _, results = read_profile(folder / PROFILE)
        if results.get("digest") == read_adapter(folder).digest:
            emit("the composition is in place", digest=profile.digest)
            return folder, results
        shutil.rmtree(folder)
    workspace.adapters.mkdir(parents=True, exist_ok=True)
    results = write_composition(folder, profile, parts)[COMPOSITION]
    return folder, results


def _read_rows(run: RunConfig) -> Any:
    if run.evaluation.holdout and run.dataset.holdout_fraction > 0:
        return read_holdout(run)
    if run.evaluation.tasks or run.evaluation.refusals:
        return None
    raise TrainerError(
        Reason.INVALID_CONFIG,
        ExitCode.CONFIG,
        f"{FIELD}.adapters: there is nothing to measure the composition on",
        "Set spec.evaluation.holdout: true with a spec.dataset.holdoutFraction above 0, or name spec.evaluation.tasks.",
    )


def find_served(run: RunConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the folders of the composed adapter that the settings name, the model's first. Raises TrainerError."""
    promoted_folder = find_promoted(run)
    folder = Workspace(pathlib.Path(run.workspace)).composed_adapter(run.composition.digest)
    profile, results = read_profile(folder / PROFILE)
    if results.get("digest") != read_adapter(folder, str(folder)).digest or profile.digest != run.composition.digest:
        raise TrainerError(
            Reason.MODEL_INVALID,
            ExitCode.NO_INPUT,
            f"{folder} does not hold the adapter that its {PROFILE} names",
            "Remove the folder; the composition is then made again.",
        )
    for model in (promoted_folder, modeling.find_base_model(run) if _has_own(promoted_folder) else promoted_folder):
        if profile.base in read_model_base(model).digests:
            return model, folder
    raise TrainerError(
        Reason.MODEL_INVALID,
        ExitCode.NO_INPUT,
        f"{folder}: its base {profile.base} is not {promoted.read_manifest(promoted_folder)['digest']}",
        f"Write the version of {FIELD}.version as status.serving shows it.",
    )


def _has_own(promoted_folder: pathlib.Path) -> bool:
    return (promoted_folder / ADAPTER).is_dir()
