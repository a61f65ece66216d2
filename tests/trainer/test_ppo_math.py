"""The arithmetic of PPO against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tunewright_trainer import ppo_math

MASK_BT = torch.tensor([[True, True, True], [True, False, False]])


def test_masked_mean_leaves_padding_out() -> None:
    """(1 + 2 + 3 + 6) / 4, whatever stands behind the end of the second answer."""
    x_BT = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, 100.0]])
    assert ppo_math.masked_mean(x_BT, MASK_BT).item() == 3.0


@pytest.mark.parametrize(
    ("shift_mean", "expected"),
    [(True, [[-1.0, -1.0, 1.0], [1.0, 0.0, 0.0]]), (False, [[2.0, 2.0, 4.0], [4.0, 0.0, 0.0]])],
)
def test_whiten_scales_to_unit_variance(shift_mean: bool, expected: list[list[float]]) -> None:
    """1, 1, 5, 5 have mean 3 and standard deviation 2; padding stays 0."""
    x_BT = torch.tensor([[1.0, 1.0, 5.0], [5.0, 9.0, 9.0]])
    whitened = ppo_math.whiten(x_BT, MASK_BT, shift_mean=shift_mean)
    torch.testing.assert_close(whitened, torch.tensor(expected))


def test_whiten_survives_equal_numbers() -> None:
    """Equal numbers become 0 instead of NaN."""
    assert ppo_math.whiten(torch.ones(2, 3), MASK_BT).abs().max().item() == 0.0


def test_kl_is_the_log_ratio_of_the_drawn_tokens() -> None:
    """log 0.5 - log 0.25 is log 2; padding counts nothing."""
    logprobs = torch.tensor([[0.5, 0.5, 0.25], [0.5, 0.5, 0.5]]).log()
    reference = torch.tensor([[0.25, 0.5, 0.5], [0.5, 0.1, 0.1]]).log()
    expected = torch.tensor([[math.log(2), 0.0, -math.log(2)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(ppo_math.kl(logprobs, reference, MASK_BT), expected)


def test_score_is_added_to_the_last_token() -> None:
    """The first answer ends at its third token, the second at its first."""
    kl_BT = torch.tensor([[1.0, 2.0, -1.0], [4.0, 7.0, 7.0]])
    rewards = ppo_math.token_rewards(torch.tensor([10.0, 20.0]), kl_BT, MASK_BT, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, -1.0, 10.5], [18.0, 0.0, 0.0]]))


def test_gae_equals_the_recursion_by_hand() -> None:
    """gamma 0.5, lambda 0.5.

    First answer: delta = 3 - 2 = 1; 0 + 0.5 * 2 - 4 = -3; 1 + 0.5 * 4 - 1 = 2,
    A = 1; -3 + 0.25 * 1 = -2.75; 2 + 0.25 * -2.75 = 1.3125. Second: 5 - 1 = 4.
    """
    rewards = torch.tensor([[1.0, 0.0, 3.0], [5.0, 8.0, 8.0]])
    values = torch.tensor([[1.0, 4.0, 2.0], [1.0, 9.0, 9.0]])
    advantages, returns = ppo_math.gae(rewards, values, MASK_BT, 0.5, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.3125, -2.75, 1.0], [4.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[2.3125, 1.25, 3.0], [5.0, 0.0, 0.0]]))


@pytest.mark.parametrize(("lam", "expected"), [(1.0, [5.0, 5.0, 2.0]), (0.0, [0.0, 3.0, 2.0])])
def test_gae_has_its_two_limits(lam: float, expected: list[float]) -> None:
    """Lambda 1 gives the rewards to come less the value (6 - 1, 4 + 1, 3 - 1), lambda 0 the error of one step."""
    rewards, values = torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([[1.0, -1.0, 1.0]])
    advantages, _ = ppo_math.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, lam)
    torch.testing.assert_close(advantages, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        pytest.param(1.0, 2.0, -2.0, False, id="unmoved"),
        pytest.param(1.1, 2.0, -2.2, False, id="within the range"),
        pytest.param(1.5, 2.0, -2.4, True, id="a good token gains no more above the range"),
        pytest.param(0.5, 2.0, -1.0, False, id="a good token may come back from below"),
        pytest.param(0.5, -2.0, 1.6, True, id="a bad token gains no more below the range"),
        pytest.param(1.5, -2.0, 3.0, False, id="a bad token may come back from above"),
    ],
)
def test_policy_loss_is_clipped_on_the_side_of_gain(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    """-min(ratio A, clip(ratio, 0.8, 1.2) A)."""
    old = torch.tensor([[math.log(0.3)]])
    got, where = ppo_math.policy_loss(old + math.log(ratio), old, torch.tensor([[advantage]]), 0.2)
    assert got.item() == pytest.approx(loss)
    assert where.item() is clipped


@pytest.mark.parametrize(
    ("value", "target", "loss"),
    [
        pytest.param(1.1, 2.0, 0.405, id="within the range: 0.9 squared, halved"),
        pytest.param(1.5, 2.0, 0.32, id="above it: V counts as 1.2"),
        pytest.param(3.0, 2.0, 0.5, id="past the target: the larger error, 1"),
        pytest.param(0.5, 2.0, 1.125, id="the wrong way: the larger error, 1.5"),
    ],
)
def test_value_loss_is_the_larger_of_two_errors(value: float, target: float, loss: float) -> None:
    """The old value is 1, the range 0.2."""
    got = ppo_math.value_loss(torch.tensor([[value]]), torch.tensor([[1.0]]), torch.tensor([[target]]), 0.2)
    assert got.item() == pytest.approx(loss)
