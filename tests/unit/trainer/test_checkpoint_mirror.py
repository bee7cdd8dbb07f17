"""Checkpoints on the real S3 server: what is sent, what is deleted, what comes back, and what never counts."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.reports import ExitCode, Reason
from finetune_contract.run_config import (
    CheckpointConfig,
    DatasetConfig,
    Destination,
    JobIdentity,
    RunConfig,
    Source,
)
from finetune_contract.workspace import Workspace
from finetune_trainer.checkpoints import mirror as mirrors
from finetune_trainer.checkpoints.attempt import claim_workspace
from finetune_trainer.checkpoints.identity import RUN
from finetune_trainer.checkpoints.layout import MANIFEST, list_quarantined
from finetune_trainer.checkpoints.manifest import read_manifest, verify_checkpoint, write_manifest
from finetune_trainer.checkpoints.mirror import Mirror, restore_newest, select_upload
from finetune_trainer.checkpoints.mirror_state import read_mirror_state
from finetune_trainer.checkpoints.retention import Committed, Limits
from finetune_trainer.errors import TrainerError
from finetune_trainer.training import mirroring
from finetune_trainer.training.mirroring import MirrorProcess, Uploader, run_uploader
from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import eventually

IDENTITY = {"dataset": "d", "model": "m", "settings": "s"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(mirroring, "POLL_SECONDS", 0.02)
    for policy in (mirrors.LOST_WORKSPACE, mirrors.SPARE):
        monkeypatch.setattr(policy, "patience_seconds", 0.5)
        monkeypatch.setattr(policy, "first_wait_seconds", 0.01)


@pytest.fixture
def server(s3_session, monkeypatch):
    """The S3 server, with its credentials under the prefix of the mirror."""
    for name, value in s3_session.variables.items():
        monkeypatch.setenv(f"FINETUNE_MIRROR_{name}", value)
    return s3_session


@dataclasses.dataclass
class Place:
    """A workspace and its mirror."""

    run: RunConfig
    server: object

    @property
    def workspace(self):
        return Workspace(pathlib.Path(self.run.workspace))

    @property
    def root(self):
        return self.workspace.checkpoints

    @property
    def mirror(self):
        return Mirror(self.run, IDENTITY)

    @property
    def uploader(self):
        claim_workspace(self.workspace.attempt_file, 1)
        return Uploader(self.mirror, self.run, 1)

    def save(self, step, metric=None, identity=IDENTITY, attempt=1):
        folder = write_checkpoint(self.root, step, metric=metric)
        write_manifest(folder, dataclasses.replace(read_manifest(folder), extra={RUN: identity}, attempt=attempt))
        return folder

    def send_all(self):
        uploader = self.uploader
        while uploader.advance():
            pass
        return uploader

    def steps(self):
        return [copy.step for copy in self.mirror.list_copies() if copy.manifest is not None]

    @property
    def folder(self):
        """Where the server keeps the objects of this run."""
        return self.server.folder / self.mirror.url.removeprefix("s3://")

    def lose_workspace(self):
        shutil.rmtree(self.root)


@pytest.fixture
def place(server, bucket, tmp_path):
    run = RunConfig(
        Source("m"),
        DatasetConfig(()),
        job=JobIdentity("team-a", "support", "uid-1"),
        workspace=str(tmp_path / "workspace"),
        checkpoint=CheckpointConfig(
            keep_latest=2, mirror=Destination(f"s3://{bucket}/checkpoints", "FINETUNE_MIRROR_")
        ),
    )
    return Place(run, server)


def test_a_committed_checkpoint_is_sent_whole_below_the_jobs_name(place, bucket):
    folder = place.save(5)
    place.send_all()

    assert place.mirror.url.startswith(f"s3://{bucket}/checkpoints/team-a/support/")
    sent = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    copied = place.folder / "checkpoint-5"
    assert {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()} == sent
    state = read_mirror_state(place.workspace)
    assert (state.step, state.failures, state.bytes > 0) == (5, 0, True)


def test_a_job_made_again_under_its_name_finds_its_checkpoints_and_one_with_other_data_does_not(place):
    place.save(5)
    place.send_all()
    place.lose_workspace()
    again = dataclasses.replace(place.run, job=JobIdentity("team-a", "support", "uid-2"))

    assert restore_newest(Mirror(again, {**IDENTITY, "dataset": "other"}), place.root) is None
    assert restore_newest(Mirror(again, IDENTITY), place.root) == 5
    assert verify_checkpoint(place.root / "checkpoint-5", full=True) == []


def test_checkpoints_of_another_run_are_neither_sent_nor_fetched_nor_deleted(place):
    place.save(5)
    place.send_all()
    foreign = place.save(9, identity={**IDENTITY, "model": "other"})
    place.send_all()
    assert place.steps() == [5]

    shutil.copytree(foreign, place.folder / "checkpoint-9")
    place.lose_workspace()
    assert restore_newest(place.mirror, place.root) == 5
    for step in (6, 7, 8):
        place.save(step)
        place.send_all()
    assert (place.folder / "checkpoint-9" / MANIFEST).exists()


def test_of_several_that_wait_only_the_newest_is_sent(place):
    for step in (1, 2, 3):
        place.save(step)
    place.send_all()
    assert place.steps() == [3]


def test_the_mirror_keeps_as_many_as_the_workspace_and_the_best(place):
    metrics = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.7, 5: 0.6}
    place.run = dataclasses.replace(place.run, checkpoint=dataclasses.replace(place.run.checkpoint, keep_best=1))
    for step, metric in metrics.items():
        place.save(step, metric)
        place.send_all()
    assert place.steps() == [2, 4, 5]


def test_the_best_one_is_sent_although_a_newer_one_was_waiting(place):
    place.run = dataclasses.replace(place.run, checkpoint=dataclasses.replace(place.run.checkpoint, keep_best=1))
    for step, metric in {1: 0.9, 2: 0.1, 3: 0.8}.items():
        place.save(step, metric)
    place.send_all()
    assert place.steps() == [2, 3]


def test_what_is_there_is_not_sent_again(place):
    place.save(5)
    place.send_all()
    before = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*") if path.is_file()}
    assert place.send_all().state.bytes == 0
    assert {path: path.stat().st_mtime_ns for path in place.folder.rglob("*") if path.is_file()} == before


def test_half_a_checkpoint_never_counts_and_goes_when_a_newer_one_is_whole(place, monkeypatch):
    place.save(4)
    uploader = place.uploader
    monkeypatch.setattr(mirrors.S3Folder, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        uploader.advance()
    monkeypatch.undo()
    for name, value in place.server.variables.items():
        monkeypatch.setenv(f"FINETUNE_MIRROR_{name}", value)
    assert (place.folder / "checkpoint-4" / "latest").exists()

    assert place.steps() == []
    assert restore_newest(place.mirror, place.root.parent / "elsewhere") is None
    shutil.rmtree(place.root / "checkpoint-4")
    place.save(5)
    place.send_all()
    assert place.steps() == [5]
    assert not (place.folder / "checkpoint-4").exists()


def test_a_step_that_was_saved_again_replaces_its_copy(place):
    place.save(5)
    place.send_all()
    shutil.rmtree(place.root / "checkpoint-5")
    again = place.save(5, attempt=2)
    (again / "latest").touch()
    place.send_all()
    assert json.loads((place.folder / "checkpoint-5" / MANIFEST).read_text())["attempt"] == 2


def test_a_checkpoint_deleted_while_it_is_sent_is_abandoned_without_a_word(place, monkeypatch):
    folder = place.save(5)
    upload = mirrors.S3Folder.upload

    def upload_late(self, file):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        upload(self, file)

    monkeypatch.setattr(mirrors.S3Folder, "upload", upload_late)
    uploader = place.uploader
    uploader.advance()
    assert place.steps() == []
    assert uploader.state.failures == 0


def test_a_checkpoint_that_is_damaged_on_the_workspace_is_not_sent(place):
    folder = place.save(5)
    shard = next(folder.rglob("shard_0.pt"))
    shard.write_bytes(b"x" * shard.stat().st_size)
    uploader = place.send_all()
    assert place.steps() == []
    assert uploader.state.failures == 1


def test_a_damaged_copy_is_passed_over_for_an_older_one(place):
    for step in (3, 4):
        place.save(step)
        place.send_all()
    place.save(5)
    place.send_all()
    place.lose_workspace()
    shard = next((place.folder / "checkpoint-5").rglob("shard_0.pt"))
    shard.write_bytes(b"x" * shard.stat().st_size)

    assert restore_newest(place.mirror, place.root) == 4
    assert verify_checkpoint(place.root / "checkpoint-4", full=True) == []
    assert not (place.root / "checkpoint-5").exists()


def test_only_what_is_newer_than_the_workspace_is_fetched(place):
    place.save(5)
    place.send_all()
    assert restore_newest(place.mirror, place.root) is None
    (place.root / "checkpoint-5" / MANIFEST).unlink()
    place.save(4)

    assert restore_newest(place.mirror, place.root) == 5
    # What the workspace had under that name is set aside, not overwritten.
    assert [folder.step for folder in list_quarantined(place.root)] == [5]


def test_a_fetch_that_was_interrupted_is_carried_on(place, monkeypatch):
    place.save(5)
    place.send_all()
    place.lose_workspace()
    fetch = mirrors.download_files

    def fetch_one(store, files, *rest):
        fetch(store, files[:1], *rest)
        raise TrainerError(Reason.DESTINATION_UNAVAILABLE, ExitCode.UNAVAILABLE, "the server went away")

    monkeypatch.setattr(mirrors, "download_files", fetch_one)
    with pytest.raises(TrainerError, match="went away"):
        restore_newest(place.mirror, place.root)
    there = {path: path.stat().st_ino for path in (place.root / "checkpoint-5").rglob("*") if path.is_file()}
    monkeypatch.setattr(mirrors, "download_files", fetch)

    assert restore_newest(place.mirror, place.root) == 5
    kept = [path for path, inode in there.items() if path.exists() and path.stat().st_ino == inode]
    assert len(kept) == 1
    assert list_quarantined(place.root) == []
    assert verify_checkpoint(place.root / "checkpoint-5", full=True) == []


def test_a_mirror_that_is_down_is_an_error_only_where_the_workspace_is_empty(place, monkeypatch):
    monkeypatch.setenv("FINETUNE_MIRROR_AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(TrainerError, match=r"spec\.checkpoint\.mirror\.destination: .* did not answer") as caught:
        restore_newest(place.mirror, place.root)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    place.save(5)
    assert restore_newest(place.mirror, place.root) is None


def test_wrong_credentials_are_told_before_training_begins(place, monkeypatch):
    monkeypatch.setenv("FINETUNE_MIRROR_AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TrainerError, match=r"spec\.checkpoint\.mirror\.secretRef|refused") as caught:
        restore_newest(place.mirror, place.root)
    assert caught.value.exit_code == ExitCode.NO_PERMISSION
    assert "spec.checkpoint.mirror.secretRef" in caught.value.hint


def test_an_older_attempt_writes_nothing_to_the_mirror(place):
    place.save(5)
    uploader = place.uploader
    claim_workspace(place.workspace.attempt_file, 2)
    with pytest.raises(TrainerError) as caught:
        uploader.advance()
    assert caught.value.exit_code == ExitCode.FENCED
    assert place.steps() == []


def start(place, work=None):
    claim_workspace(place.workspace.attempt_file, 1)
    return MirrorProcess(work or (lambda finish: run_uploader(Uploader(place.mirror, place.run, 1), finish)))


def test_the_process_sends_what_is_committed_while_it_runs_and_the_last_one_at_the_end(place):
    process = start(place)
    place.save(1)
    eventually(lambda: place.steps() == [1], within=60, every=0.05)
    place.save(2)
    assert process.finish(60)
    process.close()
    assert place.steps() == [1, 2]


def test_a_process_that_is_killed_is_started_again(place, tmp_path):
    def work(finish):
        (tmp_path / f"worker-{os.getpid()}").touch()
        run_uploader(Uploader(place.mirror, place.run, 1), finish)

    process = start(place, work)
    worker = eventually(lambda: next(tmp_path.glob("worker-*"), None), within=60, every=0.02)
    os.kill(int(worker.name.partition("-")[2]), 9)
    place.save(1)
    eventually(lambda: place.steps() == [1], within=60, every=0.05)
    assert process.finish(60)
    process.close()
    assert len(list(tmp_path.glob("worker-*"))) == 2


def test_a_server_that_is_down_makes_the_end_wait_no_longer_than_allowed(place, monkeypatch):
    monkeypatch.setenv("FINETUNE_MIRROR_AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    place.save(1)
    process = start(place)
    eventually(
        lambda: (read_mirror_state(place.workspace) or 0) and read_mirror_state(place.workspace).failures, within=60
    )
    assert not process.finish(0.05)
    process.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(process.pid, 0)


checkpoints = st.lists(
    st.builds(Committed, st.integers(1, 20), st.none() | st.integers(0, 5).map(float)),
    unique_by=lambda each: each.step,
    max_size=8,
)


@given(
    checkpoints, checkpoints, st.builds(Limits, st.integers(1, 4), st.integers(0, 3), st.sampled_from(["min", "max"]))
)
def test_sending_ends_and_the_newest_goes_first(local, mirrored, limits):
    sent, order = set(), []
    while (step := select_upload(local, mirrored, sent, limits)) is not None:
        assert step not in sent
        sent.add(step)
        order.append(step)
        mirrored = [*(each for each in mirrored if each.step != step), *(each for each in local if each.step == step)]
    assert order[:1] == ([max(each.step for each in local)] if local else [])
    assert set(order) <= {each.step for each in local}
