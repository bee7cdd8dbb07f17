"""`inspect` reads headers, and nothing but headers."""

from __future__ import annotations

import dataclasses

import pytest

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import DatasetConfig, EvaluationConfig, JudgeConfig, NamedModel, RunConfig, Source
from tests.support.model_bytes import build_model, build_safetensors


@pytest.fixture
def settings(hub, instructions, tmp_path):
    hub.add("models", "acme/tiny", build_model() | {"model.safetensors": build_safetensors({"w": (1000, 1000)})})
    hub.add("datasets", "acme/rows", {"alpaca.json": (instructions / "alpaca.json").read_bytes()})
    dataset = DatasetConfig((Source("hf://datasets/acme/rows"),))
    return RunConfig(Source("hf://acme/tiny"), dataset, workspace=str(tmp_path / "not-mounted"))


def test_sizes_parameters_and_revisions_are_reported(run_command, settings, hub, instructions, tmp_path):
    outcome = run_command("inspect", settings=settings)
    assert outcome.code == 0
    details = outcome.details
    assert details["model_parameters"] == 1_000_000
    assert 4_000_000 < details["model_bytes"] < 4_001_000
    assert details["model_type"] == "llama"
    assert details["model_revision"] == hub.repositories["models/acme/tiny"].commits[-1][0]
    assert details["dataset_bytes"] == (instructions / "alpaca.json").stat().st_size
    assert details["dataset_revisions"] == [hub.repositories["datasets/acme/rows"].commits[-1][0]]
    assert hub.bytes_sent < 2_000
    assert not (tmp_path / "not-mounted").exists()


def test_further_models_to_score_are_sized_but_for_those_on_the_workspace(run_command, settings):
    models = (NamedModel("same", "hf://acme/tiny"), NamedModel("there", "pvc://other"))
    settings = dataclasses.replace(settings, evaluation=EvaluationConfig(models=models))
    details = run_command("inspect", settings=settings).details
    assert details["evaluated_bytes"] == details["model_bytes"]


def test_a_judge_that_is_downloaded_is_sized(run_command, settings):
    def inspect(source):
        dataset = dataclasses.replace(settings.dataset, judge=JudgeConfig(source))
        return run_command("inspect", settings=dataclasses.replace(settings, dataset=dataset))

    details = inspect("hf://acme/tiny").details
    assert details["judge_bytes"] == details["model_bytes"]
    assert inspect("pvc://judge").details["judge_bytes"] == 0
    absent = inspect("hf://acme/absent")
    assert absent.code == ExitCode.NO_INPUT
    assert "spec.dataset.judge.source" in absent.text


def test_a_further_model_that_does_not_exist_is_named_before_anything_runs(run_command, settings):
    settings = dataclasses.replace(settings, evaluation=EvaluationConfig(models=(NamedModel("x", "hf://acme/absent"),)))
    outcome = run_command("inspect", settings=settings)
    assert outcome.code == ExitCode.NO_INPUT
    assert "spec.evaluation.models[0].source" in outcome.text


def test_sources_on_the_workspace_are_not_seen_and_not_an_error(run_command, settings):
    blind = RunConfig(Source("pvc://model"), DatasetConfig((Source("pvc://rows.json"),)), workspace=settings.workspace)
    details = run_command("inspect", settings=blind).details
    assert details["model_parameters"] is None
    assert details["dataset_revisions"] == [""]


def test_an_empty_mount_point_is_no_workspace(run_command, settings, tmp_path):
    (tmp_path / "not-mounted").mkdir()
    test_sources_on_the_workspace_are_not_seen_and_not_an_error(run_command, settings)


def test_a_plain_folder_can_be_inspected(run_command, tmp_path, capsys):
    for name, content in build_model().items():
        (tmp_path / name).write_bytes(content)
    assert run_command("inspect", "--model", str(tmp_path)).code == 0
    assert '"model_parameters": 4160' in capsys.readouterr().out


def test_a_gated_model_names_the_secret_field(run_command, settings, hub):
    hub.add("models", "acme/tiny", build_model(), is_gated=True, token="t")
    outcome = run_command("inspect", settings=settings)
    assert (outcome.code, outcome.report["reason"]) == (77, "CredentialsRefused")
    assert "gated" in outcome.report["message"]
    assert "spec.model.secretRef" in outcome.report["hint"]
