"""What PPO learns from: the policy with its value head, and the answers it gives to prompts.

Shapes: B prompts, P tokens of the prompt, T tokens of the answer, S tokens of both, V vocabulary, D hidden size.
Prompts are padded on the left and answers on the right, so that all answers of a rollout begin at the same place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.trainer.utils import entropy_from_logits, pad, selective_log_softmax, use_adapter

from tunewright_api.v1alpha1.ppo import PPO
from tunewright_trainer import ppo_math
from tunewright_trainer.rewards import Answer, Reward


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens and as the data has it, with the further columns and the place of its row."""

    input_ids: list[int]
    prompt: str | list[dict[str, str]]
    columns: Mapping[str, Any]
    place: str


def read_prompts(rows: Dataset, indices: Iterable[int]) -> list[Prompt]:
    """Return some of the rows that `prompt_rows` wrote."""
    found = rows[list(indices)]
    prompts = []
    for input_ids, document in zip(found["prompt"], found["row"], strict=True):
        values = json.loads(document)
        prompts.append(Prompt(input_ids, values["prompt"], json.loads(values["columns"]), values["place"]))
    return prompts


REFERENCE = "reference"
"""Name of the frozen copy of an adapter that training goes on from."""


def add_reference(policy: PeftModel) -> None:
    """Keep a copy of the adapter as it is now: the reference of a policy that goes on from it."""
    policy.add_adapter(REFERENCE, policy.peft_config["default"])
    for name, parameter in policy.named_parameters():
        if ".default." in name:
            policy.get_parameter(name.replace(".default.", f".{REFERENCE}.")).data.copy_(parameter.data)


def reference(policy: PeftModel) -> AbstractContextManager[None]:
    """Make the policy its reference for a while: the kept copy of its adapter, or the model without any."""
    switched: AbstractContextManager[None] = use_adapter(policy, REFERENCE if REFERENCE in policy.peft_config else None)
    return switched


class ActorCritic(nn.Module):
    """The policy, and the value of each state in which it chose a token; one pass gives both.

    The value is read from the last hidden state by one linear layer. A new one starts at zero: before it has learned
    anything, an advantage is what the answer earned.
    """

    def __init__(self, policy: PeftModel, temperature: float) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.value_head = nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, ids_BS: Tensor, mask_BS: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model over prompts and answers.

        Args:
            ids_BS: Prompts and answers.
            mask_BS: 1 on their tokens, 0 on padding.
            length: T, tokens of the answers at the end of each row.

        Returns:
            For each of the T tokens its log-probability, the entropy of the distribution it was drawn from (without
            gradient) and the value of the state before it.
        """
        outputs = self.policy(
            input_ids=ids_BS,
            attention_mask=mask_BS,
            position_ids=(mask_BS.cumsum(dim=1) - 1).clamp(min=0),  # padding on the left takes no position
            logits_to_keep=length + 1,
            output_hidden_states=True,
            use_cache=False,
        )
        # The token at position t is predicted at t - 1. float32: a ratio of probabilities near 1 needs the digits.
        logits_BTV = outputs.logits[:, :-1].float() / self.temperature
        logprobs_BT = selective_log_softmax(logits_BTV, ids_BS[:, -length:])
        entropy_BT = entropy_from_logits(logits_BTV.detach())
        hidden_BTD = outputs.hidden_states[-1][:, -length - 1 : -1]
        # A value is a number on a scale, not a direction: bfloat16 would round it to three digits.
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            values_BT = self.value_head(hidden_BTD.float()).squeeze(-1)
        return logprobs_BT, entropy_BT, values_BT


@dataclass(frozen=True)
class Rollout:
    """Answers of the policy, and what it and the reference made of them at that time.

    Attributes:
        ids_BS: Prompts and answers.
        mask_BS: 1 on their tokens, 0 on padding.
        mask_BT: True on the answers' tokens, their end included.
        logprobs_BT: Of the policy.
        entropy_BT: Of the policy.
        values_BT: Of the states before each token.
        kl_BT: Log-ratio of policy and reference.
        scores_B: The weighted sum of the rewards.
        ended_B: The answer ended by itself.
        reward_means: Mean of each reward over the answers, by name.
    """

    ids_BS: Tensor
    mask_BS: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    entropy_BT: Tensor
    values_BT: Tensor
    kl_BT: Tensor
    scores_B: Tensor
    ended_B: Tensor
    reward_means: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Return means over answers, KL in nats per answer; that of entropy is over tokens."""
        return {
            "reward": self.scores_B.mean().item(),
            "reward_std": self.scores_B.std(correction=0).item(),
            "kl": self.kl_BT.sum(dim=1).mean().item(),
            "entropy": ppo_math.masked_mean(self.entropy_BT, self.mask_BT).item(),
            "completions/mean_length": self.mask_BT.sum(dim=1).float().mean().item(),
            "completions/clipped_ratio": 1 - self.ended_B.float().mean().item(),
            # Last, because the status holds a limited number of metrics and there may be several rewards.
            **{f"rewards/{name}/mean": mean for name, mean in self.reward_means.items()},
        }


