"""What a job and the administrators' settings resolve to."""

from __future__ import annotations

import dataclasses
import json

import pytest

from finetune_contract.reports import Phase
from finetune_contract.run_config import Destination, RunConfig
from finetune_operator.errors import InvalidJobError
from finetune_operator.manifests.run_config import build_run_config, count_global_batch
from finetune_operator.plan import freeze, make_plan
from tests.support.operator_parts import make_fine_tune_job, make_record, make_settings, make_test_plan


def test_the_recipe_of_origin_is_what_wizardlm_was_trained_with():
    training = make_test_plan(training={"recipe": "wizardlm-freeform"}, resources={"gpusPerNode": 4}).run.training
    assert dataclasses.asdict(training) | {"seed": 42} == {
        "recipe": "wizardlm-freeform",
        "method": "full",
        "epochs": 3.0,
        "max_steps": 0,
        "max_length": 2048,
        "per_device_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-5,
        "warmup_steps": 2,
        "scheduler": "cosine",
        "precision": "fp16",
        "gradient_checkpointing": True,
        "packing": False,
        "seed": 42,
        "logging_steps": 2,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_target_modules": (),
        "lora_quantization": "",
        "zero_stage": 3,
        "offload": "none",
        "deepspeed_config": {},
        "tracking": (),
    }


def test_the_recipe_of_origin_saves_every_800_steps_keeps_3_and_uses_its_prompt():
    run = make_test_plan(training={"recipe": "wizardlm-freeform"}).run
    assert (run.checkpoint.every_steps, run.checkpoint.keep_latest) == (800, 3)
    assert run.dataset.prompt_template == "wizardlm"


def test_the_efficient_recipe_differs_in_precision_packing_and_prompt():
    run = make_test_plan().run
    assert (run.training.precision, run.training.packing, run.dataset.prompt_template) == ("bf16", True, "alpaca")
    assert (run.training.learning_rate, run.training.epochs) == (2e-5, 3.0)


def test_what_a_user_writes_wins_over_the_recipe():
    training = {"recipe": "wizardlm-freeform", "precision": "bf16", "epochs": 1, "maxLength": 512, "packing": True}
    resolved = make_test_plan(training=training).run.training
    assert (resolved.precision, resolved.epochs, resolved.max_length, resolved.packing) == ("bf16", 1.0, 512, True)


def test_max_steps_replaces_epochs():
    assert (run := make_test_plan(training={"maxSteps": 7}).run.training).max_steps == 7
    assert run.epochs == 0.0


@pytest.mark.parametrize(
    ("tokens", "rows", "accumulation"),
    [(95_000, 950, 1), (1_024_000, 1000, 2), (2_048_000, 1000, 4), (0, 0, 4), (9_000_000, 1000, 4)],
)
def test_packing_keeps_the_real_tokens_per_step(tokens, rows, accumulation):
    record = make_record(Phase.INSPECT).with_phase(Phase.PREPARE, {"tokens": tokens, "rows_kept": rows})
    assert build_run_config(make_test_plan(), record, 1).training.gradient_accumulation_steps == accumulation


def test_an_accumulation_that_is_written_is_left_alone():
    plan = make_test_plan(training={"gradientAccumulationSteps": 16})
    record = make_record(Phase.INSPECT, Phase.PREPARE)
    assert build_run_config(plan, record, 1).training.gradient_accumulation_steps == 16


def test_another_per_device_batch_keeps_the_steps_of_the_first_attempt():
    plan = make_test_plan(training={"perDeviceBatchSize": 2}, resources={"gpusPerNode": 4})
    run = build_run_config(plan, make_record(Phase.INSPECT, Phase.PREPARE, global_batch=64), 2)
    assert run.training.gradient_accumulation_steps == 8
    assert count_global_batch(plan, run) == 64


def test_a_batch_that_cannot_keep_the_steps_is_refused_with_what_to_type():
    plan = make_test_plan(training={"perDeviceBatchSize": 5})
    with pytest.raises(InvalidJobError, match=r"perDeviceBatchSize: 5 on 1 .* 1, 2, 4, 8, 16, 32, 64$") as caught:
        build_run_config(plan, make_record(Phase.INSPECT, global_batch=64), 2)
    assert caught.value.reason == "GlobalBatchNotKept"
    plan = make_test_plan(training={"perDeviceBatchSize": 8}, resources={"gpusPerNode": 3})
    with pytest.raises(InvalidJobError, match=r"resources: 3 processes .* product is one of 1, 2, 4, 8, 16, 32, 64$"):
        build_run_config(plan, make_record(Phase.INSPECT, global_batch=64), 2)
    plan = make_test_plan(training={"perDeviceBatchSize": 8, "gradientAccumulationSteps": 3})
    with pytest.raises(InvalidJobError, match="write 8, or remove it"):
        build_run_config(plan, make_record(Phase.INSPECT, global_batch=64), 2)


