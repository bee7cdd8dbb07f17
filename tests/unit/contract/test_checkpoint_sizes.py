"""The one formula for the size of a checkpoint."""

import pytest

from finetune_contract.checkpoint_sizes import estimate_checkpoint_bytes, estimate_share_bytes, peak_bytes

SEVEN_BILLION = 6_738_415_616


@pytest.mark.parametrize(
    ("zero_stage", "has_gathered_weights", "per_parameter"),
    [(3, True, 14), (2, True, 16), (1, True, 16), (3, False, 12), (2, False, 14), (1, False, 14)],
)
def test_the_size_of_a_checkpoint_follows_from_the_parameters(zero_stage, has_gathered_weights, per_parameter):
    size = estimate_checkpoint_bytes(
        SEVEN_BILLION, SEVEN_BILLION, zero_stage, has_gathered_weights=has_gathered_weights
    )

    assert size == per_parameter * SEVEN_BILLION


def test_frozen_weights_are_saved_and_have_no_optimizer_state():
    assert estimate_checkpoint_bytes(1000, 50_000, 3) == 12 * 1000 + 2 * 50_000


def test_three_kept_checkpoints_of_a_7b_model_need_377_gigabytes_at_their_fullest():
    assert peak_bytes(estimate_checkpoint_bytes(SEVEN_BILLION, SEVEN_BILLION, 3), 3) == 377_351_274_496


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("num_shares", [1, 3, 8])
def test_the_shares_add_up_to_the_checkpoint(zero_stage, num_shares):
    shares = [
        estimate_share_bytes(SEVEN_BILLION, SEVEN_BILLION, zero_stage, num_shares, is_first=index == 0)
        for index in range(num_shares)
    ]

    whole = estimate_checkpoint_bytes(SEVEN_BILLION, SEVEN_BILLION, zero_stage, has_gathered_weights=False)
    assert whole <= sum(shares) < whole + num_shares