@dataclass(frozen=True)
class Sampler:
    """Rolls the policy out.

    Attributes:
        accelerator: Knows the number format of the passes.
        model: Policy and value head, prepared by the accelerator.
        tokenizer: Of the policy.
        rewards: What answers are rewarded for.
        settings: Of PPO.
        batch_size: Prompts per forward pass.
    """

    accelerator: Accelerator
    model: ActorCritic
    tokenizer: PreTrainedTokenizerBase
    rewards: Sequence[Reward]
    settings: PPO
    batch_size: int

    @torch.no_grad()
    def roll_out(self, prompts: Sequence[Prompt]) -> Rollout:
        """Answer the prompts, and let policy, reference and rewards judge the answers."""
        self.model.eval()
        prompt_ids_BP = self._padded([prompt.input_ids for prompt in prompts], self._pad_id)
        prompt_mask_BP = self._padded([[1] * len(prompt.input_ids) for prompt in prompts], 0)
        answers_BT = self._answers(prompt_ids_BP, prompt_mask_BP)
        mask_BT, ended_B = answer_mask(answers_BT, self._end_ids)
        ids_BS = torch.cat([prompt_ids_BP, answers_BT], dim=1)
        mask_BS = torch.cat([prompt_mask_BP, mask_BT.long()], dim=1)
        logprobs_BT, entropy_BT, values_BT = self._judge(ids_BS, mask_BS, answers_BT.shape[1])
        with reference(self.model.policy):
            reference_BT, _, _ = self._judge(ids_BS, mask_BS, answers_BT.shape[1])
        scores_B, reward_means = self._scores(prompts, answers_BT, mask_BT)
        return Rollout(
            ids_BS=ids_BS,
            mask_BS=mask_BS,
            mask_BT=mask_BT,
            logprobs_BT=logprobs_BT,
            entropy_BT=entropy_BT,
            values_BT=values_BT,
            kl_BT=ppo_math.kl(logprobs_BT, reference_BT, mask_BT),
            scores_B=scores_B,
            ended_B=ended_B,
            reward_means=reward_means,
        )

    def _answers(self, ids_BP: Tensor, mask_BP: Tensor) -> Tensor:
        """Draw answers, padded to the longest one; behind an answer's end its tokens mean nothing."""
        settings = self.settings
        config = GenerationConfig(
            max_new_tokens=settings.max_completion_length,
            do_sample=True,
            temperature=settings.temperature,
            # Whatever the model's own generation_config.json cuts off or punishes: the tokens must be drawn from the
            # distribution whose log-probabilities are trained.
            top_k=0,
            top_p=1.0,
            typical_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=self._end_ids,
            pad_token_id=self._pad_id,
        )
        answers: list[Tensor] = []
        for ids, mask in zip(ids_BP.split(self.batch_size), mask_BP.split(self.batch_size), strict=True):
            with self.accelerator.autocast():
                generated = self.model.policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            answers += generated[:, ids.shape[1] :]
        return cast("Tensor", pad(answers, padding_value=self._pad_id))

    def _judge(self, ids_BS: Tensor, mask_BS: Tensor, length: int) -> tuple[Tensor, ...]:
        batches = zip(ids_BS.split(self.batch_size), mask_BS.split(self.batch_size), strict=True)
        columns = zip(*(self.model(ids, mask, length) for ids, mask in batches), strict=True)
        return tuple(torch.cat(column) for column in columns)

    def _scores(
        self, prompts: Sequence[Prompt], answers_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted sum of the rewards of each answer, and the mean of each reward."""
        answers = []
        for prompt, answer_T, mask_T in zip(prompts, answers_BT, mask_BT, strict=True):
            text = cast("str", self.tokenizer.decode(answer_T[mask_T], skip_special_tokens=True))
            answers.append(Answer(prompt.prompt, text, int(mask_T.sum()), prompt.columns, prompt.place))
        scores_B = torch.zeros(len(answers), device=answers_BT.device)
        means: dict[str, float] = {}
        for reward in self.rewards:
            scores = reward.score(answers)
            means[reward.name] = fmean(scores)
            scores_B += reward.weight * torch.tensor(scores, device=scores_B.device)
        return scores_B, means

    def _padded(self, rows: Sequence[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(row, device=self.model.policy.device) for row in rows]
        return cast("Tensor", pad(tensors, padding_value=value, padding_side="left"))

    @property
    def _pad_id(self) -> int:
        return cast("int", self.tokenizer.pad_token_id)

    @property
    def _end_ids(self) -> list[int]:
        """Tokens that end an answer."""
        ends: int | list[int] = self.model.policy.generation_config.eos_token_id or self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [ends]


def answer_mask(answers_BT: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return where the answers' tokens are, up to and with the first one that ends them, and which ones ended."""
    ends_BT = torch.isin(answers_BT, torch.tensor(end_ids, device=answers_BT.device))
    return ends_BT.cumsum(dim=1) - ends_BT.long() == 0, ends_BT.any(dim=1)