@pytest.mark.parametrize(("parameters", "stage"), [(0, 3), (1_000_000, 2), (7_000_000_000, 3)])
def test_zero_stage_auto_takes_the_lowest_that_fits(parameters, stage):
    record = make_record().with_phase(Phase.INSPECT, {"model_parameters": parameters})
    assert build_run_config(make_test_plan(), record, 1).training.zero_stage == stage


def test_hub_revisions_are_pinned_to_what_inspect_saw_and_others_are_not():
    plan = make_test_plan()
    record = make_record().with_phase(Phase.INSPECT, {"model_revision": "4f2a", "dataset_revisions": ["etag"]})
    run = build_run_config(plan, record)
    assert (run.model.revision, run.dataset.sources[0].revision) == ("4f2a", "")


def test_a_frozen_plan_keeps_what_the_job_is_under_an_operator_with_other_defaults():
    old = make_test_plan()
    frozen = freeze(old, "0.1.0")
    newer = make_settings(images={"trainer": "example.org/trainer:2", "inference": "example.org/inference:2"})
    job = make_fine_tune_job(training={"recipe": "wizardlm-freeform", "perDeviceBatchSize": 2})
    plan = make_plan(job, newer, frozen)
    assert plan.images == old.images
    assert plan.run.training.recipe == "efficient"
    assert plan.run.training.precision == "bf16"
    assert plan.run.training.per_device_batch_size == 2
    assert plan.run.dataset == old.run.dataset


def test_a_frozen_plan_of_an_unknown_release_is_refused_not_guessed():
    with pytest.raises(InvalidJobError, match="another release"):
        make_plan(make_fine_tune_job(), make_settings(), '{"images": {}, "run": {"version": 99}}')


def test_the_publishing_pod_learns_what_each_destination_is_to_hold():
    destinations = [{"destination": "s3://a/models"}, {"destination": "s3://a/adapters", "content": "Adapter"}]
    plan = make_test_plan(training={"method": "lora"}, promotion={"destinations": destinations})
    text = build_run_config(plan, make_record()).to_json()
    # Images that know no other content go on with what they know.
    assert ["content" in each for each in json.loads(text)["promotion"]["destinations"]] == [False, True]
    assert [each.content for each in RunConfig.from_json(text).promotion.destinations] == ["Model", "Adapter"]


def test_secrets_are_read_by_the_phases_that_need_them_under_the_prefix_of_their_source():
    plan = make_test_plan(
        model={"source": "hf://a/b", "secretRef": {"name": "hub"}},
        dataset={
            "sources": [
                {"source": "s3://a/1", "secretRef": {"name": "one"}},
                {"source": "s3://a/2"},
                {"source": "s3://a/3", "secretRef": {"name": "three"}},
            ],
            "judge": {"source": "hf://a/judge", "secretRef": {"name": "judge"}, "labels": ["1"], "rows": "all"},
        },
        promotion={"destinations": [{"destination": "s3://out/x", "secretRef": {"name": "out"}}]},
        training={"tracking": {"wandb": {"secretRef": {"name": "wandb"}}}},
        checkpoint={"mirror": {"destination": "s3://mirror/x", "secretRef": {"name": "mirror"}}},
        inference={
            "adapters": [
                {"name": "brief", "source": "s3://a/brief"},
                {"name": "polite", "source": "s3://a/polite", "secretRef": {"name": "polite"}},
            ]
        },
    )
    prefixes = {
        phase: [(each.get("prefix"), each["secretRef"]["name"]) for each in plan.env_from[phase]] for phase in Phase
    }
    inputs = [("FINETUNE_MODEL_", "hub"), ("FINETUNE_DATASET_0_", "one"), ("FINETUNE_DATASET_2_", "three")]
    assert prefixes == {
        Phase.INSPECT: [*inputs, ("FINETUNE_JUDGE_", "judge")],
        Phase.PREPARE: [*inputs, ("FINETUNE_JUDGE_", "judge")],
        Phase.TRAIN: [("FINETUNE_MIRROR_", "mirror"), (None, "wandb")],
        Phase.PROMOTE: [],
        Phase.EVALUATE: inputs[:1],
        Phase.PUBLISH: [("FINETUNE_DESTINATION_0_", "out")],
        Phase.COMPOSE: [("FINETUNE_ADAPTER_1_", "polite")],
        Phase.SERVE: [],
    }
    assert [each.secret_prefix for each in plan.run.dataset.sources] == [
        "FINETUNE_DATASET_0_",
        "",
        "FINETUNE_DATASET_2_",
    ]
    assert plan.run.checkpoint.mirror == Destination("s3://mirror/x", "FINETUNE_MIRROR_")
    judge = plan.run.dataset.judge
    assert (judge.source, judge.secret_prefix, judge.labels) == ("hf://a/judge", "FINETUNE_JUDGE_", ("1",))
    assert judge.rows == "all"


