"""`publish` to a folder and to a hub."""

from __future__ import annotations

import dataclasses
import json

import pytest

from finetune_contract.gates import GateConfig
from finetune_contract.run_config import (
    DatasetConfig,
    EvaluationConfig,
    ModelDestination,
    PromotionConfig,
    RunConfig,
    Source,
)
from finetune_trainer.report.write import write_run_report
from finetune_trainer.storage import publish as publishing
from finetune_trainer.storage.publish import ACCOUNTS
from finetune_trainer.storage.publish import CARD_MARK as MARK

DIGEST = "0123abcd"
FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


@pytest.fixture
def settings(tmp_path):
    folder = tmp_path / "workspace" / "output" / DIGEST
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return RunConfig(Source("hf://a/b"), DatasetConfig(()), workspace=str(tmp_path / "workspace"))


def to(settings, *destinations):
    listed = tuple(ModelDestination(url, f"FINETUNE_DESTINATION_{n}_") for n, url in enumerate(destinations))
    return RunConfig(
        settings.model,
        settings.dataset,
        workspace=settings.workspace,
        promotion=PromotionConfig(destinations=listed, digest=DIGEST),
    )


def test_a_copy_on_the_volume_is_whole_and_marked(run_command, settings, tmp_path):
    outcome = run_command("publish", settings=to(settings, "pvc://exports/story"))
    assert outcome.details == {"destinations": [f"pvc://exports/story/{DIGEST}"]}
    copy = tmp_path / "workspace" / "exports" / "story" / DIGEST
    assert {name: (copy / name).read_bytes() for name in FILES} == FILES
    mark = json.loads((copy / "COMPLETE").read_text())
    assert [entry["name"] for entry in mark["files"]] == sorted(FILES)


def test_other_content_on_the_volume_is_never_overwritten(run_command, settings, tmp_path):
    copy = tmp_path / "workspace" / "exports" / DIGEST
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("somebody's own")
    outcome = run_command("publish", settings=to(settings, "pvc://exports"))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert (copy / "config.json").read_text() == "somebody's own"
    assert not (copy / "COMPLETE").exists()


@pytest.mark.parametrize("is_complete", [True, False])
def test_the_same_model_from_another_run_is_there_already_with_its_first_account(
    run_command, settings, tmp_path, is_complete
):
    model = tmp_path / "workspace" / "output" / DIGEST
    for name in ACCOUNTS:
        (model / name).write_text("the first run")
    assert run_command("publish", settings=to(settings, "pvc://exports")).code == 0
    copy = tmp_path / "workspace" / "exports" / DIGEST
    for name in ACCOUNTS:
        (model / name).write_text("a later run")
    if not is_complete:
        (copy / "COMPLETE").unlink()
    assert run_command("publish", settings=to(settings, "pvc://exports")).code == 0
    assert {(copy / name).read_text() for name in ACCOUNTS} == {"the first run"}
    assert [entry["name"] for entry in json.loads((copy / "COMPLETE").read_text())["files"]] == sorted(FILES)


def test_a_copy_from_before_there_were_reports_is_left_as_it_is(run_command, settings, tmp_path):
    assert run_command("publish", settings=to(settings, "pvc://exports")).code == 0
    (tmp_path / "workspace" / "output" / DIGEST / "README.md").write_text("a card")
    assert run_command("publish", settings=to(settings, "pvc://exports")).code == 0
    assert not (tmp_path / "workspace" / "exports" / DIGEST / "README.md").exists()


def test_a_gate_that_was_edited_since_the_evaluation_goes_out_as_it_let_the_model_out(run_command, settings, tmp_path):
    def gated(most):
        gates = (GateConfig("holdout", "loss", "max", most),)
        return dataclasses.replace(to(settings, "pvc://exports"), evaluation=EvaluationConfig(gates=gates))

    reports = tmp_path / "workspace" / "reports"
    reports.mkdir()
    (reports / "scores.json").write_text(json.dumps({"digest": DIGEST, "scores": {"holdout": {"loss": 2.0}}}))
    write_run_report(gated(1.5), DIGEST)
    assert run_command("publish", settings=gated(2.5)).code == 0
    told = json.loads((tmp_path / "workspace" / "exports" / DIGEST / "report.json").read_text())
    assert [(gate["max"], gate["verdict"]) for gate in told["gates"]] == [(2.5, "Passed")]


def test_a_copy_damaged_on_its_way_is_not_kept(run_command, settings, tmp_path, monkeypatch):
    real = publishing.hash_file
    monkeypatch.setattr(publishing, "hash_file", lambda path: "bad" if path.name.endswith(".partial") else real(path))
    outcome = run_command("publish", settings=to(settings, "pvc://exports"))
    assert (outcome.code, outcome.report["reason"]) == (69, "DestinationUnavailable")
    assert not [path for path in (tmp_path / "workspace" / "exports").rglob("*") if path.is_file()]


