"""PPO: the model's own answers are scored, and it learns to give the better ones, held near the model that it was.

Schulman et al. 2017, with the KL penalty per token of Stiennon et al. 2020 and Ouyang et al. 2022. One model is all of
it: with its adapter the policy, without it (or with the adapter that it went on from) the reference, and a linear layer
on top of the policy gives the value.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, get_scheduler, set_seed
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.utils import disable_dropout_in_model

from tunewright_api.v1alpha1.ppo import PPO
from tunewright_trainer import grpo, ppo_math, recipe, result, reward_function, samples, verify
from tunewright_trainer.adapter import adapter_config
from tunewright_trainer.arguments import ppo_arguments
from tunewright_trainer.callback import Report, check_loss
from tunewright_trainer.errors import InvalidAdapter
from tunewright_trainer.ppo_rollout import (
    ActorCritic,
    Prompt,
    Rollout,
    Sampler,
    add_reference,
    read_prompts,
    reference,
)
from tunewright_trainer.protocol import EvaluationEvent, StageEvent, StepEvent, WorkerTask
from tunewright_trainer.recipe import Setup, Trained
from tunewright_trainer.reward_models import load_reward_models
from tunewright_trainer.rewards import Reward, Score, build_rewards
from tunewright_trainer.world import ALONE, World

VALUE_HEAD_FILE = "value_head.safetensors"
"""Beside the adapter: for going on with the training, of no use for anything else."""

_WITHIN_ROLLOUT = ("reward_std", "entropy")
"""Metrics that are no means over answers."""


def train(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Train as the task says; see `recipe.run_recipe`."""
    assert world.size == 1, "the supervisor refuses several processes"
    recipe.run_recipe(task, report, scratch, world, train_and_save)


def train_and_save(setup: Setup, report: Report) -> Trained:
    """Train, evaluate before and after, write samples and result files, and record the probe."""
    # First: a function that cannot be imported is told before anything large is loaded.
    with reward_function.started(setup.task.run.objective.rewards) as functions:
        return learn_from_rewards(setup, report, functions)


def learn_from_rewards(setup: Setup, report: Report, functions: Sequence[Score]) -> Trained:
    """Do all that `train_and_save` does, with the users' own functions at hand."""
    task, run = setup.task, setup.task.run
    settings = run.objective.ppo
    assert settings is not None, "a rule asks for the block"
    limit = settings.max_prompt_length or run.hyperparameters.max_sequence_length - settings.max_completion_length
    train_rows = grpo.tokenize(setup, task.train_path, "training", limit, report)
    prompts, validation = Dataset.from_file(str(train_rows.path)), None
    if task.validation_path is not None:
        written = grpo.tokenize(setup, task.validation_path, "validation", limit, report)
        validation = Dataset.from_file(str(written.path))
    rewards = build_rewards(settings.rewards, load_reward_models(setup), functions)
    policy = build_policy(setup)
    args = ppo_arguments(recipe.arguments(setup, evaluates=validation is not None))
    report(recipe.plan_of(setup, policy, count_rollouts(args, len(prompts)), train_rows))
    critic = load_value_head(task.adapter_path, policy)
    learned = train_ppo(policy, setup.tokenizer, args, settings, prompts, validation, rewards, report, critic)

    if run.quantization is not None:
        result.round_adapter(policy)
    shown = grpo.read_prompts(validation or prompts, run.objective.reward_columns)
    tuned_answers = samples.answers(policy, setup.tokenizer, shown)
    with reference(policy):
        base_answers = samples.answers(policy, setup.tokenizer, shown)
    result.save(setup, policy)
    save_file(learned.model.value_head.state_dict(), setup.result_path / VALUE_HEAD_FILE)
    result.save_samples(setup, samples.as_documents(shown, base_answers, tuned_answers))
    ids_BT = verify.probe_ids(prompts[: verify.PROBE_ROWS]["prompt"])
    return Trained(verify.record_probe(policy, ids_BT), learned.rollouts, learned.loss, learned.seconds)


def build_policy(setup: Setup) -> PeftModel:
    """Return the model with a new adapter, or with the one that the run goes on from and a copy of it as reference."""
    start = recipe.load_start(setup)
    if isinstance(start, PeftModel):
        add_reference(start)
        return start
    return get_peft_model(start, adapter_config(start, setup.task.run, str(setup.task.model_path)))


def load_value_head(adapter: Path | None, policy: PeftModel) -> dict[str, Tensor] | None:
    """Return the value head that lies beside the adapter to go on from; None where PPO did not make that adapter.

    Raises:
        InvalidAdapter: It is another model's.
    """
    if adapter is None or not (adapter / VALUE_HEAD_FILE).is_file():
        return None
    head = load_file(adapter / VALUE_HEAD_FILE)
    size = policy.config.get_text_config().hidden_size
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    if shapes != {"weight": (1, size), "bias": (1,)}:
        raise InvalidAdapter(
            f"{VALUE_HEAD_FILE} beside the adapter of model.continueFrom has tensors {shapes}, which is no value head "
            f"of a model with hidden size {size}"
        )
    return head


