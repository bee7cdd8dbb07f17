"""Which checkpoints may go, and that deleting them is safe to interrupt."""

import dataclasses
import os
import shutil
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.checkpoints import retention
from finetune_trainer.checkpoints.layout import DELETING, MANIFEST, list_folders, list_quarantined
from finetune_trainer.checkpoints.manifest import verify_checkpoint
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints, quarantine
from finetune_trainer.checkpoints.retention import Committed, Limits, rank_best, select_before_save, select_surplus
from tests.support.checkpoints import write_checkpoint

histories = st.lists(
    st.builds(Committed, st.integers(0, 60), st.none() | st.floats(-5, 5, allow_nan=False), st.integers(1, 100)),
    unique_by=lambda checkpoint: checkpoint.step,
    max_size=14,
)
limits = st.builds(Limits, st.integers(0, 5), st.integers(0, 4), st.sampled_from(["min", "max"]))
protections = st.sets(st.integers(0, 60), max_size=3)
missing = st.integers(-50, 900)


def _untouchable(history, limit, protected):
    """Steps that no deletion may ever name."""
    newest = sorted(checkpoint.step for checkpoint in history)[-1:]
    return {*newest, *protected, *rank_best(history, limit.mode)[: max(limit.best, 1)]}


@given(histories, limits, protections)
def test_the_newest_the_best_and_the_resumed_from_always_stay(history, limit, protected):
    surplus = set(select_surplus(history, limit, protected))
    steps = sorted(checkpoint.step for checkpoint in history)

    assert surplus <= set(steps)
    assert not surplus & _untouchable(history, limit, protected)
    assert not surplus & set(steps[-max(limit.latest, 1) :])


@given(histories, limits)
def test_no_more_stay_than_were_asked_for_beside_the_newest_and_the_best(history, limit):
    kept = len(history) - len(select_surplus(history, limit))

    assert kept <= max(limit.latest, 1) + max(limit.best, 1)


@given(histories, limits, protections)
def test_selecting_again_after_deleting_selects_nothing(history, limit, protected):
    surplus = set(select_surplus(history, limit, protected))
    rest = [checkpoint for checkpoint in history if checkpoint.step not in surplus]

    assert select_surplus(rest, limit, protected) == []


@given(histories, limits, protections, missing)
def test_before_a_save_only_what_would_go_after_it_goes_oldest_first(history, limit, protected, lacking):
    chosen = select_before_save(history, limit, protected, lacking)
    after = dataclasses.replace(limit, latest=max(limit.latest - 1, 1))

    assert not set(chosen) & _untouchable(history, limit, protected)
    surplus = select_surplus(history, after, protected)
    assert chosen == surplus[: len(chosen)]


@given(histories, limits, protections, missing)
def test_before_a_save_as_much_goes_as_it_needs_or_nothing(history, limit, protected, lacking):
    chosen = select_before_save(history, limit, protected, lacking)
    size = {checkpoint.step: checkpoint.num_bytes for checkpoint in history}
    freed = sum(size[step] for step in chosen)
    surplus = select_surplus(history, dataclasses.replace(limit, latest=max(limit.latest - 1, 1)), protected)
    possible = sum(size[step] for step in surplus)

    assert bool(chosen) == (0 < lacking <= possible)
    assert not chosen or freed - size[chosen[-1]] < lacking <= freed


def test_the_best_is_ranked_by_mode_and_newer_wins_a_tie():
    history = [Committed(1, 2.0), Committed(2, 1.0), Committed(3, 1.0), Committed(4)]

    assert rank_best(history, "min") == [3, 2, 1]
    assert rank_best(history, "max") == [1, 3, 2]


def test_garbage_does_not_push_good_checkpoints_out(tmp_path):
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, step)
    for step in (400, 500, 600):
        (write_checkpoint(tmp_path, step) / MANIFEST).unlink()
    # Committed, then damaged: its manifest alone must not make it the newest.
    (write_checkpoint(tmp_path, 700) / "global_step700/shard_0.pt").write_bytes(b"cut")

    committed = retention.list_committed(tmp_path, "eval_loss")

    assert [one.step for one in committed] == [100, 200, 300]
    assert select_surplus(committed, Limits(3)) == []
    assert select_surplus(committed, Limits(1)) == [100, 200]


def _kill_at(number, folder):
    """Delete a folder in a process that is killed just before its `number`-th removal; False when it was not killed."""
    pid = os.fork()
    if pid == 0:
        calls = iter(range(number))

        def counted(removal):
            def remove(*arguments, **options):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                removal(*arguments, **options)

            return remove

        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
        retention.delete_checkpoint(folder)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _refuse_for_want_of_room(path, *_):
    raise OSError(28, "No space left on device", str(path))


def _removals(folder):
    return sum(1 for _ in folder.rglob("*")) + 2  # the mark, and the folder itself


