"""The arithmetic of proximal policy optimization, with the papers' names; nothing here knows of models.

PPO: Schulman et al. 2017. GAE: Schulman et al. 2016. KL penalty per token: Stiennon et al. 2020, Ouyang et al. 2022.

Shapes: B answers, T tokens of the longest one. `mask_BT` is True on an answer's tokens and False on the padding behind
them; what a function returns is 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8
"""Added to a variance that is divided by."""


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over all tokens of all answers."""
    return (x_BT * mask_BT).sum() / mask_BT.sum()


def whiten(x_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 over all tokens of all answers.

    Args:
        x_BT: The numbers.
        mask_BT: The tokens that count.
        shift_mean: To mean 0 as well; rewards keep theirs, because its sign says what is good.
    """
    mean = masked_mean(x_BT, mask_BT)
    variance = masked_mean((x_BT - mean) ** 2, mask_BT)
    whitened_BT = (x_BT - mean) * torch.rsqrt(variance + _EPSILON)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    return whitened_BT * mask_BT


def kl(logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return each token's share of the estimated KL divergence of policy and reference, in nats.

    Tokens are drawn from the policy, so the mean of the log-ratio is the divergence; a single one may be negative.
    """
    return (logprobs_BT - reference_BT) * mask_BT


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coefficient: float) -> Tensor:
    """Return the reward of every token: the KL penalty, and on the last one the score of the whole answer."""
    rewards_BT = -kl_coefficient * kl_BT * mask_BT
    last_B1 = mask_BT.sum(dim=1, keepdim=True) - 1
    return rewards_BT.scatter_add(1, last_B1, scores_B[:, None])


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Estimate advantages by generalized advantage estimation.

    delta_t = r_t + gamma V_(t+1) - V_t and A_t = delta_t + gamma lambda A_(t+1); behind the last token both are 0.

    Args:
        rewards_BT: Reward of each token.
        values_BT: Value of the state in which each token was chosen.
        mask_BT: The tokens that count.
        gamma: Discount per token.
        lam: Decay of the estimator.

    Returns:
        Advantages A_t, and returns A_t + V_t, which the value is to become.
    """
    advantage_B = next_value_B = torch.zeros_like(values_BT[:, 0])
    advantages: list[Tensor] = []
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = (delta_B + gamma * lam * advantage_B) * mask_BT[:, t]
        next_value_B = values_BT[:, t] * mask_BT[:, t]
        advantages.append(advantage_B)
    advantages_BT = torch.stack(advantages[::-1], dim=1)
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def policy_loss(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate loss of every token, and where clipping took effect.

    L = -min(ratio A, clip(ratio, 1 - range, 1 + range) A) with ratio = pi / pi_old.
    """
    ratio_BT = torch.exp(logprobs_BT - old_logprobs_BT)
    unclipped_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped_BT, clipped_BT), clipped_BT > unclipped_BT


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, value_clip_range: float) -> Tensor:
    """Return half the squared error of every token's value, or that of V held near its old value if it is larger."""
    near_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip_range, value_clip_range)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (near_BT - returns_BT) ** 2)
