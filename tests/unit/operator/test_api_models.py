"""The models beyond their verdicts: status that always can be written, and what stays what it was."""

from __future__ import annotations

import datetime as dt

import pytest

from finetune_operator.api import v1alpha1 as api
from finetune_operator.api.crd import build_schema
from tests.support.manifests import EXAMPLES, GOOD, REPOSITORY, name_case, read_job

NOW = dt.datetime(2026, 11, 23, 10, 0, 0, 123456, tzinfo=dt.UTC)


@pytest.mark.parametrize("path", GOOD, ids=name_case)
def test_a_parsed_job_says_the_same_again(path):
    job = api.parse_job(read_job(path))
    assert api.parse_job(job.to_dict()) == job


def test_a_status_survives_a_round_trip_and_is_cut_to_whole_seconds():
    status = api.FineTuneJobStatus(
        state="Training",
        start_time=NOW,
        conditions=[api.Condition(type="Ready", status="False", reason="Training", last_transition_time=NOW)],
        attempts=[api.Attempt(number=1, job="demo-train-1", start_time=NOW)],
        evaluation=api.EvaluationStatus(scores={"holdout": {"loss": 1.25}}),
    )
    written = status.to_dict()
    assert written["startTime"] == "2026-11-23T10:00:00Z"
    assert api.FineTuneJobStatus.model_validate(written) == status


def test_a_message_that_is_too_long_keeps_its_two_ends():
    failure = api.LastFailure(time=NOW, reason="RankFailed", message="first line " + "x" * 9000 + " last line")
    limit = build_schema()["properties"]["status"]["properties"]["lastFailure"]["properties"]["message"]["maxLength"]
    assert len(failure.message) <= limit
    assert failure.message.startswith("first line")
    assert failure.message.endswith("last line")


def test_a_status_of_another_release_can_be_read():
    assert api.FineTuneJobStatus.model_validate({"state": "Training", "inventedLater": 1}).state == "Training"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0s"), (59, "59s"), (61, "1m1s"), (7860, "2h11m"), (90000, "1d1h"), (None, None)]
)
def test_the_eta_is_shown_in_words(seconds, shown):
    assert api.Progress(eta_seconds=seconds).eta == shown


def test_progress_is_shown_as_a_percentage():
    assert api.Progress(percentage=43).summary == "43%"
    assert api.Progress().summary is None


def test_the_demo_fits_on_twenty_lines():
    lines = (REPOSITORY / "crds" / "examples" / "demo.yaml").read_text().splitlines()
    assert len(lines) <= 20


def test_the_examples_are_those_the_documents_name():
    assert {path.stem for path in EXAMPLES} >= {
        *("minimal", "demo", "wizardlm-7b", "multi-node", "lora"),
        *("aks-a100", "aks-a100-spot", "gke-a100", "eks-a100"),
    }


def test_every_placement_preset_has_its_example():
    presets = {api.parse_job(read_job(path)).spec.placement.preset for path in EXAMPLES} - {None}
    schema = build_schema()["properties"]["spec"]["properties"]["placement"]["properties"]["preset"]
    assert presets == set(schema["enum"])


def test_the_recipe_of_origin_runs_on_one_azure_node_with_a_tebibyte():
    spec = api.parse_job(read_job(REPOSITORY / "crds" / "examples" / "wizardlm-7b.yaml")).spec
    assert (spec.training.recipe, spec.training.method) == ("wizardlm-freeform", "full")
    assert spec.training.model_fields_set <= {"recipe", "tracking"}
    assert (spec.resources.nodes, spec.resources.gpus_per_node) == (1, 4)
    assert (spec.workspace.size, spec.placement.preset) == ("1Ti", "aks-a100")
    assert spec.training.tracking is not None
    assert spec.training.tracking.wandb is not None
