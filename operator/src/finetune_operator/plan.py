"""Every decision about a job, made once per pass from what the user asked and what the administrators allow.

`make_plan` is called by `reconcile`; everything below it (manifests, lifecycle, status) reads the plan and never the
spec. What a job *is* comes from the frozen plan as soon as there is one, so that an operator of the next release, with
other defaults, carries on a running job as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from finetune_contract.parsing import RunConfigError
from finetune_contract.reports import Phase
from finetune_contract.run_config import IDENTITY_TRAINING, RunConfig, ServingConfig, Source

from . import naming
from .api.v1alpha1 import Autoscaling, FailureRule, FineTuneJob, FineTuneJobSpec
from .conditions import Reason
from .errors import InvalidJobError
from .pods import PodPlan, resolve_pod
from .runs import resolve_run, resolve_secrets, resolve_serving, resolve_tracking
from .settings import Proxies, Settings
from .sizing import to_number

FROZEN_VERSION = 1
FROZEN_KEY = "plan.json"
"""Key in the data of ConfigMap `<job>-plan`."""
UNDIGESTED = ("suspend", "ttlSecondsAfterFinished", "inference")
"""Fields of the spec whose change does not take a failed job up again."""


@dataclasses.dataclass(frozen=True)
class WorkspacePlan:
    """The volume."""

    claim: str
    is_existing: bool
    """The job uses a claim that it did not make, and never changes or removes it."""
    size_bytes: int
    """0: computed from what `inspect` finds."""
    size_text: str
    storage_class: str
    access_mode: str
    sub_path: str
    is_deleted_with_job: bool
    is_deleted_when_finished: bool


@dataclasses.dataclass(frozen=True)
class ResourcePlan:
    """What one training pod takes."""

    gpus: int
    gpu_resource: str
    cpu: str
    memory: str
    shared_memory: str
    extended: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class PlacementPlan:
    """Where pods go."""

    preset: str
    zones: tuple[str, ...]
    topology_key: str
    queue_labels: Mapping[str, str]
    """Labels of every child Job; empty without a queue."""


@dataclasses.dataclass(frozen=True)
class AutoscalingPlan:
    """How the number of pods follows the load."""

    least: int
    most: int
    metric: str
    target: int


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """The endpoint."""

    is_enabled: bool
    runtime: str
    replicas: int
    gpus: int
    version: str
    """Digest to serve; empty: the job's own."""
    is_retained: bool
    """The endpoint outlives the job."""
    autoscaling: AutoscalingPlan | None
    """None: there are always `replicas`."""
    api_key_secret: str
    """Secret with the key that requests must carry; empty: none is asked for."""
    config: ServingConfig
    """What its servers are told."""

    @property
    def is_from_copy(self) -> bool:
        """Its servers read the model from object storage, and mount no workspace."""
        return bool(self.config.source)

    @property
    def least_replicas(self) -> int:
        """Pods that are there at the least."""
        return self.autoscaling.least if self.autoscaling else self.replicas


