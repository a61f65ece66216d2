"""Settings of proximal policy optimization."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunewright_api.base import SpecModel
from tunewright_api.v1alpha1.reinforcement import Rewards, Tokens

Share = Annotated[float, Field(ge=0, le=1)]
ClipRange = Annotated[float, Field(gt=0, le=10)]


class PPO(SpecModel):
    """Proximal policy optimization (Schulman et al. 2017) with a learned value of every token.

    A rollout is batchSize x gradientAccumulationSteps prompts; maxSteps and epochs count rollouts. The reference is the
    model without its adapter, or with the one that model.continueFrom names.
    """

    rewards: Rewards = Field(description="What answers are rewarded for; the reward is the weighted sum.")
    max_completion_length: Tokens = Field(default=256, description="Tokens per answer; longer ones are cut.")
    max_prompt_length: Tokens | None = Field(
        default=None,
        description="Tokens of the prompt; longer ones lose their beginning. Default: what maxSequenceLength leaves "
        "beside the answer.",
    )
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(
        default=1.0, description="Of sampling; the policy that is trained is the one that is sampled from."
    )
    kl_coefficient: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.05,
        description="Penalty per nat of a token's log-probability above the reference's (Stiennon et al. 2020).",
    )
    clip_range: ClipRange = Field(
        default=0.2, description="The ratio of new to old probability counts up to 1 +/- this."
    )
    value_clip_range: ClipRange = Field(
        default=0.2, description="A value counts up to this far from what it was at the time of the rollout."
    )
    value_coefficient: Annotated[float, Field(gt=0, le=10)] = Field(
        default=0.1, description="Weight of the value loss beside the policy loss."
    )
    gamma: Share = Field(default=1.0, description="Discount per token.")
    lambda_: Share = Field(
        default=0.95,
        alias="lambda",
        description="Decay of generalized advantage estimation (Schulman et al. 2016): 0 trusts the value, 1 the "
        "rewards.",
    )
    epochs: Annotated[int, Field(ge=1, le=100)] = Field(default=4, description="Passes over each rollout.")
    mini_batches: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=1, description="Optimizer steps per pass over a rollout; divides its number of prompts."
    )
    whiten_rewards: bool = Field(
        default=False, description="Scale the rewards of a rollout, KL penalty included, to unit variance."
    )
    missing_eos_penalty: Annotated[float, Field(gt=0, le=1_000_000)] | None = Field(
        default=None, description="Taken off the reward of an answer that has not ended by itself. Default: nothing."
    )