def test_a_judge_comes_from_where_the_administrators_allow_and_from_a_workspace_that_is_there():
    settings = make_settings(limits={"allowed_schemes": ["hf", "pvc"]})
    with pytest.raises(InvalidJobError, match=r"dataset\.judge\.source: s3:// is not allowed"):
        make_plan(make_fine_tune_job(**with_judge("s3://a/judge")), settings)
    with pytest.raises(InvalidJobError, match=r"dataset\.judge\.source: pvc://judge lies on a workspace"):
        make_plan(make_fine_tune_job(**with_judge("pvc://judge")), settings)
    plan = make_plan(make_fine_tune_job(**with_judge("pvc://judge"), workspace={"existingClaim": "shared"}), settings)
    assert plan.run.dataset.judge.source == "pvc://judge"


def with_judge(source: str) -> dict:
    return {"dataset": {"source": "hf://a/rows", "judge": {"source": source}}}


def test_each_phases_pod_is_merged_over_the_general_one():
    plan = make_test_plan(
        pod={
            "labels": {"team": "a", "cost": "1"},
            "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}],
            "tolerations": [{"key": "x", "operator": "Exists"}],
        },
        training={"pod": {"labels": {"cost": "2"}, "env": [{"name": "B", "value": "2"}], "image": "mine:1"}},
    )
    train, prepare = plan.pods[Phase.TRAIN], plan.pods[Phase.PREPARE]
    assert (train.image, prepare.image) == ("mine:1", "example.org/trainer:1")
    assert train.labels == {"team": "a", "cost": "2"}
    assert train.env == ({"name": "A", "value": "1"}, {"name": "B", "value": "2"})
    assert train.tolerations == prepare.tolerations


@pytest.mark.parametrize(
    ("inference", "gpus", "runtime", "image", "per_replica"),
    [
        ({}, 0, "transformers", "example.org/trainer:1", 0),
        ({}, 4, "vllm", "example.org/inference:1", 1),
        ({"runtime": "transformers"}, 4, "transformers", "example.org/trainer:1", 0),
        ({"gpusPerReplica": 2}, 0, "vllm", "example.org/inference:1", 2),
    ],
)
def test_gpus_are_served_by_vllm_and_cpus_by_the_trainer(inference, gpus, runtime, image, per_replica):
    plan = make_test_plan(inference=inference, resources={"gpusPerNode": gpus})
    assert (plan.serving.runtime, plan.pods[Phase.SERVE].image, plan.serving.gpus) == (runtime, image, per_replica)


@pytest.mark.parametrize(
    ("limits", "spec", "field", "advice"),
    [
        ({"allowedSchemes": ["s3"]}, {}, "model.source", "use s3://"),
        (
            {"allowedSchemes": ["hf", "https"]},
            {
                "dataset": {"source": "hf://a/b"},
                "checkpoint": {"mirror": {"destination": "s3://bucket/checkpoints"}},
            },
            "checkpoint.mirror.destination",
            "use hf://, https://",
        ),
        ({"maxNodes": 1}, {"resources": {"nodes": 2}}, "resources.nodes", "at most 1"),
        ({"maxGpus": 4}, {"resources": {"nodes": 2, "gpusPerNode": 4}}, "resources.gpusPerNode", "at most 4"),
        (
            {"allowedServiceAccounts": ["trainer"]},
            {"pod": {"serviceAccountName": "admin"}},
            "pod.serviceAccountName",
            "use trainer",
        ),
    ],
)
def test_what_the_administrators_forbid_is_refused_with_the_field_and_what_to_type(limits, spec, field, advice):
    with pytest.raises(InvalidJobError) as caught:
        make_plan(make_fine_tune_job(**spec), make_settings(limits=limits))
    assert caught.value.reason == "NotAllowed"
    assert caught.value.message.startswith(f"{field}: ")
    assert advice in caught.value.message


def test_remote_code_is_the_administrators_choice_alone():
    assert make_test_plan().run.trust_remote_code is False
    assert make_test_plan(make_settings(limits={"trustRemoteCode": True})).run.trust_remote_code is True


def test_a_workspace_is_shared_by_several_nodes_and_a_shared_claim_is_split_by_job():
    assert make_test_plan().workspace.access_mode == "ReadWriteOnce"
    assert make_test_plan(resources={"nodes": 2}).workspace.access_mode == "ReadWriteMany"
    existing = make_test_plan(workspace={"existingClaim": "shared"}).workspace
    assert (existing.claim, existing.sub_path) == ("shared", "support-7b")


def test_the_run_configuration_survives_its_json():
    run = build_run_config(make_test_plan(), make_record(Phase.INSPECT, Phase.PREPARE), 1)
    assert RunConfig.from_json(run.to_json()) == run


def test_suspend_and_serving_do_not_count_as_a_change_of_a_failed_job():
    digest = make_test_plan().digest
    assert make_test_plan(suspend=True, inference={"enabled": False}).digest == digest
    assert make_test_plan(training={"perDeviceBatchSize": 1}).digest != digest