@dataclasses.dataclass(frozen=True)
class FailurePlan:
    """What happens after a failure."""

    max_restarts: int
    progress_deadline_seconds: int
    """0: none."""
    rules: tuple[FailureRule, ...]


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """Times in seconds; 0 or, for the time to live, -1: none."""

    active: int
    startup: int
    time_to_live: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One job, resolved: no defaults are left to whoever reads it."""

    namespace: str
    name: str
    uid: str
    generation: int
    names: naming.Names
    run: RunConfig
    pods: Mapping[Phase, PodPlan]
    env_from: Mapping[Phase, tuple[Mapping[str, Any], ...]]
    """Secrets of each phase, with the prefix of their source."""
    images: Mapping[str, str]
    """trainer and inference, as frozen."""
    workspace: WorkspacePlan
    resources: ResourcePlan
    placement: PlacementPlan
    serving: ServingPlan
    failure: FailurePlan
    deadlines: Deadlines
    is_accumulation_written: bool
    is_suspended: bool
    preparation_resources: Mapping[str, Mapping[str, str]]
    tracking_env: tuple[Mapping[str, Any], ...]
    proxies: Proxies
    ca_bundle: str
    progress_url: str
    unschedulable_seconds: float
    digest: str
    """Of everything in the spec but suspend, time to live and inference."""
    source_digest: str
    """Of what `inspect` reads."""

    @property
    def processes(self) -> int:
        """Training processes over all nodes."""
        return self.run.topology.nodes * self.run.topology.processes_per_node


def make_plan(job: FineTuneJob, settings: Settings, frozen: str = "") -> Plan:
    """Resolve a job. `frozen` is the text of its frozen plan, if it has started. Raises InvalidJobError."""
    spec, meta = job.spec, job.metadata
    kept = _read_frozen(frozen)
    images = kept["images"] if kept else {"trainer": settings.images.trainer, "inference": settings.images.inference}
    run = resolve_run(job, settings)
    if kept:
        run = _keep_identity(run, kept["run"])
    _refuse_what_is_not_allowed(spec, run, settings)
    names = naming.make_names(meta.name, spec.inference.endpoint or "", spec.workspace.existing_claim or "")
    serving = _resolve_serving(spec, names.endpoint)
    return Plan(
        namespace=meta.namespace,
        name=meta.name,
        uid=meta.uid,
        generation=meta.generation,
        names=names,
        # Where servers read the model from is no matter of the other phases, whose pods it must not change.
        run=dataclasses.replace(run, serving=ServingConfig(model_name=names.endpoint)),
        pods=_resolve_pods(spec, settings, images, serving),
        env_from=resolve_secrets(spec),
        images=images,
        workspace=_resolve_workspace(spec, settings, names),
        resources=_resolve_resources(spec, settings),
        placement=_resolve_placement(spec),
        serving=serving,
        failure=FailurePlan(
            spec.failure_policy.max_restarts,
            spec.failure_policy.progress_deadline_seconds or 0,
            tuple(spec.failure_policy.rules),
        ),
        deadlines=_resolve_deadlines(spec),
        is_accumulation_written=spec.training.gradient_accumulation_steps is not None,
        is_suspended=spec.suspend,
        preparation_resources=settings.defaults.preparation_resources,
        tracking_env=resolve_tracking(spec),
        proxies=settings.proxies,
        ca_bundle=settings.ca_bundle,
        progress_url=settings.progress.url,
        unschedulable_seconds=settings.unschedulable_seconds,
        digest=_digest_spec(spec),
        source_digest=naming.short_digest(_list_sources(spec).__repr__()),
    )


def _list_sources(spec: FineTuneJobSpec) -> list[dict[str, Any]]:
    return [spec.model.to_dict(), spec.dataset.to_dict(), *(each.to_dict() for each in spec.evaluation.models)]


def freeze(plan: Plan, version: str) -> str:
    """Return what is kept of a plan for the whole life of its job, as the text of its ConfigMap."""
    data = {"version": FROZEN_VERSION, "operator": version, "images": dict(plan.images)}
    return json.dumps({**data, "run": json.loads(plan.run.to_json())}, sort_keys=True, indent=1)


@functools.lru_cache(maxsize=256)
def _read_frozen(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        data = json.loads(text)
        return {"images": data["images"], "run": RunConfig.from_json(json.dumps(data["run"]))}
    except (ValueError, KeyError, TypeError, RunConfigError) as error:
        raise InvalidJobError(
            f"the frozen plan of this job cannot be read ({error}): it was made by another release of the operator, "
            "install that release again or delete and apply the job",
            reason=Reason.PLAN_UNREADABLE,
        ) from error


def _keep_identity(run: RunConfig, frozen: RunConfig) -> RunConfig:
    kept = {name: getattr(frozen.training, name) for name in (*IDENTITY_TRAINING, "logging_steps")}
    training = dataclasses.replace(run.training, **kept)
    dataset = dataclasses.replace(
        frozen.dataset,
        sources=tuple(_renew_secret(old, run.dataset.sources) for old in frozen.dataset.sources),
        judge=dataclasses.replace(frozen.dataset.judge, secret_prefix=run.dataset.judge.secret_prefix),
    )
    model = dataclasses.replace(frozen.model, secret_prefix=run.model.secret_prefix)
    return dataclasses.replace(
        run, model=model, dataset=dataset, training=training, trust_remote_code=frozen.trust_remote_code
    )


def _renew_secret(old: Source, sources: tuple[Source, ...]) -> Source:
    """Take the place of a source's credentials from the spec of today."""
    for source in sources:
        if source.source == old.source:
            return dataclasses.replace(old, secret_prefix=source.secret_prefix)
    return old


