"""PPO on a model with 32 words: against a naive implementation of the papers, and until it has learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from tests.trainer.conftest import Events, MakeTask, Train
from tunewright_api.v1alpha1.ppo import PPO
from tunewright_trainer import ppo
from tunewright_trainer.ppo_rollout import Prompt, Rollout, Sampler, read_prompts
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, ResultEvent, StepEvent
from tunewright_trainer.rewards import Answer, Reward

pytestmark = pytest.mark.timeout(300)

WORDS = 32
END, PAD = 0, 1
WANTED = "w7"
ANSWER_TOKENS = 8
ROLLOUTS = 36
SETTLED = 12
"""The last rollouts, in which the reward does not rise any more."""
LEARNING_RATE = 5e-3
MAX_DIVERGENCE = 15.0
"""Nats per answer. To say nothing but the wanted word would take some 27: 8 times the log of 1 in 30."""
PINNED = [-0.0846, -0.0849, -0.0661, -0.0790]
LOSS_TOLERANCE = 2e-3
"""Other CPUs add in another order."""
COUNT = 12
ROWS = Dataset.from_list(
    [
        {
            "prompt": list(range(2, 4 + n % 4)),
            "row": json.dumps({"prompt": f"number {n}", "columns": "{}", "place": f"training row {n + 1}"}),
        }
        for n in range(COUNT)
    ]
)
UNUSED = {"rewards": [{"type": "JSON"}]}
"""What the settings name as rewards; these tests hand a function of their own to the recipe."""
SETTINGS = PPO.model_validate({**UNUSED, "maxCompletionLength": ANSWER_TOKENS, "klCoefficient": 0.02})
ALL_SETTINGS = PPO.model_validate(
    {
        **UNUSED,
        "maxCompletionLength": ANSWER_TOKENS,
        "temperature": 0.7,
        "klCoefficient": 0.3,
        "clipRange": 0.1,
        "valueClipRange": 0.05,
        "valueCoefficient": 0.5,
        "gamma": 0.97,
        "lambda": 0.8,
        "whitenRewards": True,
        "missingEosPenalty": 0.5,
    }
)


def share(answers: Sequence[Answer]) -> list[float]:
    """Reward: the share of the wanted word among an answer's words."""
    words = [answer.text.split() for answer in answers]
    return [answer.count(WANTED) / max(1, len(answer)) for answer in words]


REWARDS = [Reward("Share", 1.0, share)]


def prompts_of(count: int) -> list[Prompt]:
    """Return the first prompts."""
    return read_prompts(ROWS, range(count))


def new_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of words w2, w3, ..., with an end and a padding token."""
    words = {"<end>": END, "<pad>": PAD, **{f"w{n}": n for n in range(2, WORDS)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def new_policy() -> PeftModel:
    """A random Llama with an adapter, the same one each time."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Large enough for peaked distributions: the output head itself is not trained.
        initializer_range=0.15,
        eos_token_id=END,
        bos_token_id=None,
        pad_token_id=PAD,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def arguments(tmp_path: Path, **changes: Any) -> TrainingArguments:
    """Rollouts of 16 answers in batches of 8, at a constant learning rate."""
    given: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": ROLLOUTS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
        "report_to": "none",
    }
    return TrainingArguments(**{**given, **changes})


def new_pair(tmp_path: Path, settings: PPO, **changes: Any) -> tuple[Sampler, ppo.Learner]:
    """What rolls out and what learns, on one new policy."""
    learner = ppo.build_learner(new_policy(), arguments(tmp_path, **changes), settings, ROLLOUTS)
    return Sampler(learner.accelerator, learner.model, new_tokenizer(), REWARDS, settings, 8), learner


def run(tmp_path: Path, validation: Dataset | None = None, **changes: Any) -> Events:
    """Train and return the events."""
    events = Events()
    args = arguments(tmp_path, **changes)
    ppo.train_ppo(new_policy(), new_tokenizer(), args, SETTINGS, ROWS, validation, REWARDS, events.append)
    return events


def metrics(events: Events, name: str) -> list[float]:
    """Return one metric of all steps."""
    return [(event.metrics or {})[name] for event in events.of(StepEvent)]