@dataclass(frozen=True)
class Learned:
    """What a training leaves."""

    model: ActorCritic
    rollouts: int
    loss: float
    """Mean over all optimizer steps."""
    seconds: float


@dataclass(frozen=True)
class Learner:
    """Takes the optimizer steps of a rollout."""

    accelerator: Accelerator
    model: ActorCritic
    optimizer: Optimizer
    schedule: LRScheduler
    settings: PPO
    batch_size: int
    max_grad_norm: float

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Go through the rollout `epochs` times and return the means of what was measured on the way."""
        settings = self.settings
        advantages_BT, returns_BT = advantages(rollout, settings)
        self.model.train()
        measured: list[dict[str, float]] = []
        for _ in range(settings.epochs):
            order = torch.randperm(len(rollout.ids_BS))
            for chosen in order.chunk(settings.mini_batches):
                measured.append(self.step(rollout, advantages_BT, returns_BT, chosen))
        return {name: fmean(step[name] for step in measured) for name in measured[0]}

    def step(self, rollout: Rollout, advantages_BT: Tensor, returns_BT: Tensor, chosen: Tensor) -> dict[str, float]:
        """Take one optimizer step on the chosen answers; every token weighs the same, whatever batch it falls into."""
        tokens = rollout.mask_BT[chosen].sum()
        sums = torch.zeros(4, device=tokens.device)
        for batch in chosen.split(self.batch_size):
            mask_BT = rollout.mask_BT[batch]
            logprobs_BT, _, values_BT = self.model(rollout.ids_BS[batch], rollout.mask_BS[batch], mask_BT.shape[1])
            old_BT = rollout.logprobs_BT[batch]
            policy_BT, clipped_BT = ppo_math.policy_loss(
                logprobs_BT, old_BT, advantages_BT[batch], self.settings.clip_range
            )
            value_BT = ppo_math.value_loss(
                values_BT, rollout.values_BT[batch], returns_BT[batch], self.settings.value_clip_range
            )
            loss_BT = policy_BT + self.settings.value_coefficient * value_BT
            self.accelerator.backward((loss_BT * mask_BT).sum() / tokens)
            with torch.no_grad():
                moved_BT = 0.5 * (logprobs_BT - old_BT) ** 2
                sums += torch.stack([(x * mask_BT).sum() for x in (policy_BT, value_BT, clipped_BT, moved_BT)])
        norm = self.accelerator.clip_grad_norm_(trained_parameters(self.model), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        policy, value, clipped, moved = (sums / tokens).tolist()
        return {
            "loss": policy + self.settings.value_coefficient * value,
            "policy_loss": policy,
            "value_loss": value,
            "clip_fraction": clipped,
            "approximate_kl": moved,
            "grad_norm": float(norm),
        }


def advantages(rollout: Rollout, settings: PPO) -> tuple[Tensor, Tensor]:
    """Return the whitened advantages and the returns of a rollout."""
    scores_B = rollout.scores_B
    if settings.missing_eos_penalty is not None:
        scores_B = scores_B - settings.missing_eos_penalty * (~rollout.ended_B)
    mask_BT = rollout.mask_BT
    rewards_BT = ppo_math.token_rewards(scores_B, rollout.kl_BT, mask_BT, settings.kl_coefficient)
    if settings.whiten_rewards:
        rewards_BT = ppo_math.whiten(rewards_BT, mask_BT, shift_mean=False)
    advantages_BT, returns_BT = ppo_math.gae(rewards_BT, rollout.values_BT, mask_BT, settings.gamma, settings.lambda_)
    return ppo_math.whiten(advantages_BT, mask_BT), returns_BT


def train_ppo(
    policy: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
    settings: PPO,
    prompts: Dataset,
    validation: Dataset | None,
    rewards: Sequence[Reward],
    report: Report,
    critic: Mapping[str, Tensor] | None = None,
) -> Learned:
    """Train the policy's adapter and a value head: roll out, score, estimate advantages, update.

    Args:
        policy: The model with its adapter; `ppo_rollout.reference` says what its reference is.
        tokenizer: With a padding token.
        args: A step in them is a rollout of batch size x accumulation steps prompts. The learning rate's schedule goes
            by optimizer steps, of which a rollout has `epochs x mini_batches`.
        settings: Of PPO.
        prompts: To learn from, as `prompt_rows` writes them, in an order drawn by the seed.
        validation: To evaluate on, before, after, and in between as `args` says.
        rewards: What answers are rewarded for.
        report: Takes the events.
        critic: Weights of a value head that has learned before.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    per_rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rollouts = count_rollouts(args, len(prompts))
    learner = build_learner(policy, args, settings, rollouts, critic)
    sampler = Sampler(
        learner.accelerator, learner.model, tokenizer, rewards, settings, args.per_device_train_batch_size
    )

    def evaluate(step: int) -> None:
        if validation is not None:
            report(StageEvent(stage="Evaluating"))
            report(evaluation(sampler, validation, step, args.seed))

    evaluate(0)
    report(StageEvent(stage="Training"))
    set_seed(args.seed)
    began = time.monotonic()
    order = prompt_order(len(prompts), args.seed)
    progress = Progress()
    for step in range(1, rollouts + 1):
        chosen = read_prompts(prompts, itertools.islice(order, per_rollout))
        report(take_step(learner, sampler, chosen, progress, epoch=step * per_rollout / len(prompts)))
        check_loss(progress.losses[-1], f"training loss at step {step}")
        if step < rollouts and is_evaluated_at(step, args, per_rollout, len(prompts)):
            evaluate(step)
            report(StageEvent(stage="Training"))
    seconds = time.monotonic() - began
    evaluate(rollouts)
    model = learner.accelerator.unwrap_model(learner.model, keep_fp32_wrapper=False)
    return Learned(model, rollouts, fmean(progress.losses), seconds)