def _resolve_serving(spec: FineTuneJobSpec, endpoint: str) -> ServingPlan:
    inference = spec.inference
    has_gpus = spec.resources.gpus_per_node > 0
    runtime = inference.runtime or ("vllm" if (inference.gpus_per_replica or has_gpus) else "transformers")
    gpus = inference.gpus_per_replica
    return ServingPlan(
        is_enabled=inference.enabled,
        runtime=runtime,
        replicas=inference.replicas,
        gpus=gpus if gpus is not None else int(runtime == "vllm"),
        version=inference.version or "",
        is_retained=inference.on_delete == "Retain",
        autoscaling=_resolve_autoscaling(inference.autoscaling, runtime),
        api_key_secret=inference.api_key_secret_ref.name if inference.api_key_secret_ref else "",
        config=resolve_serving(spec, endpoint),
    )


def _resolve_autoscaling(written: Autoscaling | None, runtime: str) -> AutoscalingPlan | None:
    if written is None:
        return None
    metric = written.metric or ("vllm:num_requests_waiting" if runtime == "vllm" else "cpu")
    target = written.target or (80 if metric in ("cpu", "memory") else 5)
    return AutoscalingPlan(written.min_replicas, written.max_replicas, metric, target)


def _resolve_pods(
    spec: FineTuneJobSpec, settings: Settings, images: Mapping[str, str], serving: ServingPlan
) -> dict[Phase, PodPlan]:
    own = {
        Phase.INSPECT: spec.prepare.pod,
        Phase.PREPARE: spec.prepare.pod,
        Phase.TRAIN: spec.training.pod,
        Phase.EVALUATE: spec.evaluation.pod,
        Phase.COMPOSE: spec.evaluation.pod,
        Phase.SERVE: spec.inference.pod,
    }
    result = {}
    for phase in Phase:
        is_vllm = phase is Phase.SERVE and serving.runtime == "vllm"
        # One image in spec.pod stands for the trainer program; vLLM is another program.
        general = spec.pod.model_copy(update={"image": None}) if is_vllm and spec.pod else spec.pod
        image = images["inference" if is_vllm else "trainer"]
        result[phase] = resolve_pod(image, (general, own.get(phase)), settings)
    return result


def _resolve_workspace(spec: FineTuneJobSpec, settings: Settings, names: naming.Names) -> WorkspacePlan:
    workspace = spec.workspace
    is_existing = workspace.existing_claim is not None
    mode = workspace.access_mode or ("ReadWriteOnce" if spec.resources.nodes == 1 else "ReadWriteMany")
    return WorkspacePlan(
        claim=names.claim,
        is_existing=is_existing,
        size_bytes=0 if workspace.size == "auto" else int(to_number(workspace.size)),
        size_text=workspace.size,
        storage_class=workspace.storage_class_name or settings.defaults.storage_class_name,
        access_mode=mode,
        sub_path=workspace.sub_path or (names.job if is_existing else ""),
        is_deleted_with_job=workspace.retention_policy.when_deleted == "Delete",
        is_deleted_when_finished=workspace.retention_policy.when_finished == "Delete",
    )


