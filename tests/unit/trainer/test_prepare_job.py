"""`prepare` as a pod runs it: the lock, the model, the data, and a restart that fetches nothing twice."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil

import pytest

from finetune_contract.run_config import DatasetConfig, JobIdentity, QualityConfig, RunConfig, Source
from finetune_contract.workspace import Workspace
from finetune_trainer.storage import transfer
from tests.support.model_bytes import build_model
from tests.support.waiting import eventually
from tests.support.web_server import running
from tests.unit.trainer.test_reporting import Receiver

JOB = JobIdentity("team", "story", "uid-1")


@pytest.fixture
def workspace(tmp_path):
    found = Workspace(tmp_path / "workspace")
    found.root.mkdir()
    return found


@pytest.fixture
def settings(hub, workspace, instructions):
    hub.add("models", "acme/tiny", build_model())
    hub.add("datasets", "acme/rows", {"alpaca.json": (instructions / "alpaca.json").read_bytes()})
    dataset = DatasetConfig((Source("hf://datasets/acme/rows"),), holdout_fraction=0.1)
    return RunConfig(Source("hf://acme/tiny"), dataset, job=JOB, workspace=str(workspace.root))


def test_model_and_data_are_put_where_training_finds_them(run_command, settings, workspace):
    outcome = run_command("prepare", settings=settings)
    assert outcome.code == 0
    details = outcome.details
    assert (details["rows_read"], details["rows_kept"], details["rows_removed"]) == (13, 10, 3)
    assert details["removed_per_category"] == {"refusal": 1, "disclaimer": 1, "knowledge-cutoff": 1}
    assert details["rows_train"] + details["rows_holdout"] == 10
    folder = workspace.dataset(details["dataset_digest"])
    assert (folder / "train.jsonl").read_text().count("\n") == details["rows_train"]
    assert json.loads((workspace.root / details["report"]).read_text())["rowsRead"] == 13
    assert json.loads(workspace.current_dataset.read_text())["digest"] == details["dataset_digest"]
    assert (workspace.base_model / "model.safetensors").read_bytes() == build_model()["model.safetensors"]
    assert not (workspace.base_model / "pytorch_model.bin").exists()
    manifest = json.loads(workspace.base_model_manifest.read_text())
    assert manifest["digest"] == details["model_digest"]
    assert manifest["resolvedRevision"] == details["model_revision"]
    assert json.loads((workspace.reports / "prepare.json").read_text())["details"] == details
    folder = workspace.dataset(details["dataset_digest"])
    for kind in ("json", "html"):
        kept = workspace.reports / f"dataset-{details['dataset_digest']}.{kind}"
        assert kept.read_bytes() == (folder / f"report.{kind}").read_bytes()
    assert json.loads(workspace.lock_file.read_text()) == {"uid": "uid-1", "namespace": "team", "name": "story"}


def test_rows_that_hold_text_of_the_job_s_tasks_are_left_out(run_command, settings, workspace):
    (workspace.root / "haiku.txt").write_text(
        "Rain on the tin roof washes the dust from the day and counts me to sleep"
    )
    quality = QualityConfig(contamination="remove-row", contamination_tasks=("haiku.txt",))
    plain = run_command("prepare", settings=settings).details
    dataset = dataclasses.replace(settings.dataset, quality=quality)
    details = run_command("prepare", settings=dataclasses.replace(settings, dataset=dataset)).details
    assert details["removed_per_category"]["contamination"] == 1
    assert details["rows_kept"] == plain["rows_kept"] - 1
    assert details["dataset_digest"] != plain["dataset_digest"]


def test_a_restart_downloads_nothing_and_says_the_same(run_command, settings, hub):
    first = run_command("prepare", settings=settings)
    hub.bytes_sent = 0
    hub.requests.clear()
    second = run_command("prepare", settings=settings)
    assert second.details == first.details
    assert hub.requests == []


def test_an_interrupted_model_download_is_carried_on(run_command, settings, hub, workspace, monkeypatch):
    weights = build_model()["model.safetensors"]
    monkeypatch.setattr(transfer.retry.DEFAULT, "patience_seconds", 0.0)
    hub.cuts["model.safetensors"] = 8000
    broken = run_command("prepare", settings=settings)
    assert (broken.code, broken.report["reason"]) == (69, "SourceUnavailable")
    assert not workspace.base_model_manifest.exists()
    hub.bytes_sent = 0
    assert run_command("prepare", settings=settings).code == 0
    assert hub.bytes_sent == len(weights) - 8000
    assert (workspace.base_model / "model.safetensors").read_bytes() == weights


def test_an_interrupted_data_download_is_carried_on(run_command, settings, hub, workspace, monkeypatch):
    rows = [{"instruction": f"Question {index}", "output": "Answer " * 20} for index in range(200)]
    content = json.dumps(rows).encode()
    hub.add("datasets", "acme/rows", {"rows.json": content})
    undisturbed = run_command("prepare", settings=settings).details
    shutil.rmtree(workspace.datasets)
    monkeypatch.setattr(transfer.retry.DEFAULT, "patience_seconds", 0.0)
    hub.cuts["rows.json"] = 8000
    broken = run_command("prepare", settings=settings)
    assert (broken.code, broken.report["reason"]) == (69, "SourceUnavailable")
    hub.bytes_sent = 0
    assert run_command("prepare", settings=settings).details == undisturbed
    assert hub.bytes_sent == len(content) - 8000


def test_another_model_replaces_the_one_that_is_there(run_command, settings, hub, workspace):
    first = run_command("prepare", settings=settings)
    hub.add("models", "acme/other", build_model(fill=1))
    (workspace.base_model / "left-over.json").write_text("{}")
    changed = dataclasses.replace(settings, model=Source("hf://acme/other"))
    second = run_command("prepare", settings=changed)
    assert second.details["model_digest"] != first.details["model_digest"]
    assert not (workspace.base_model / "left-over.json").exists()
    assert (workspace.base_model / "model.safetensors").read_bytes() == build_model(fill=1)["model.safetensors"]


def test_a_damaged_model_in_the_workspace_is_fetched_again(run_command, settings, workspace):
    run_command("prepare", settings=settings)
    (workspace.base_model / "model.safetensors").write_bytes(b"short")
    assert run_command("prepare", settings=settings).code == 0
    assert (workspace.base_model / "model.safetensors").read_bytes() == build_model()["model.safetensors"]


def test_a_pinned_revision_is_what_is_fetched(run_command, settings, hub, workspace):
    old = hub.repositories["models/acme/tiny"].commits[0][0]
    hub.add("models", "acme/tiny", build_model(fill=1))
    pinned = dataclasses.replace(settings, model=Source("hf://acme/tiny", revision=old))
    assert run_command("prepare", settings=pinned).details["model_revision"] == old
    assert (workspace.base_model / "model.safetensors").read_bytes() == build_model()["model.safetensors"]


def test_other_rules_make_another_data_set_beside_the_first(run_command, settings, workspace):
    first = run_command("prepare", settings=settings).details["dataset_digest"]
    seeded = dataclasses.replace(settings.dataset, seed=7)
    second = run_command("prepare", settings=dataclasses.replace(settings, dataset=seeded)).details["dataset_digest"]
    assert first != second
    assert workspace.dataset(first).is_dir()
    assert json.loads(workspace.current_dataset.read_text())["digest"] == second


def test_several_sources_are_joined_with_their_weights(run_command, settings, hub, instructions):
    hub.add("datasets", "acme/talk", {"data/train.jsonl": (instructions / "messages.jsonl").read_bytes()})
    sources = (Source("hf://datasets/acme/rows"), Source("hf://datasets/acme/talk", weight=2.0))
    dataset = dataclasses.replace(settings.dataset, sources=sources, holdout_fraction=0.0)
    details = run_command("prepare", settings=dataclasses.replace(settings, dataset=dataset)).details
    assert (details["rows_read"], details["rows_kept"]) == (16, 12)
    assert details["rows_train"] == 10 + 2 * 2


def test_another_jobs_workspace_is_left_alone(run_command, settings, workspace):
    run_command("prepare", settings=settings)
    before = (workspace.reports / "prepare.json").read_text()
    intruder = dataclasses.replace(settings, job=JobIdentity("team", "other", "uid-2"))
    outcome = run_command("prepare", settings=intruder)
    assert (outcome.code, outcome.report["reason"]) == (78, "InvalidConfig")
    assert "team/story" in outcome.report["message"]
    assert "spec.workspace.subPath" in outcome.report["hint"]
    assert (workspace.reports / "prepare.json").read_text() == before


def test_a_damaged_lock_is_nobodys_to_take(run_command, settings, workspace):
    workspace.lock_file.write_text("{")
    outcome = run_command("prepare", settings=settings)
    assert outcome.code == 78
    assert workspace.lock_file.read_text() == "{"


def test_bad_data_is_found_before_the_weights_are_fetched(run_command, settings, hub):
    hub.add("datasets", "acme/rows", {"alpaca.json": b'[{"instruction": oops}]'})
    outcome = run_command("prepare", settings=settings)
    assert (outcome.code, outcome.report["reason"]) == (65, "DatasetInvalid")
    assert not any(request.endswith("model.safetensors") for request in hub.requests)


@pytest.mark.parametrize(
    ("change", "code", "reason", "said"),
    [
        ({"model": Source("hf://acme/none")}, 66, "ModelNotFound", "spec.model.source"),
        ({"model": Source("hf://acme/tiny", revision="v9")}, 66, "ModelNotFound", "spec.model.revision"),
        ({"model": Source("ftp://host/x")}, 78, "InvalidConfig", "spec.model"),
        ({"model": Source("hf://tiny")}, 78, "InvalidConfig", "hf://OWNER/NAME"),
        ({"model": Source("pvc://../../etc")}, 78, "InvalidConfig", "leaves the workspace"),
        ({"model": Source("hf://datasets/acme/rows")}, 66, "ModelNotFound", "spec.model.source"),
        ({"dataset": DatasetConfig((Source("hf://acme/none"),))}, 66, "DatasetNotFound", "spec.dataset.source"),
        ({"dataset": DatasetConfig((Source("hf://acme/rows/x.json"),))}, 66, "DatasetNotFound", "spec.dataset.source"),
        ({"dataset": DatasetConfig((Source("pvc://raw/none.json"),))}, 66, "DatasetNotFound", "pvc://raw/none.json"),
    ],
)
def test_what_is_missing_is_named_by_its_field(run_command, settings, *, change, code, reason, said):
    outcome = run_command("prepare", settings=dataclasses.replace(settings, **change))
    assert (outcome.code, outcome.report["reason"]) == (code, reason)
    assert said in outcome.text


@pytest.mark.parametrize(("missing", "said"), [("config.json", "config.json"), ("model.safetensors", "no weights")])
def test_what_is_no_model_is_refused_before_it_is_fetched(run_command, settings, hub, missing, said):
    contents = {name: content for name, content in build_model().items() if name not in (missing, "pytorch_model.bin")}
    hub.add("models", "acme/tiny", contents)
    outcome = run_command("prepare", settings=settings)
    assert (outcome.code, outcome.report["reason"]) == (65, "ModelInvalid")
    assert said in outcome.report["message"]
    assert hub.bytes_sent == 0


def test_model_and_data_may_lie_on_the_workspace(run_command, workspace, instructions):
    model = workspace.root / "raw" / "model"
    model.mkdir(parents=True)
    for name, content in build_model().items():
        (model / name).write_bytes(content)
    (workspace.root / "raw" / "rows.json").write_bytes((instructions / "alpaca.json").read_bytes())
    settings = RunConfig(
        Source("pvc://raw/model"),
        DatasetConfig((Source("pvc://raw/rows.json"),)),
        job=JOB,
        workspace=str(workspace.root),
    )
    assert run_command("prepare", settings=settings).details["rows_kept"] == 10
    # The same file under a second name: gigabytes are not stored twice.
    assert (workspace.base_model / "model.safetensors").stat().st_ino == (model / "model.safetensors").stat().st_ino


def test_a_full_workspace_says_so(run_command, settings, monkeypatch):
    def refuse(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/workspace/models/base/model.safetensors")

    monkeypatch.setattr(transfer.os, "fsync", refuse)
    outcome = run_command("prepare", settings=settings)
    assert (outcome.code, outcome.report["reason"]) == (73, "StorageFull")
    assert "spec.workspace.size" in outcome.report["hint"]


def test_progress_tells_of_rows_and_ends_at_100(run_command, settings, monkeypatch):
    receiver = Receiver()
    with running(receiver.handler) as url:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", url)
        run_command("prepare", settings=settings)
        eventually(lambda: receiver.posts and receiver.posts[-1][0].percentage == 100, within=10, every=0.02)
    last = receiver.posts[-1][0]
    assert (last.metrics["rows_read"], last.metrics["rows_removed"]) == (13, 3)


def test_too_many_bad_rows_fail_even_where_the_data_is_prepared(run_command, settings, hub):
    rows = b'{"instruction": "a", "output": "b"}\nbad\n'
    hub.add("datasets", "acme/rows", {"rows.jsonl": rows})
    lenient = dataclasses.replace(settings, dataset=dataclasses.replace(settings.dataset, max_bad_rows=1))
    assert run_command("prepare", settings=lenient).details["rows_bad"] == 1
    outcome = run_command("prepare", settings=settings)
    assert outcome.report["reason"] == "DatasetInvalid"


def test_nothing_is_left_of_the_downloads(run_command, settings, workspace):
    run_command("prepare", settings=settings)
    assert not list(workspace.root.rglob("*.partial"))
    assert not (workspace.datasets / ".downloads").exists()