@dataclass
class Progress:
    """What adds up over the steps."""

    losses: list[float] = field(default_factory=list)
    tokens: int = 0


def take_step(
    learner: Learner, sampler: Sampler, prompts: Sequence[Prompt], progress: Progress, *, epoch: float
) -> StepEvent:
    """Roll out, learn from the answers, and return what is reported of it."""
    began = time.monotonic()
    rollout = sampler.roll_out(prompts)
    measured = learner.update(rollout) | rollout.metrics()
    tokens = int(rollout.mask_BS.sum())
    progress.tokens += tokens
    progress.losses.append(measured.pop("loss"))
    return StepEvent(
        step=len(progress.losses),
        epoch=epoch,
        loss=progress.losses[-1],
        learning_rate=learner.schedule.get_last_lr()[0],
        grad_norm=measured.pop("grad_norm"),
        tokens=progress.tokens,
        tokens_per_second=tokens / (time.monotonic() - began),
        metrics=measured,
    )


def build_learner(
    policy: PeftModel,
    args: TrainingArguments,
    settings: PPO,
    rollouts: int,
    critic: Mapping[str, Tensor] | None = None,
) -> Learner:
    """Put a value head on the policy and set up what trains both."""
    # A ratio compares the policy with what it was: dropout would make them differ before anything is learned.
    disable_dropout_in_model(policy)
    if args.activation_checkpointing:
        policy.activation_checkpointing_enable()
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no", cpu=args.use_cpu)
    model = ActorCritic(policy, settings.temperature)
    if critic is not None:
        model.value_head.load_state_dict(critic)
    kind, given = Trainer.get_optimizer_cls_and_kwargs(args)
    optimizer = kind(trained_parameters(model), weight_decay=args.weight_decay, **given)
    steps = rollouts * settings.epochs * settings.mini_batches
    schedule = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=args.get_warmup_steps(steps), num_training_steps=steps
    )
    return Learner(
        accelerator=accelerator,
        # Quantized weights must not be moved, and the others are where they belong.
        model=accelerator.prepare_model(model, device_placement=False),
        optimizer=accelerator.prepare_optimizer(optimizer, device_placement=False),
        schedule=schedule,
        settings=settings,
        batch_size=args.per_device_train_batch_size,
        max_grad_norm=args.max_grad_norm,
    )


def trained_parameters(model: ActorCritic) -> list[torch.nn.Parameter]:
    """Return the adapter's weights and the value head's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def evaluation(sampler: Sampler, prompts: Dataset, step: int, seed: int) -> EvaluationEvent:
    """Answer the validation prompts with random numbers of their own, so that training does not depend on it.

    The loss is what PPO lowers: the KL penalty less the reward, as a mean over answers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        measured: list[tuple[int, dict[str, float]]] = []
        for start in range(0, len(prompts), sampler.batch_size):
            batch = read_prompts(prompts, range(start, min(start + sampler.batch_size, len(prompts))))
            measured.append((len(batch), sampler.roll_out(batch).metrics()))
    means = {
        name: math.fsum(count * metrics[name] for count, metrics in measured) / len(prompts)
        for name in measured[0][1]
        if name not in _WITHIN_ROLLOUT
    }
    return EvaluationEvent(
        step=step, loss=sampler.settings.kl_coefficient * means["kl"] - means["reward"], metrics=means
    )


def count_rollouts(args: TrainingArguments, prompts: int) -> int:
    """Return the number of rollouts; where a pass over the prompts leaves a rollout unfilled, the next one begins."""
    if args.max_steps > 0:
        return args.max_steps
    per_rollout = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return math.ceil(args.num_train_epochs * math.ceil(prompts / per_rollout))


def prompt_order(prompts: int, seed: int) -> Iterator[int]:
    """Yield the numbers of the prompts for ever, each pass in an order of its own."""
    shuffler = random.Random(seed)  # noqa: S311 - an order, not a secret
    while True:
        yield from shuffler.sample(range(prompts), prompts)


def is_evaluated_at(step: int, args: TrainingArguments, per_rollout: int, prompts: int) -> bool:
    """Tell whether an evaluation follows this rollout."""
    match args.eval_strategy:
        case IntervalStrategy.STEPS:
            return step % int(args.eval_steps or 1) == 0
        case IntervalStrategy.EPOCH:
            return step * per_rollout // prompts > (step - 1) * per_rollout // prompts
        case _:
            return False
