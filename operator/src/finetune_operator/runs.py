"""The run configuration and the credentials that follow from a job's spec, before anything has run.

Pure; used by `plan` only. Every default is resolved here, so that no pod has to guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_contract.gates import MAX, MAX_REGRESSION, MIN, GateConfig
from finetune_contract.reports import Phase
from finetune_contract.run_config import (
    AdapterConfig,
    CheckpointConfig,
    CompositionConfig,
    DatasetConfig,
    Destination,
    EvaluationConfig,
    FilterActions,
    FilterConfig,
    JobIdentity,
    JudgeConfig,
    ModelDestination,
    NamedModel,
    PromotionConfig,
    QualityConfig,
    RunConfig,
    ServingConfig,
    Source,
    Topology,
)

from . import recipes
from .api.adapters import Composition
from .api.inputs import DatasetFilter, DatasetJudge
from .api.outputs import Evaluation, Gate, Inference
from .api.v1alpha1 import FineTuneJob, FineTuneJobSpec, find_copy_to_serve
from .settings import Settings


def resolve_run(job: FineTuneJob, settings: Settings) -> RunConfig:
    spec, meta = job.spec, job.metadata
    gpus = spec.resources.gpus_per_node
    return RunConfig(
        model=Source(spec.model.source, spec.model.revision or "", secret_prefix=_prefix(spec.model, "MODEL")),
        dataset=_resolve_dataset(spec),
        job=JobIdentity(meta.namespace, meta.name, meta.uid),
        trust_remote_code=settings.limits.trust_remote_code,
        training=recipes.resolve_training(spec.training),
        topology=Topology(
            nodes=spec.resources.nodes,
            gpus_per_node=gpus,
            processes_per_node=spec.resources.processes_per_node or max(1, gpus),
        ),
        progress_deadline_seconds=spec.failure_policy.progress_deadline_seconds or 0,
        checkpoint=_resolve_checkpoint(spec),
        evaluation=_resolve_evaluation(spec.evaluation),
        promotion=PromotionConfig(
            select="best" if spec.checkpoint.retention.best.count else "last",
            destinations=tuple(
                ModelDestination(each.destination, _prefix(each, f"DESTINATION_{index}"), each.content)
                for index, each in enumerate(spec.promotion.destinations)
            ),
            weight_diff=spec.promotion.weight_diff.enabled,
        ),
        composition=_resolve_composition(spec.inference),
    )


def _resolve_evaluation(evaluation: Evaluation) -> EvaluationConfig:
    models = (
        NamedModel(each.name, each.source, each.revision or "", _prefix(each, f"EVALUATION_{index}"))
        for index, each in enumerate(evaluation.models)
    )
    return EvaluationConfig(
        evaluation.holdout,
        evaluation.baseline,
        tuple(evaluation.tasks),
        evaluation.limit or 0,
        evaluation.refusals,
        tuple(models),
        _prefix(evaluation, "TASKS"),
        tuple(_resolve_gate(gate) for gate in evaluation.gates),
    )


def _resolve_gate(gate: Gate) -> GateConfig:
    bounds = {MIN: gate.min, MAX: gate.max, MAX_REGRESSION: gate.max_regression}
    bound, threshold = next((bound, number) for bound, number in bounds.items() if number is not None)
    return GateConfig(gate.task, gate.metric, bound, float(threshold))


def _resolve_dataset(spec: FineTuneJobSpec) -> DatasetConfig:
    dataset = spec.dataset
    if dataset.source is not None:
        sources: tuple[Source, ...] = (
            Source(dataset.source, dataset.revision or "", dataset.format, 1.0, _prefix(dataset, "DATASET_0")),
        )
    else:
        sources = tuple(
            Source(
                each.source,
                each.revision or "",
                each.format or dataset.format,
                float(each.weight),
                _prefix(each, f"DATASET_{index}"),
            )
            for index, each in enumerate(dataset.sources)
        )
    return DatasetConfig(
        sources=sources,
        fields=dataset.fields.to_dict() if dataset.fields else {},
        prompt_template=dataset.prompt_template or recipes.PROMPTS[spec.training.recipe],
        filter=_resolve_filter(dataset.filter),
        quality=_resolve_quality(spec),
        judge=_resolve_judge(dataset.judge),
        holdout_fraction=float(dataset.holdout_fraction),
        max_bad_rows=dataset.max_bad_rows,
        seed=dataset.seed,
    )


def _resolve_filter(rules: DatasetFilter) -> FilterConfig:
    return FilterConfig(
        rules.refusals,
        rules.rules,
        tuple(rules.extra_phrases),
        tuple(rules.fields),
        rules.language or "",
        FilterActions(**rules.actions.model_dump()) if rules.actions else FilterActions(),
    )


def _resolve_quality(spec: FineTuneJobSpec) -> QualityConfig:
    quality = spec.dataset.quality
    if quality is None:
        return QualityConfig()
    settings: dict[str, Any] = {
        name: getattr(quality, name) or "" for name in ("truncated", "repetition", "html", "special_tokens")
    }
    if quality.language:
        settings |= {"language": quality.language.action, "languages": tuple(quality.language.expected)}
    if quality.pii:
        settings |= {"pii": quality.pii.action, "pii_kinds": tuple(quality.pii.kinds)}
    if quality.duplicates:
        settings |= {"duplicates": quality.duplicates.action, "similarity": float(quality.duplicates.similarity)}
    if quality.contamination:
        settings |= {
            "contamination": quality.contamination.action,
            "contamination_words": quality.contamination.words,
            "contamination_tasks": tuple(spec.evaluation.tasks),
        }
    return QualityConfig(**settings)


def _resolve_judge(judge: DatasetJudge | None) -> JudgeConfig:
    if judge is None:
        return JudgeConfig()
    return JudgeConfig(
        judge.source,
        judge.revision or "",
        _prefix(judge, "JUDGE"),
        tuple(judge.labels),
        float(judge.threshold),
        float(judge.audit_fraction),
        judge.text,
        rows=judge.rows,
    )


def _prefix(owner: Any, name: str) -> str:
    """Return the prefix of the owner's credential variables; empty when the pod's identity is used."""
    return f"FINETUNE_{name}_" if owner.secret_ref is not None else ""


def _resolve_composition(inference: Inference) -> CompositionConfig:
    how = inference.composition or Composition()
    adapters = tuple(
        AdapterConfig(
            each.name, each.source, each.revision or "", float(each.weight), _prefix(each, f"ADAPTER_{index}")
        )
        for index, each in enumerate(inference.adapters)
    )
    return CompositionConfig(adapters, how.method, how.rank or 0, float(how.density), how.seed)


def _resolve_checkpoint(spec: FineTuneJobSpec) -> CheckpointConfig:
    checkpoint = spec.checkpoint
    best = checkpoint.retention.best
    steps = 0 if checkpoint.every_minutes else recipes.SAVE_STEPS
    return CheckpointConfig(
        every_steps=checkpoint.every_steps or steps,
        every_minutes=checkpoint.every_minutes or 0,
        keep_latest=checkpoint.retention.latest,
        keep_best=best.count,
        best_metric=best.metric,
        best_mode=best.mode,
        resume=checkpoint.resume,
        mirror=_resolve_mirror(spec),
    )


def _resolve_mirror(spec: FineTuneJobSpec) -> Destination:
    mirror = spec.checkpoint.mirror
    return Destination(mirror.destination, _prefix(mirror, "MIRROR")) if mirror else Destination("")


def resolve_secrets(spec: FineTuneJobSpec) -> dict[Phase, tuple[Mapping[str, Any], ...]]:
    def entry(owner: Any, name: str) -> tuple[dict[str, Any], ...]:
        if owner.secret_ref is None:
            return ()
        return ({"prefix": f"FINETUNE_{name}_", "secretRef": {"name": owner.secret_ref.name}},)

    model = entry(spec.model, "MODEL")
    if spec.dataset.source is not None:
        inputs = (*model, *entry(spec.dataset, "DATASET_0"))
    else:
        each = (entry(source, f"DATASET_{index}") for index, source in enumerate(spec.dataset.sources))
        inputs = (*model, *(found for group in each for found in group))
    judge = entry(spec.dataset.judge, "JUDGE") if spec.dataset.judge else ()
    models = (entry(each, f"EVALUATION_{index}") for index, each in enumerate(spec.evaluation.models))
    evaluated = tuple(found for group in models for found in group)
    tasks = entry(spec.evaluation, "TASKS")
    destinations = [entry(each, f"DESTINATION_{index}") for index, each in enumerate(spec.promotion.destinations)]
    served = find_copy_to_serve(spec)
    adapters = (entry(each, f"ADAPTER_{index}") for index, each in enumerate(spec.inference.adapters))
    mirror = entry(spec.checkpoint.mirror, "MIRROR") if spec.checkpoint.mirror else ()
    tracking = spec.training.tracking
    trackers = [tracking.wandb, tracking.mlflow] if tracking else []
    plain = tuple(
        {"secretRef": {"name": tracker.secret_ref.name}} for tracker in trackers if tracker and tracker.secret_ref
    )
    return {
        Phase.INSPECT: (*inputs, *judge, *evaluated),
        Phase.PREPARE: (*inputs, *judge, *tasks),
        Phase.TRAIN: (*mirror, *plain),
        Phase.PROMOTE: (),
        Phase.EVALUATE: (*model, *evaluated, *tasks),
        Phase.PUBLISH: tuple(found for group in destinations for found in group),
        Phase.COMPOSE: (*(found for group in adapters for found in group), *tasks),
        Phase.SERVE: () if served is None else destinations[served],
    }


def resolve_serving(spec: FineTuneJobSpec, name: str) -> ServingConfig:
    """Return what servers are told: the model's name, and where it is, if that is not the workspace."""
    index = find_copy_to_serve(spec)
    if index is None:
        return ServingConfig(model_name=name)
    copy = spec.promotion.destinations[index]
    return ServingConfig(
        model_name=name,
        source=copy.destination.rstrip("/"),
        source_field=f"spec.promotion.destinations[{index}]",
        secret_prefix=_prefix(copy, f"DESTINATION_{index}"),
    )


def resolve_tracking(spec: FineTuneJobSpec) -> tuple[Mapping[str, Any], ...]:
    tracking = spec.training.tracking
    if tracking is None:
        return ()
    values: dict[str, str | None] = {}
    if tracking.wandb:
        values |= {"WANDB_PROJECT": tracking.wandb.project, "WANDB_ENTITY": tracking.wandb.entity}
    if tracking.mlflow:
        values |= {
            "MLFLOW_TRACKING_URI": tracking.mlflow.tracking_uri,
            "MLFLOW_EXPERIMENT_NAME": tracking.mlflow.experiment,
        }
    return tuple({"name": name, "value": value} for name, value in values.items() if value)