def test_reward_rises_and_divergence_stays_bounded(tmp_path: Path) -> None:
    """36 rollouts teach the wanted word; the penalty keeps the policy within some nats of the reference."""
    events = run(tmp_path, ROWS.select(range(5)))
    reward, divergence = metrics(events, "reward"), metrics(events, "kl")
    assert np.mean(reward[:3]) < 0.15
    assert np.mean(reward[-SETTLED:]) > 0.6, reward
    assert divergence[0] == 0
    assert max(divergence) < MAX_DIVERGENCE, divergence
    before, after = events.of(EvaluationEvent)
    assert (before.step, after.step) == (0, ROLLOUTS)
    assert before.metrics is not None
    assert after.metrics is not None
    assert after.metrics["reward"] > before.metrics["reward"] + 0.4
    assert after.loss < before.loss


def test_same_seed_gives_same_numbers(tmp_path: Path) -> None:
    """Two runs agree to the last digit, and with what was recorded; evaluating in between changes nothing."""
    first = run(tmp_path, max_steps=4)
    second = run(tmp_path, ROWS.select(range(3)), max_steps=4, eval_strategy="steps", eval_steps=2)
    assert [e.step for e in second.of(EvaluationEvent)] == [0, 2, 4]
    timeless = [
        [event.model_dump(exclude={"tokens_per_second"}) for event in events.of(StepEvent)]
        for events in (first, second)
    ]
    assert timeless[0] == timeless[1]
    losses = [event.loss for event in first.of(StepEvent)]
    assert losses == pytest.approx(PINNED, abs=LOSS_TOLERANCE), losses


def test_first_step_has_ratio_one(tmp_path: Path) -> None:
    """Nothing is clipped before anything is learned, and the policy loss is minus the mean advantage."""
    sampler, learner = new_pair(tmp_path, SETTINGS)
    rollout = sampler.roll_out(prompts_of(8))
    advantages_BT, returns_BT = ppo.advantages(rollout, SETTINGS)
    learner.model.train()
    some = torch.tensor([5, 0, 6])
    measured = learner.step(rollout, advantages_BT, returns_BT, some)
    mask_BT = rollout.mask_BT[some]
    mean = (advantages_BT[some] * mask_BT).sum() / mask_BT.sum()
    assert measured["policy_loss"] == pytest.approx(-mean.item(), abs=1e-6)
    assert measured["clip_fraction"] == 0
    assert measured["approximate_kl"] == pytest.approx(0, abs=1e-10)


def test_answers_are_measured_up_to_their_end(tmp_path: Path) -> None:
    """The mask ends with the first end token, log-probabilities are those of the drawn tokens alone."""
    sampler, _ = new_pair(tmp_path, SETTINGS)
    rollout = sampler.roll_out(prompts_of(8))
    length = rollout.mask_BT.shape[1]
    for row in range(8):
        answer = rollout.ids_BS[row, -length:].tolist()
        tokens = answer.index(END) + 1 if END in answer else length
        assert rollout.mask_BT[row].tolist() == [True] * tokens + [False] * (length - tokens)
        assert bool(rollout.ended_B[row]) is (END in answer)
    assert len({int(n) for n in rollout.mask_BT.sum(dim=1)}) > 1, "answers of several lengths"