def _resolve_resources(spec: FineTuneJobSpec, settings: Settings) -> ResourcePlan:
    resources = spec.resources

    def text(value: int | str | None) -> str:
        return "" if value is None else str(value)

    return ResourcePlan(
        gpus=resources.gpus_per_node,
        gpu_resource=resources.gpu_resource_name or settings.defaults.gpu_resource_name,
        cpu=text(resources.cpu),
        memory=text(resources.memory),
        shared_memory=text(resources.shared_memory),
        extended={name: str(value) for name, value in resources.extended.items()},
    )


def _resolve_placement(spec: FineTuneJobSpec) -> PlacementPlan:
    placement = spec.placement
    labels = {}
    if placement.queue_name:
        labels[naming.LABEL_QUEUE] = placement.queue_name
        if placement.workload_priority_class_name:
            labels[naming.LABEL_PRIORITY_CLASS] = placement.workload_priority_class_name
    return PlacementPlan(
        preset=placement.preset or "",
        zones=tuple(placement.zones),
        topology_key=placement.topology_key or "",
        queue_labels=labels,
    )


def _resolve_deadlines(spec: FineTuneJobSpec) -> Deadlines:
    ttl = spec.ttl_seconds_after_finished
    return Deadlines(
        active=spec.active_deadline_seconds or 0,
        startup=spec.startup_deadline_seconds or 0,
        time_to_live=-1 if ttl is None else ttl,
    )


def _refuse_what_is_not_allowed(spec: FineTuneJobSpec, run: RunConfig, settings: Settings) -> None:
    limits, topology = settings.limits, run.topology
    urls = [("model.source", run.model.source)]
    urls += [("dataset.source", each.source) for each in run.dataset.sources]
    if run.dataset.judge.source:
        urls.append(("dataset.judge.source", run.dataset.judge.source))
    urls += [(f"evaluation.models[{index}].source", each.source) for index, each in enumerate(run.evaluation.models)]
    urls += [("evaluation.tasks", task) for task in run.evaluation.tasks if task.startswith(("s3://", "pvc://"))]
    urls += [("promotion.destinations", each.destination) for each in run.promotion.destinations]
    urls += [(f"inference.adapters[{at}].source", each.source) for at, each in enumerate(run.composition.adapters)]
    if run.checkpoint.mirror.destination:
        urls.append(("checkpoint.mirror.destination", run.checkpoint.mirror.destination))
    for field, url in urls:
        scheme = url.partition("://")[0]
        if scheme not in limits.allowed_schemes:
            allowed = ", ".join(f"{each}://" for each in limits.allowed_schemes)
            raise InvalidJobError(
                f"{field}: {scheme}:// is not allowed by the administrators: use {allowed}", Reason.NOT_ALLOWED
            )
        is_input = not field.startswith(("promotion.", "inference.", "evaluation.tasks"))
        if scheme == "pvc" and is_input and spec.workspace.existing_claim is None:
            raise InvalidJobError(
                f"{field}: {url} lies on a workspace that is yet to be made: name the claim that holds it in "
                "workspace.existingClaim"
            )
    if limits.max_nodes and topology.nodes > limits.max_nodes:
        raise InvalidJobError(
            f"resources.nodes: {topology.nodes} is more than the administrators allow: ask for at most "
            f"{limits.max_nodes}",
            Reason.NOT_ALLOWED,
        )
    gpus = topology.nodes * topology.gpus_per_node
    if limits.max_gpus and gpus > limits.max_gpus:
        raise InvalidJobError(
            f"resources.gpusPerNode: {gpus} GPUs over all nodes are more than the administrators allow: ask for at "
            f"most {limits.max_gpus}",
            Reason.NOT_ALLOWED,
        )


def _digest_spec(spec: FineTuneJobSpec) -> str:
    data = {name: value for name, value in spec.to_dict().items() if name not in UNDIGESTED}
    return naming.short_digest(json.dumps(data, sort_keys=True))
