"""Which checkpoint a starting process resumes from."""

import json

import pytest

from finetune_contract.reports import ExitCode, Reason
from finetune_trainer.checkpoints import attempt, disk
from finetune_trainer.checkpoints.foreign import examine_foreign
from finetune_trainer.checkpoints.layout import MANIFEST, list_folders, list_quarantined
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints, quarantine
from finetune_trainer.checkpoints.retention import delete_quarantine_before
from finetune_trainer.errors import TrainerError
from tests.support.checkpoints import write_checkpoint
from tests.support.foreign import write_foreign


def _damage(checkpoint, kind):
    shard = checkpoint / f"global_step{checkpoint.name.partition('-')[2]}" / "shard_0.pt"
    if kind == "no manifest":
        (checkpoint / MANIFEST).unlink()
    elif kind == "half a manifest":
        text = (checkpoint / MANIFEST).read_text()
        (checkpoint / MANIFEST).write_text(text[: len(text) // 2])
    elif kind == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:3])
    elif kind == "missing shard":
        shard.unlink()
    elif kind == "empty folder":
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("kind", ["no manifest", "half a manifest", "truncated shard", "missing shard", "empty folder"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, kind):
    write_checkpoint(tmp_path, 100)
    write_checkpoint(tmp_path, 200)
    _damage(write_checkpoint(tmp_path, 300), kind)

    assert choose_resume(observe_checkpoints(tmp_path)).step == 200


def test_it_falls_back_through_several_damaged_checkpoints(tmp_path):
    write_checkpoint(tmp_path, 100)
    _damage(write_checkpoint(tmp_path, 200), "truncated shard")
    _damage(write_checkpoint(tmp_path, 300), "no manifest")

    assert choose_resume(observe_checkpoints(tmp_path)).step == 100


def test_training_begins_anew_when_nothing_is_complete(tmp_path):
    _damage(write_checkpoint(tmp_path, 100), "no manifest")

    assert choose_resume(observe_checkpoints(tmp_path)) is None
    assert choose_resume(observe_checkpoints(tmp_path / "absent")) is None


def test_damaged_folders_are_moved_aside_whole_and_nothing_is_deleted(tmp_path):
    write_checkpoint(tmp_path, 100)
    _damage(write_checkpoint(tmp_path, 200), "no manifest")

    moved = quarantine(tmp_path, observe_checkpoints(tmp_path))

    assert [verdict.folder.step for verdict in moved] == [200]
    assert [folder.step for folder in list_folders(tmp_path)] == [100]
    (kept,) = list_quarantined(tmp_path)
    assert (kept.path / "global_step200/shard_0.pt").read_bytes() == b"shard  0"


def test_the_same_step_can_be_quarantined_twice(tmp_path):
    for _ in range(2):
        _damage(write_checkpoint(tmp_path, 200), "no manifest")
        quarantine(tmp_path, observe_checkpoints(tmp_path))

    assert [folder.path.name for folder in list_quarantined(tmp_path)] == ["checkpoint-200.0", "checkpoint-200.1"]


def test_a_newer_attempt_fences_an_older_one(tmp_path):
    file = tmp_path / "checkpoints" / "attempt.json"
    attempt.claim_workspace(file, 1)
    attempt.claim_workspace(file, 2)
    attempt.claim_workspace(file, 2)

    with pytest.raises(TrainerError) as caught:
        attempt.require_newest(file, 1)

    assert (caught.value.reason, caught.value.exit_code) == (Reason.FENCED, ExitCode.FENCED)
    assert json.loads(file.read_text()) == {"attempt": 2}
    with pytest.raises(TrainerError):
        attempt.claim_workspace(file, 1)


def test_the_first_attempt_sets_another_trainers_checkpoints_aside_and_nothing_ever_deletes_them(tmp_path):
    write_foreign(tmp_path, 100)
    write_checkpoint(tmp_path, 200)
    attempt.claim_workspace(tmp_path / "attempt.json", 1)

    assert [folder.step for folder in list_folders(tmp_path)] == [200]
    write_checkpoint(tmp_path, 300)
    delete_quarantine_before(tmp_path, 300)
    assert examine_foreign(tmp_path / "foreign/checkpoint-100", full=True)[0] == ()

    # From now on a folder without manifest is a save of ours that did not finish.
    write_foreign(tmp_path, 400)
    attempt.claim_workspace(tmp_path / "attempt.json", 2)
    assert [folder.step for folder in list_folders(tmp_path)] == [200, 300, 400]


def test_too_little_room_is_said_with_both_numbers(tmp_path):
    with pytest.raises(TrainerError) as caught:
        disk.require_room(tmp_path, 1 << 50)

    assert caught.value.reason is Reason.STORAGE_FULL
    assert "needs 1024 TiB, the workspace has " in caught.value.message
    assert "spec.workspace.size" in caught.value.hint
    assert caught.value.details["free_bytes"] == pytest.approx(disk.read_free_bytes(tmp_path), rel=0.1)
    disk.require_room(tmp_path, 1)