def test_a_hub_gets_one_commit_tagged_with_the_digest(run_command, settings, hub, monkeypatch):
    monkeypatch.setenv("FINETUNE_DESTINATION_0_HF_TOKEN", "hf_writer")
    for _ in range(2):
        outcome = run_command("publish", settings=to(settings, "hf://acme/tuned"))
        assert outcome.details == {"destinations": [f"hf://acme/tuned/{DIGEST}"]}
    repository = hub.repositories["models/acme/tuned"]
    assert len(repository.commits) == 1
    commit, files = repository.commits[0]
    assert repository.tags == {DIGEST: commit}
    assert {name: files[name] for name in FILES} == FILES
    assert json.loads(files["COMPLETE"])["digest"] == DIGEST


def test_a_tag_from_before_there_were_reports_is_that_of_the_model(run_command, settings, hub, tmp_path):
    assert run_command("publish", settings=to(settings, "hf://acme/tuned")).code == 0
    (tmp_path / "workspace" / "output" / DIGEST / "README.md").write_text("a card")
    assert run_command("publish", settings=to(settings, "hf://acme/tuned")).code == 0
    assert len(hub.repositories["models/acme/tuned"].commits) == 1


@pytest.mark.parametrize("name", sorted(FILES))
def test_what_a_hub_keeps_is_compared_before_it_is_tagged(run_command, settings, hub, name):
    hub.spoiled.add(name)
    outcome = run_command("publish", settings=to(settings, "hf://acme/tuned"))
    assert (outcome.code, outcome.report["reason"]) == (69, "DestinationUnavailable")
    assert name in outcome.text
    assert hub.repositories["models/acme/tuned"].tags == {}
    assert run_command("publish", settings=to(settings, "hf://acme/tuned")).code == 0
    assert DIGEST in hub.repositories["models/acme/tuned"].tags


def test_a_tag_with_equal_names_and_other_content_is_refused(run_command, settings, hub):
    other = {**FILES, "model.safetensors": b"altered" * 1000, "COMPLETE": b"{}"}
    commit = hub.add("models", "acme/tuned", other)
    hub.repositories["models/acme/tuned"].tags[DIGEST] = commit
    outcome = run_command("publish", settings=to(settings, "hf://acme/tuned"))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_card_that_somebody_wrote_on_the_hub_is_kept(run_command, settings, hub, tmp_path, is_ours):
    there = f"# {MARK if is_ours else 'by hand'}".encode()
    hub.add("models", "acme/tuned", {"README.md": there})
    (tmp_path / "workspace" / "output" / DIGEST / "README.md").write_text(f"new {MARK}")
    assert run_command("publish", settings=to(settings, "hf://acme/tuned")).code == 0
    _, files = hub.repositories["models/acme/tuned"].commits[-1]
    assert files["README.md"] == (f"new {MARK}".encode() if is_ours else there)
    assert files["model.safetensors"] == FILES["model.safetensors"]


def test_a_tag_of_other_content_is_refused(run_command, settings, hub):
    commit = hub.add("models", "acme/tuned", {"other.txt": b"x"})
    hub.repositories["models/acme/tuned"].tags[DIGEST] = commit
    outcome = run_command("publish", settings=to(settings, "hf://acme/tuned"))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert len(hub.repositories["models/acme/tuned"].commits) == 1


def test_a_hub_that_is_down_is_unavailable(run_command, settings, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    outcome = run_command("publish", settings=to(settings, "hf://acme/tuned"))
    assert (outcome.code, outcome.report["reason"]) == (69, "DestinationUnavailable")


def test_without_destinations_nothing_is_done(run_command, settings):
    assert run_command("publish", settings=to(settings)).details == {"destinations": []}


def test_a_missing_model_and_a_read_only_place_are_said(run_command, settings):
    nothing = RunConfig(settings.model, settings.dataset, workspace=settings.workspace)
    assert run_command("publish", settings=nothing).report["reason"] == "PromotionInvalid"
    outcome = run_command("publish", settings=to(settings, "https://host/x"))
    assert outcome.code == 78
    assert "s3://, pvc:// or hf://" in outcome.report["hint"]


def test_a_folder_is_published_without_a_job(run_command, settings, tmp_path):
    source = tmp_path / "workspace" / "output" / DIGEST
    outcome = run_command("publish", "--model", str(source), "--destination", str(tmp_path / "copies"))
    assert outcome.code == 0
    assert (tmp_path / "copies" / DIGEST / "COMPLETE").is_file()
