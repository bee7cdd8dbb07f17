"""What the ranks verify before a resume, and what keeps the rows of a step when their number changes."""

import dataclasses

import pytest

from finetune_contract.reports import ExitCode
from finetune_contract.run_config import TrainingConfig
from finetune_trainer.checkpoints.layout import list_quarantined
from finetune_trainer.errors import TrainerError
from finetune_trainer.training.resuming import choose_checkpoint, select_share
from finetune_trainer.training.schedule import count_rows_per_step, keep_rows_per_step
from tests.support.checkpoints import write_checkpoint

FILES = [
    *(f"global_step5/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(4)),
    *(f"rng_state_{rank}.pth" for rank in range(4)),
    *("scheduler.pt", "trainer_state.json", "latest"),
]
BATCH_4 = TrainingConfig(per_device_batch_size=4, gradient_accumulation_steps=2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_the_ranks_verify_every_file_once(num_ranks):
    shares = [select_share(FILES, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(name for share in shares for name in share) == sorted(FILES)


def test_a_rank_verifies_what_it_is_about_to_load():
    for rank in range(4):
        share = select_share(FILES, rank, 4)
        assert f"global_step5/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" in share
        assert f"rng_state_{rank}.pth" in share


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)])
def test_the_accumulation_keeps_the_rows_per_step(num_ranks, accumulation):
    kept = keep_rows_per_step(BATCH_4, 64, num_ranks)
    assert kept.gradient_accumulation_steps == accumulation
    assert count_rows_per_step(num_ranks, kept) == 64


@pytest.mark.parametrize(
    ("num_ranks", "batch", "remedy"),
    [(3, 4, "nodes x processesPerNode is one of 1, 2, 4, 8, 16, 32, 64"), (4, 5, "perDeviceBatchSize to one of 1, 2,")],
)
def test_ranks_that_cannot_take_the_rows_are_told_which_can(num_ranks, batch, remedy):
    training = dataclasses.replace(BATCH_4, per_device_batch_size=batch)
    with pytest.raises(TrainerError) as caught:
        keep_rows_per_step(training, 64, num_ranks)
    assert caught.value.exit_code == ExitCode.CONFIG
    assert remedy in caught.value.hint


class OneRank:
    """The agreement of a rank that is alone."""

    rank, size = 0, 1

    def decide(self, decision):
        return decision()

    def gather(self, value):
        return [value]


def test_a_checkpoint_with_damaged_content_is_set_aside_and_the_one_before_is_taken(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / f"global_step{step}" / "shard_0.pt").write_bytes(b"SHARD  0")

    assert choose_checkpoint(tmp_path, "LatestComplete", OneRank()).step == 1
    assert [folder.step for folder in list_quarantined(tmp_path)] == [2, 3]


def test_with_every_checkpoint_damaged_the_run_begins_anew_and_nothing_is_deleted(tmp_path):
    write_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "latest").write_text("global_stepX")

    assert choose_checkpoint(tmp_path, "LatestComplete", OneRank()) is None
    assert [folder.step for folder in list_quarantined(tmp_path)] == [1]