def test_a_deletion_killed_at_any_moment_leaves_nothing_to_choose_and_the_next_finishes_it(tmp_path):
    number = 0
    while True:
        root = tmp_path / str(number)
        write_checkpoint(root, 200)
        # Newer than what is complete beside it, so that it would be chosen if it looked complete.
        folder = write_checkpoint(root, 300)
        total = _removals(folder)
        if not _kill_at(number, folder):
            break

        assert folder.exists()
        assert choose_resume(observe_checkpoints(root)).step == 200, f"chosen after {number} of {total} removals"
        assert [one.step for one in retention.list_committed(root, "eval_loss")] == [200]
        write_checkpoint(root, 400)
        assert retention.delete_quarantine_before(root, 400) == []
        assert [folder.step for folder in list_folders(root)] == [200, 400]
        number += 1
    assert number == total
    assert not folder.exists()


def test_on_a_volume_without_room_for_the_mark_no_kill_leaves_a_checkpoint_either(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.touch", _refuse_for_want_of_room)
    number = 1
    while True:
        root = tmp_path / str(number)
        write_checkpoint(root, 200)
        if not _kill_at(number, write_checkpoint(root, 300)):
            break
        assert choose_resume(observe_checkpoints(root)).step == 200
        assert not (root / "checkpoint-300" / MANIFEST).exists()
        number += 1
    assert number > 5


def test_a_half_deleted_folder_that_was_quarantined_is_finished_there(tmp_path):
    write_checkpoint(tmp_path, 200)
    folder = write_checkpoint(tmp_path, 100)
    assert _kill_at(3, folder)

    quarantine(tmp_path, observe_checkpoints(tmp_path))
    assert [folder.step for folder in list_quarantined(tmp_path)] == [100]
    retention.delete_quarantine_before(tmp_path, 200)

    assert list_quarantined(tmp_path) == []


def test_a_volume_without_room_for_the_mark_is_emptied_all_the_same(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, 100)
    monkeypatch.setattr("pathlib.Path.touch", _refuse_for_want_of_room)

    assert retention.delete_checkpoint(checkpoint)
    assert not checkpoint.exists()


def test_a_deletion_that_fails_is_reported_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path, 100)
    held = checkpoint / "trainer_state.json"
    unlink = os.unlink

    def refuse(path, **options):
        if os.fspath(path) == str(held):
            raise OSError(16, "Device or resource busy", path)
        unlink(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", refuse)
        assert [folder.step for folder in retention.delete_steps(tmp_path, [100], lambda: None)] == [100]

    assert verify_checkpoint(checkpoint)
    assert (checkpoint / DELETING).exists()


def test_what_lies_behind_links_is_never_deleted(tmp_path):
    kept = write_checkpoint(tmp_path / "elsewhere", 100)
    (tmp_path / "run").mkdir()
    linked = tmp_path / "run" / "checkpoint-100"
    linked.symlink_to(kept)
    with_link = write_checkpoint(tmp_path / "run", 200)
    (with_link / "shared").symlink_to(kept)

    assert not retention.delete_checkpoint(linked)
    assert retention.delete_checkpoint(with_link)
    assert verify_checkpoint(kept, full=True) == []


def test_nothing_more_is_deleted_once_the_fence_has_risen(tmp_path):
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, step)
    looks = iter([None])

    def fence():
        if next(looks, "risen") == "risen":
            raise PermissionError("a newer attempt owns the workspace")

    with pytest.raises(PermissionError):
        retention.delete_steps(tmp_path, [100, 200], fence)
    assert [folder.step for folder in list_folders(tmp_path)] == [200, 300]


def _write_garbage(root, *steps):
    for step in steps:
        (write_checkpoint(root, step) / MANIFEST).unlink()
    quarantine(root, observe_checkpoints(root))


def test_the_quarantine_is_emptied_only_up_to_the_committed_step(tmp_path):
    _write_garbage(tmp_path, 100, 200, 300)
    write_checkpoint(tmp_path, 200)

    retention.delete_quarantine_before(tmp_path, 200)

    assert [folder.step for folder in list_quarantined(tmp_path)] == [300]
    assert [folder.step for folder in list_folders(tmp_path)] == [200]


@pytest.mark.parametrize("damage", ["truncated", "missing", "absent"])
def test_the_quarantine_stays_while_the_newer_checkpoint_does_not_verify(tmp_path, damage):
    _write_garbage(tmp_path, 100)
    newer = write_checkpoint(tmp_path, 200)
    shard = newer / "global_step200/shard_0.pt"
    if damage == "truncated":
        shard.write_bytes(b"cut")
    elif damage == "missing":
        shard.unlink()
    else:
        shutil.rmtree(newer)

    retention.delete_quarantine_before(tmp_path, 200)

    assert [folder.step for folder in list_quarantined(tmp_path)] == [100]
