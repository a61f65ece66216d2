"""What the model learns from its rows: the objective of a FineTuneJob and its settings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import Rule, SpecModel
from tunewright_api.v1alpha1.ppo import PPO
from tunewright_api.v1alpha1.reinforcement import GRPO, ExactMatch, RewardSource

ObjectiveType = Literal["SFT", "DPO", "KTO", "Reward", "GRPO", "PPO", "Classification"]
PreferenceLoss = Literal[
    "Sigmoid", "Hinge", "IPO", "EXOPair", "NCAPair", "Robust", "BCOPair", "SPPOHard", "AOT", "AOTUnpaired", "APOZero",
    "APODown", "DiscoPOP",
]  # fmt: skip

Beta = Annotated[float, Field(gt=0, le=10)]
PromptLength = Annotated[int, Field(ge=1, le=1_048_576)]


class SFT(SpecModel):
    """Supervised fine-tuning: the next token of known answers."""

    loss: Literal["Answers", "AllTokens"] | None = Field(
        default=None,
        description="Tokens that are learned: only the answers, or the whole row. Default: Answers wherever the rows "
        "have a prompt, else AllTokens.",
    )


class DPO(SpecModel):
    """Direct preference optimization (Rafailov et al. 2023). The reference is the model as it was before training."""

    beta: Beta = Field(default=0.1, description="Weight of staying close to the reference: 0.01 to 0.5 are usual.")
    loss: PreferenceLoss = Field(default="Sigmoid", description="Form of the loss; Sigmoid is that of the paper.")
    # A bound of 0.5 would be 0 to the API server where the value is the whole number 0.
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = Field(
        default=0.0, description="Share of labels taken to be wrong (losses Sigmoid, Robust and EXOPair)."
    )
    max_prompt_length: PromptLength | None = Field(
        default=None,
        description="Tokens of the prompt; longer ones lose their beginning. Default: no limit.",
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "(has(self.labelSmoothing) ? self.labelSmoothing : 0.0) == 0.0 || "
            "(has(self.loss) ? self.loss : 'Sigmoid') in ['Sigmoid', 'Robust', 'EXOPair']",
            "dpo.labelSmoothing is only for the losses Sigmoid, Robust and EXOPair",
            lambda d: d.label_smoothing == 0 or d.loss in ("Sigmoid", "Robust", "EXOPair"),
        ),
        Rule(
            "(has(self.loss) ? self.loss : 'Sigmoid') != 'EXOPair' || "
            "(has(self.labelSmoothing) ? self.labelSmoothing : 0.0) > 0.0",
            "dpo.loss EXOPair needs a dpo.labelSmoothing above 0, such as 0.001",
            lambda d: d.loss != "EXOPair" or d.label_smoothing > 0,
        ),
    )


class KTO(SpecModel):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): answers that are good or bad, without a pair."""

    beta: Beta = Field(default=0.1, description="Weight of staying close to the reference.")
    loss: Literal["KTO", "APOZeroUnpaired"] = Field(default="KTO", description="Form of the loss.")
    desirable_weight: Annotated[float, Field(gt=0, le=100)] = Field(
        default=1.0, description="Weight of good answers; weight times number should be alike for good and bad ones."
    )
    undesirable_weight: Annotated[float, Field(gt=0, le=100)] = Field(default=1.0, description="Weight of bad answers.")
    max_prompt_length: PromptLength | None = Field(
        default=None,
        description="Tokens of the prompt; longer ones lose their beginning. Default: no limit.",
    )


class Reward(SpecModel):
    """A reward model: one number per answer, higher for the better one (Bradley and Terry 1952)."""

    center_rewards: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="Weight of a term that keeps rewards near zero (Eisenstein et al. 2023), 0.01 is usual. "
        "Default: none.",
    )


class Classification(SpecModel):
    """One of several labels per text."""

    labels: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        default=None,
        min_length=2,
        max_length=1000,
        description="All labels, in the order of the model's outputs. Default: those of the training rows, sorted.",
    )


def _only_with(field: str, kind: str) -> Rule:
    return Rule(
        f"!has(self.{field}) || (has(self.type) ? self.type : 'SFT') == '{kind}'",
        f"objective.{field} is only for objective.type {kind}: remove it or change the type",
        lambda o: getattr(o, field) is None or o.type == kind,
    )


class Objective(SpecModel):
    """What is learned; the block of the same name holds its settings."""

    type: ObjectiveType = Field(
        default="SFT",
        description="SFT learns answers, DPO and KTO preferences, Reward a score, GRPO and PPO what is "
        "rewarded, Classification a label.",
    )
    sft: SFT | None = Field(default=None, description="Settings of SFT.")
    dpo: DPO | None = Field(default=None, description="Settings of DPO.")
    kto: KTO | None = Field(default=None, description="Settings of KTO.")
    reward: Reward | None = Field(default=None, description="Settings of Reward.")
    grpo: GRPO | None = Field(default=None, description="Settings of GRPO; its rewards are required.")
    ppo: PPO | None = Field(default=None, description="Settings of PPO; its rewards are required.")
    classification: Classification | None = Field(default=None, description="Settings of Classification.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        _only_with("sft", "SFT"),
        _only_with("dpo", "DPO"),
        _only_with("kto", "KTO"),
        _only_with("reward", "Reward"),
        _only_with("classification", "Classification"),
        Rule(
            "((has(self.type) ? self.type : 'SFT') == 'GRPO') == has(self.grpo)",
            "objective.grpo belongs to objective.type GRPO: GRPO needs its rewards, the other types forbid it",
            lambda o: (o.type == "GRPO") == (o.grpo is not None),
        ),
        Rule(
            "((has(self.type) ? self.type : 'SFT') == 'PPO') == has(self.ppo)",
            "objective.ppo belongs to objective.type PPO: PPO needs its rewards, the other types forbid it",
            lambda o: (o.type == "PPO") == (o.ppo is not None),
        ),
    )

    @property
    def rewards(self) -> list[RewardSource]:
        """What answers are rewarded for; empty for objectives that learn from rows alone."""
        block = self.grpo or self.ppo
        return block.rewards if block is not None else []

    @property
    def reward_columns(self) -> list[str]:
        """Columns of the rows that rewards compare answers with."""
        return [(r.exact_match or ExactMatch()).column for r in self.rewards if r.type == "ExactMatch"]

    @property
    def labels(self) -> list[str]:
        """All labels that rows may have; empty where the training rows say which there are."""
        return (self.classification.labels if self.classification is not None else None) or []
