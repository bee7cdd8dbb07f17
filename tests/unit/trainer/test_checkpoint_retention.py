"""Which checkpoints may go, and that deleting them is safe to interrupt."""

from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.checkpoints import retention
from finetune_trainer.checkpoints.layout import MANIFEST, list_folders, list_quarantined
from finetune_trainer.checkpoints.manifest import verify_checkpoint
from finetune_trainer.checkpoints.resume import choose_resume, observe_checkpoints, quarantine
from finetune_trainer.checkpoints.retention import Committed, Limits, rank_best, select_surplus
from tests.support.checkpoints import write_checkpoint

histories = st.lists(
    st.builds(Committed, st.integers(0, 60), st.none() | st.floats(-5, 5, allow_nan=False)),
    unique_by=lambda checkpoint: checkpoint.step,
    max_size=14,
)
limits = st.builds(Limits, st.integers(0, 5), st.integers(0, 4), st.sampled_from(["min", "max"]))


@given(histories, limits, st.sets(st.integers(0, 60), max_size=3))
def test_the_newest_the_best_and_the_resumed_from_always_stay(history, limit, protected):
    surplus = set(select_surplus(history, limit, protected))
    steps = sorted(checkpoint.step for checkpoint in history)

    assert surplus <= set(steps)
    assert not surplus & set(steps[-max(limit.latest, 1) :])
    assert not surplus & protected
    assert not surplus & set(rank_best(history, limit.mode)[: limit.best])


@given(histories, limits)
def test_no_more_stay_than_were_asked_for(history, limit):
    kept = len(history) - len(select_surplus(history, limit))

    assert kept <= max(limit.latest, 1) + limit.best


@given(histories, limits)
def test_selecting_again_after_deleting_selects_nothing(history, limit):
    surplus = set(select_surplus(history, limit))
    rest = [checkpoint for checkpoint in history if checkpoint.step not in surplus]

    assert select_surplus(rest, limit) == []


def test_the_best_is_ranked_by_mode_and_newer_wins_a_tie():
    history = [Committed(1, 2.0), Committed(2, 1.0), Committed(3, 1.0), Committed(4)]

    assert rank_best(history, "min") == [3, 2, 1]
    assert rank_best(history, "max") == [1, 3, 2]


def test_garbage_does_not_push_good_checkpoints_out(tmp_path):
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, step)
    for step in (400, 500, 600):
        (write_checkpoint(tmp_path, step) / MANIFEST).unlink()

    committed = retention.list_committed(tmp_path, "eval_loss")

    assert [one.step for one in committed] == [100, 200, 300]
    assert select_surplus(committed, Limits(3)) == []


def test_a_deletion_cut_short_leaves_no_folder_that_looks_complete(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 100)
    write_checkpoint(tmp_path, 200)
    # What a kill between the two halves of a deletion leaves.
    (checkpoint / MANIFEST).unlink()

    assert verify_checkpoint(checkpoint)
    assert choose_resume(observe_checkpoints(tmp_path)).step == 200


def test_deleting_removes_the_folder(tmp_path):
    checkpoint = write_checkpoint(tmp_path, 100)

    assert retention.delete_checkpoint(checkpoint)
    assert not checkpoint.exists()


def test_the_quarantine_is_emptied_only_up_to_the_committed_step(tmp_path):
    for step in (100, 200, 300):
        (write_checkpoint(tmp_path, step) / MANIFEST).unlink()
    quarantine(tmp_path, observe_checkpoints(tmp_path))
    write_checkpoint(tmp_path, 200)

    retention.delete_quarantine_before(tmp_path, 200)

    assert [folder.step for folder in list_quarantined(tmp_path)] == [300]
    assert [folder.step for folder in list_folders(tmp_path)] == [200]
