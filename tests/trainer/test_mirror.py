"""A run beside its mirror on the real S3 server: what it survives, and that it never waits."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from finetune_contract.reports import ExitCode
from finetune_trainer.checkpoints.mirror_state import read_mirror_state
from finetune_trainer.storage import s3_upload
from tests.support.s3_server import running_s3
from tests.support.training_runs import end_state, kill_group, reap
from tests.support.waiting import eventually


@pytest.fixture
def server(tmp_path, monkeypatch):
    with running_s3(tmp_path / "buckets") as server:
        (server.folder / "bucket").mkdir()
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setattr("finetune_trainer.training.mirroring.POLL_SECONDS", 0.05)
        yield server


MIRRORED = ("checkpoint.mirror.destination=s3://bucket/mirror", "checkpoint.every_steps=4", "checkpoint.keep_latest=2")


def mirrored_steps(server):
    """Return the steps whose manifest is on the server."""
    found = (server.folder / "bucket").glob("mirror/*/checkpoint-*/finetune-manifest.json")
    return sorted(int(path.parent.name.partition("-")[2]) for path in found)


def test_a_run_whose_workspace_is_lost_resumes_from_the_mirror_and_ends_bit_identical(make_run, server):
    settings = ("training.max_steps=13", "checkpoint.every_steps=4", "checkpoint.keep_latest=2")
    whole = make_run("llama", "whole", *settings)
    whole.train()
    broken = make_run("llama", "broken", *settings, MIRRORED[0])

    pid = broken.start()
    eventually(lambda: mirrored_steps(server), within=120, every=0.02)
    kill_group(pid)
    mirrored = mirrored_steps(server)
    shutil.rmtree(broken.workspace.checkpoints)
    results = broken.train()

    assert results["resumed_from_step"] == mirrored[-1]
    assert end_state(broken.manifests()[13]) == end_state(whole.manifests()[13])
    assert results["mirrored"] == 13
    assert mirrored_steps(server)[-1] == 13


def test_training_goes_on_while_the_mirror_is_down_and_what_was_missed_is_sent_when_it_is_back(
    make_run, server, monkeypatch
):
    monkeypatch.setattr("finetune_trainer.training.mirroring.LONGEST_WAIT_SECONDS", 0.2)
    run = make_run("llama", "workspace", *MIRRORED)
    pid = run.start("training.max_steps=100000")
    eventually(lambda: mirrored_steps(server), within=120, every=0.02)
    server.stop()
    step = max(run.manifests())
    run.wait_for_checkpoint(step + 8)
    eventually(lambda: read_mirror_state(run.workspace).failures > 0, within=60, every=0.05)
    later = max(run.manifests())
    run.wait_for_checkpoint(later + 8)

    server.start()
    eventually(lambda: mirrored_steps(server)[-1] > later, within=120, every=0.05)
    os.kill(pid, signal.SIGTERM)
    assert reap(pid) == ExitCode.SUSPENDED
    assert run.report("train")["details"]["mirrored"] >= later


def test_a_mirror_process_killed_in_the_middle_of_an_upload_leaves_nothing_that_counts(make_run, server, monkeypatch):
    upload, marks = s3_upload.S3Folder.upload, server.folder.parent / "marks"
    marks.mkdir()

    def upload_and_die(self, file):
        upload(self, file)
        if not list(marks.iterdir()):
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(s3_upload.S3Folder, "upload", upload_and_die)
    run = make_run("llama", "workspace", *MIRRORED)
    results = run.train("training.max_steps=12")

    assert len(list(marks.iterdir())) == 1
    assert results["mirrored"] == 12
    assert mirrored_steps(server)[-1] == 12


def test_a_mirror_that_is_down_keeps_an_empty_workspace_from_beginning_anew(make_run, server, monkeypatch):
    monkeypatch.setattr("finetune_trainer.checkpoints.mirror.LOST_WORKSPACE.patience_seconds", 0.2)
    server.stop()
    run = make_run("llama", "workspace", *MIRRORED)
    assert run.call("train", "training.max_steps=4") == ExitCode.UNAVAILABLE
    assert "spec.checkpoint.mirror.destination" in run.report("train")["message"]
    assert run.manifests() == {}