@pytest.mark.parametrize("settings", [SETTINGS, ALL_SETTINGS], ids=["defaults", "everything"])
def test_losses_equal_those_of_a_naive_implementation(settings: PPO, tmp_path: Path) -> None:
    """Same rollout, same losses, rollout after rollout and epoch after epoch: without padding or batches."""
    settings = settings.model_copy(update={"epochs": 1})
    sampler, learner = new_pair(tmp_path, settings)
    naive = Naive(new_policy(), settings)
    set_seed(3)
    for _ in range(3):
        rollout = sampler.roll_out(prompts_of(COUNT))
        answers = naive.judge(*answers_of(rollout))
        for _ in range(3):
            measured = learner.update(rollout)
            expected = naive.update(answers)
            assert {name: measured[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert rollout.kl_BT.abs().max() > 0.01, "the penalty was put to the test"


@pytest.mark.timeout(900)  # one answer at a time: a minute of a free core
def test_reward_is_that_of_a_naive_implementation_at_equal_samples(tmp_path: Path) -> None:
    """Both see as many answers as the other, and end with rewards within 10 %."""
    ours = metrics(run(tmp_path), "reward")
    naive = Naive(new_policy(), SETTINGS)
    set_seed(2)
    theirs = []
    for _ in range(ROLLOUTS):
        prompts = [ROWS[int(torch.randint(COUNT, ()))]["prompt"] for _ in range(16)]
        drawn = [naive.draw(prompt) for prompt in prompts]
        texts = [" ".join(f"w{token}" for token in answer if token not in (END, PAD)) for answer in drawn]
        scores = share([Answer("", text, 0, {}) for text in texts])
        answers = naive.judge(prompts, drawn, scores)
        for _ in range(SETTINGS.epochs):
            naive.update(answers)
        theirs.append(float(np.mean(scores)))
    assert np.mean(ours[-SETTLED:]) == pytest.approx(np.mean(theirs[-SETTLED:]), rel=0.1), (ours, theirs)


def answers_of(rollout: Rollout) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Return the prompts, the answers and the scores of a rollout, without padding."""
    length = rollout.mask_BT.shape[1]
    prompts = [
        ids[mask.bool()].tolist()
        for ids, mask in zip(rollout.ids_BS[:, :-length], rollout.mask_BS[:, :-length], strict=True)
    ]
    answers = [ids[mask].tolist() for ids, mask in zip(rollout.ids_BS[:, -length:], rollout.mask_BT, strict=True)]
    return prompts, answers, rollout.scores_B.tolist()


METHODS = {
    "LoRA": {"type": "LoRA"},
    "QLoRA": {"type": "QLoRA", "quantization": {"bits": 4}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_an_adapter_and_its_value_head(
    method: str, make_task: MakeTask, train: Train, tmp_path: Path
) -> None:
    """The whole recipe, on rows with a right answer: plan, rewards by name, evaluation, samples, files that reload."""
    rows = [{"prompt": f"What is {n} plus {n}?", "columns": json.dumps({"answer": str(2 * n)})} for n in range(6)]
    settings = {
        "rewards": [
            {"type": "Length", "length": {"maxTokens": 4}},
            {"type": "ExactMatch", "weight": 2.0},
            {"type": "Regex", "weight": -0.5, "regex": {"pattern": "a"}},
        ],
        "maxCompletionLength": 8,
        "miniBatches": 2,
        "epochs": 2,
    }
    task = make_task(
        rows=rows,
        validation=rows[:3],
        row_format="Prompts",
        objective={"type": "PPO", "ppo": settings},
        method=METHODS[method],
        hyperparameters={"maxSteps": 3, "batchSize": 2, "gradientAccumulationSteps": 2, "maxSequenceLength": 24},
    )
    events = train(task)
    (plan,) = events.of(PlanEvent)
    assert (plan.total_steps, plan.train_rows) == (3, 6)
    assert plan.cut_rows == 6, "16 tokens are left for a prompt"
    steps = events.of(StepEvent)
    assert [step.step for step in steps] == [1, 2, 3]
    for step in steps:
        found = step.metrics or {}
        parts = [found[f"rewards/{name}/mean"] for name in ("Length", "ExactMatch", "Regex")]
        assert found["reward"] == pytest.approx(parts[0] + 2 * parts[1] - 0.5 * parts[2], abs=1e-6)
        assert set(found) >= {"kl", "entropy", "policy_loss", "value_loss", "clip_fraction"}
    assert [event.step for event in events.of(EvaluationEvent)] == [0, 2, 3], "8 of 6 prompts are seen after step 2"
    (result,) = events.of(ResultEvent)
    assert (result.kind, result.steps) == ("Adapter", 3)
    assert result.reload_max_difference < 1e-4
    head = load_file(task.output_path / "adapter" / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {"weight": (1, 64), "bias": (1,)}
    assert all(tensor.abs().sum() > 0 for tensor in head.values()), "it was trained"
    samples = json.loads((task.output_path / "samples.json").read_text())
    assert [sample["expected"] for sample in samples] == ["0", "2", "4"]


class Naive:
    """PPO as the papers have it: one answer after the other, without padding or batches."""

    def __init__(self, policy: PeftModel, settings: PPO) -> None:
        self.policy = policy
        self.settings = settings
        self.value = nn.Linear(32, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.trained = [p for p in policy.parameters() if p.requires_grad] + list(self.value.parameters())
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=0.0)

    def draw(self, prompt: list[int]) -> list[int]:
        """Draw an answer token by token."""
        answer: list[int] = []
        while len(answer) < ANSWER_TOKENS and END not in answer:
            with torch.no_grad():
                logits = self.policy(input_ids=torch.tensor([prompt + answer])).logits[0, -1]
            answer.append(int(torch.multinomial((logits / self.settings.temperature).softmax(-1), 1)))
        return answer

    def measure(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probability and value of each token of an answer."""
        out = self.policy(input_ids=torch.tensor([prompt + answer]), output_hidden_states=True)
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logprobs_TV = (out.logits[0, before] / self.settings.temperature).log_softmax(-1)
        return logprobs_TV[range(len(answer)), answer], self.value(out.hidden_states[-1][0, before])[:, 0]

    @torch.no_grad()
    def judge(self, prompts: list[list[int]], answers: list[list[int]], scores: list[float]) -> list[dict[str, Any]]:
        """Return what an update needs to know of each answer."""
        settings = self.settings
        judged: list[dict[str, Any]] = []
        for prompt, answer, score in zip(prompts, answers, scores, strict=True):
            logprobs, values = self.measure(prompt, answer)
            with self.policy.disable_adapter():
                reference, _ = self.measure(prompt, answer)
            rewards = [-settings.kl_coefficient * float(p - r) for p, r in zip(logprobs, reference, strict=True)]
            rewards[-1] += score
            if settings.missing_eos_penalty is not None and answer[-1] != END:
                rewards[-1] -= settings.missing_eos_penalty
            judged.append(
                {"prompt": prompt, "answer": answer, "old": logprobs, "values": values.tolist(), "rewards": rewards}
            )
        if settings.whiten_rewards:
            every = np.concatenate([item["rewards"] for item in judged])
            for item in judged:
                item["rewards"] = [(r - every.mean()) / every.std() + every.mean() for r in item["rewards"]]
        for item in judged:
            item["advantages"], item["returns"] = self.estimate(item["rewards"], item["values"])
        every = np.concatenate([item["advantages"] for item in judged])
        for item in judged:
            item["advantages"] = [(a - every.mean()) / every.std() for a in item["advantages"]]
        return judged

    def estimate(self, rewards: list[float], values: list[float]) -> tuple[list[float], list[float]]:
        """Return advantages as the sum of discounted errors, and returns."""
        gamma, lam, length = self.settings.gamma, self.settings.lambda_, len(rewards)
        after = [*values[1:], 0.0]
        deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(length)]
        advantages = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        return advantages, [a + v for a, v in zip(advantages, values, strict=True)]

    def update(self, judged: list[dict[str, Any]]) -> dict[str, float]:
        """Take one optimizer step on all answers and return the losses before it."""
        settings = self.settings
        count = sum(len(item["answer"]) for item in judged)
        policy_loss = value_loss = 0.0
        self.optimizer.zero_grad()
        for item in judged:
            logprobs, values = self.measure(item["prompt"], item["answer"])
            advantages, aims, old_values = (torch.tensor(item[name]) for name in ("advantages", "returns", "values"))
            ratio = (logprobs - item["old"]).exp()
            kept = ratio.clip(1 - settings.clip_range, 1 + settings.clip_range)
            surrogate = -torch.min(ratio * advantages, kept * advantages).sum() / count
            near = torch.clip(values, old_values - settings.value_clip_range, old_values + settings.value_clip_range)
            error = torch.max((values - aims) ** 2, (near - aims) ** 2).sum() / 2 / count
            (surrogate + settings.value_coefficient * error).backward()
            policy_loss += surrogate.item()
            value_loss += error.item()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return {"policy_loss": policy_loss, "value_loss": value_loss}
