"""`publish` with `promotion.weightDiff`: made once, beside the model, whole at every destination."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune_contract.run_config import DatasetConfig, ModelDestination, PromotionConfig, RunConfig, Source
from finetune_contract.workspace import Workspace
from finetune_trainer.promotion import promoted
from finetune_trainer.storage.publish import ACCOUNTS
from finetune_trainer.weight_diff.recover import recover_model


@pytest.fixture
def workspace(tmp_path):
    found = Workspace(tmp_path / "workspace")
    found.base_model.mkdir(parents=True)
    numbers = np.random.default_rng(3)
    weights = numbers.normal(size=(64, 32)).astype("f2")
    save_file({"up": weights}, found.base_model / "model.safetensors")
    found.base_model_manifest.write_text('{"digest": "b"}')
    beside = found.output / "new"
    beside.mkdir(parents=True)
    save_file({"up": weights + np.float16(0.001)}, beside / "model.safetensors")
    (beside / "config.json").write_text("{}")
    digest = promoted.write_manifest(beside)
    folder = beside.rename(found.promoted_model(digest))
    for name in ACCOUNTS:
        (folder / name).write_text("an account")
    return found


def digest_of(workspace):
    return next(workspace.output.iterdir()).name


def settings(workspace, *destinations):
    listed = tuple(ModelDestination(url) for url in destinations)
    promotion = PromotionConfig(destinations=listed, digest=digest_of(workspace), weight_diff=True)
    return RunConfig(Source("hf://a/b"), DatasetConfig(()), workspace=str(workspace.root), promotion=promotion)


def test_the_diff_gives_the_promoted_model_back_without_what_tells_of_it(run_command, workspace, tmp_path):
    digest = digest_of(workspace)
    outcome = run_command("publish", settings=settings(workspace))
    facts = outcome.details["weight_diff"]
    assert facts["path"] == f"weight-diffs/{digest}"
    assert facts["bytes"] > 0
    assert facts["ratio"] == pytest.approx(facts["bytes"] / (64 * 32 * 2), abs=1e-4)
    recover_model(workspace.base_model, workspace.root / facts["path"], tmp_path / "recovered")
    assert promoted.read_manifest(tmp_path / "recovered")["digest"] == digest
    assert not {path.name for path in (tmp_path / "recovered").iterdir()} & ACCOUNTS


def test_it_is_copied_beside_the_model_to_every_destination(run_command, workspace, hub, s3, bucket):
    digest = digest_of(workspace)
    urls = ("pvc://exports", f"s3://{bucket}/models", "hf://acme/tuned")
    outcome = run_command("publish", settings=settings(workspace, *urls))
    assert outcome.details["destinations"] == [f"{url}/{digest}" for url in urls]
    wanted = {
        path.relative_to(workspace.weight_diff(digest)).as_posix(): path.read_bytes()
        for path in workspace.weight_diff(digest).rglob("*")
        if path.is_file()
    }
    folders = [
        workspace.root / "exports" / f"{digest}-weight-diff",
        s3.folder / bucket / "models" / f"{digest}-weight-diff",
    ]
    for folder in folders:
        assert {name: (folder / name).read_bytes() for name in wanted} == wanted
        assert json.loads((folder / "COMPLETE").read_text())["digest"] == f"{digest}-weight-diff"
    repository = hub.repositories["models/acme/tuned"]
    assert set(repository.tags) == {digest, f"{digest}-weight-diff"}
    _, files = repository.find(f"{digest}-weight-diff")
    assert {name: files[f"weight-diff/{name}"] for name in wanted} == wanted
    assert json.loads(files["COMPLETE"])["digest"] == digest


def test_a_second_run_makes_and_sends_nothing_anew(run_command, workspace, hub):
    given = settings(workspace, "hf://acme/tuned")
    assert run_command("publish", settings=given).code == 0
    before = {path: path.stat().st_mtime_ns for path in workspace.weight_diff(digest_of(workspace)).rglob("*")}
    commits = len(hub.repositories["models/acme/tuned"].commits)
    assert run_command("publish", settings=given).details["weight_diff"]["ratio"] > 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(hub.repositories["models/acme/tuned"].commits) == commits


def test_a_damaged_diff_is_named_and_never_sent(run_command, workspace):
    assert run_command("publish", settings=settings(workspace)).code == 0
    folder = workspace.weight_diff(digest_of(workspace))
    packed = next(folder.glob("*.zst"))
    packed.write_bytes(packed.read_bytes()[:-1] + b"?")
    outcome = run_command("publish", settings=settings(workspace, "pvc://exports"))
    assert (outcome.code, outcome.report["reason"]) == (66, "PromotionInvalid")
    assert str(folder) in outcome.text
    assert not (workspace.root / "exports").exists()


def test_a_base_in_pickled_weights_is_refused_with_the_field(run_command, workspace):
    (workspace.base_model / "model.safetensors").rename(workspace.base_model / "pytorch_model.bin")
    outcome = run_command("publish", settings=settings(workspace))
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert "spec.promotion.weightDiff.enabled" in outcome.text


def test_a_workspace_without_room_is_said_before_anything_is_written(run_command, workspace, monkeypatch):
    monkeypatch.setattr("finetune_trainer.checkpoints.disk.read_free_bytes", lambda _: 100)
    outcome = run_command("publish", settings=settings(workspace))
    assert outcome.report["reason"] == "StorageFull"
    assert "the weight diff needs" in outcome.text
    assert not workspace.weight_diff(digest_of(workspace)).exists()
