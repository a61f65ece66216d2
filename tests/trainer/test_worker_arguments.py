"""Training arguments on a tiny random Llama: optimizers, schedulers, noise, further arguments, the best model, the end
of a run that gets worse, and losses that are no numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.conftest import EXCHANGES, Events, MakeTask, Train
from tests.trainer.test_worker_objectives import OBJECTIVES, task_of
from tunewright_trainer import recipe, result, training_arguments
from tunewright_trainer.errors import Diverged, InvalidConfiguration
from tunewright_trainer.protocol import (
    BestEvent,
    EarlyStopEvent,
    EvaluationEvent,
    ResultEvent,
    StageEvent,
    StepEvent,
    WorkerTask,
)

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
LOSS_TOLERANCE = 2e-3
SHORT = {"maxSteps": 4}
NO_DROPOUT = {"type": "LoRA", "lora": {"dropout": 0.0}}
# The 8-bit states of so small a model differ from others in the fifth digit.
OPTIMIZERS: dict[str, list[float]] = {
    "AdamW": [10.8168, 10.8590, 10.6246, 10.4597],
    "AdamW8bit": [10.8168, 10.8590, 10.6246, 10.4597],
    "PagedAdamW8bit": [10.8168, 10.8590, 10.6246, 10.4597],
    "PagedAdamW32bit": [10.8168, 10.8590, 10.6246, 10.4597],
    "Adafactor": [10.8168, 10.8590, 10.5925, 10.4894],
    "Lion": [10.8168, 10.8590, 10.6719, 10.5529],
    "SGD": [10.8168, 10.8590, 10.6665, 10.4429],
}
RATES: dict[str, list[float]] = {
    "Cosine": [0.0, 1.0, 0.75, 0.25],
    "CosineWithRestarts": [0.0, 1.0, 0.75, 0.25],
    "Linear": [0.0, 1.0, 0.6667, 0.3333],
    "Polynomial": [0.0, 1.0, 0.6667, 0.3333],
    "InverseSqrt": [0.0, 1.0, 0.7071, 0.5774],
    "Constant": [1.0, 1.0, 1.0, 1.0],
    "ConstantWithWarmup": [0.0, 1.0, 1.0, 1.0],
}
GETS_WORSE: dict[str, Any] = {
    "rows": [{"prompt": row["prompt"], "completion": "Yes."} for row in EXCHANGES],
    "validation": EXCHANGES[:4],
}
"""Whoever learns to say "Yes." to everything first learns the chat form, then forgets how to add."""


def test_the_table_is_of_the_installed_release() -> None:
    """`make generate` was run with these versions of transformers and TRL."""
    assert (ROOT / training_arguments.TABLE_PATH).read_text() == training_arguments.render()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains(optimizer: str, make_task: MakeTask, train: Train) -> None:
    """Losses are those recorded."""
    rate = {"Lion": 0.003, "SGD": 1.0}.get(optimizer, 0.01)
    events = train(
        make_task(method=NO_DROPOUT, hyperparameters={**SHORT, "optimizer": optimizer, "learningRate": rate})
    )
    losses = [event.loss for event in events.of(StepEvent)]
    assert losses == pytest.approx(OPTIMIZERS[optimizer], abs=LOSS_TOLERANCE), [round(x or 0, 4) for x in losses]


@pytest.mark.parametrize("scheduler", RATES)
def test_every_scheduler_has_its_shape(scheduler: str, make_task: MakeTask, train: Train) -> None:
    """The learning rate of every step, as a share of the peak, after a warm-up of one step."""
    warmup = 0.0 if scheduler == "Constant" else 0.25
    events = train(make_task(hyperparameters={**SHORT, "scheduler": scheduler, "warmupRatio": warmup}))
    shares = [(event.learning_rate or 0.0) / 0.01 for event in events.of(StepEvent)]
    assert shares == pytest.approx(RATES[scheduler], abs=1e-3), [round(x, 4) for x in shares]


def test_noise_is_on_while_training_alone(make_task: MakeTask, train: Train) -> None:
    """neftuneNoiseAlpha changes the losses of training, not the evaluation of the same weights."""
    with_noise = {"maxSteps": 2, "neftuneNoiseAlpha": 5.0, "learningRate": 1e-9}
    noisy = train(make_task(method=NO_DROPOUT, validation=EXCHANGES[:4], hyperparameters=with_noise))
    plain = train(
        make_task(method=NO_DROPOUT, validation=EXCHANGES[:4], hyperparameters={"maxSteps": 2, "learningRate": 1e-9})
    )
    first = [events.of(StepEvent)[0].loss or 0.0 for events in (noisy, plain)]
    assert abs(first[0] - first[1]) > 1e-3
    assert noisy.of(EvaluationEvent)[-1].loss == pytest.approx(plain.of(EvaluationEvent)[-1].loss, abs=1e-4)


@pytest.mark.parametrize("objective", ["SFT", *OBJECTIVES])
def test_further_arguments_reach_every_trainer(objective: str, make_task: MakeTask, train: Train) -> None:
    """Four rows in a batch that is thrown away, and other cycles of the scheduler: both show in the events."""
    given = {
        "maxSteps": 2,
        "warmupRatio": 0.0,
        "scheduler": "Cosine",
        "extra": {"lr_scheduler_kwargs": '{"num_cycles": 1.0}', "adam_beta2": 0.95},
    }
    task = (
        make_task(hyperparameters=given)
        if objective == "SFT"
        else task_of(make_task, objective, {"type": "LoRA"}, hyperparameters=given)
    )
    rates = [event.learning_rate for event in train(task).of(StepEvent)]
    assert rates == pytest.approx([0.01, 0.0]), "a whole cycle is down and up again: half of it is zero"


BAD_VALUES = {
    "value": ("SFT", {"dataloader_prefetch_factor": 2}, r"hyperparameters\.extra: .*dataloader_prefetch_factor"),
    "sampling": ("KTO", {"train_sampling_strategy": "random"}, r"train_sampling_strategy is sequential for KTO"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_that_the_stack_refuses(case: str, make_task: MakeTask, train: Train) -> None:
    """They are the spec's fault, and are found before the weights are read."""
    objective, extra, message = BAD_VALUES[case]
    events = Events()
    given = {"extra": extra}
    task = (
        make_task(hyperparameters=given)
        if objective == "SFT"
        else task_of(make_task, objective, {"type": "LoRA"}, hyperparameters=given)
    )
    with pytest.raises(InvalidConfiguration, match=message):
        train(task, events)
    assert [event.stage for event in events.of(StageEvent)] == ["Loading"]


@pytest.mark.parametrize(
    "method",
    [NO_DROPOUT, {"type": "Full"}, {"type": "QLoRA", "quantization": {}}],
    ids=lambda method: str(method["type"]),
)
def test_the_result_is_the_best_model(
    method: dict[str, Any], make_task: MakeTask, train: Train, tmp_path: Path
) -> None:
    """Loss falls, then rises; the published weights give the lowest evaluation loss again."""
    task = make_task(
        **GETS_WORSE,
        method=method,
        hyperparameters={"maxSteps": 16, "learningRate": 0.05, "scheduler": "Constant"},
        evaluation={"strategy": "Steps", "steps": 2, "loadBest": True},
    )
    events = train(task)
    evaluations = {event.step: event.loss for event in events.of(EvaluationEvent) if event.step}
    (best,) = events.of(BestEvent)
    assert best.loss == min(evaluations.values())
    assert evaluations[best.step] == best.loss
    assert 0 < best.step < 16, "otherwise this proves nothing"
    assert evaluation_loss(task, tmp_path) == pytest.approx(best.loss, abs=1e-4)


def test_the_last_step_is_a_candidate(make_task: MakeTask, train: Train) -> None:
    """A run that only gets better ends with its last weights, evaluated even where no evaluation was due."""
    task = make_task(
        validation=EXCHANGES[:4],
        hyperparameters={"maxSteps": 5},
        evaluation={"strategy": "Steps", "steps": 2, "loadBest": True},
    )
    events = train(task)
    assert [event.step for event in events.of(EvaluationEvent)] == [0, 2, 4, 5]
    (best,) = events.of(BestEvent)
    assert (best.step, best.loss) == (5, events.of(EvaluationEvent)[-1].loss)


def test_a_run_that_gets_no_better_ends(make_task: MakeTask, train: Train) -> None:
    """Two evaluations in a row without an improvement are enough; the result is the best model all the same."""
    task = make_task(
        **GETS_WORSE,
        hyperparameters={"maxSteps": 40, "learningRate": 0.05, "scheduler": "Constant"},
        evaluation={"strategy": "Steps", "steps": 2, "earlyStopping": {"patience": 2, "minDelta": 0.01}},
    )
    events = train(task)
    (stop,) = events.of(EarlyStopEvent)
    (best,) = events.of(BestEvent)
    (result,) = events.of(ResultEvent)
    assert stop.step == result.steps == len(events.of(StepEvent)) < 40
    assert best.step == stop.step - 4
    expected = (
        f"stopped early at step {stop.step} of 40: the evaluation loss got no better by more than 0.01 in 2 "
        f"evaluations; its best was {best.loss:.4f} at step {best.step}"
    )
    assert stop.message == expected


def test_small_improvements_do_not_count(make_task: MakeTask, train: Train) -> None:
    """A minDelta that no evaluation reaches ends the run; without loadBest the last weights are the result."""
    task = make_task(
        validation=EXCHANGES[:4],
        hyperparameters={"maxSteps": 12, "learningRate": 1e-5},
        evaluation={
            "strategy": "Steps",
            "steps": 1,
            "loadBest": False,
            "earlyStopping": {"patience": 3, "minDelta": 1.0},
        },
    )
    events = train(task)
    assert [event.step for event in events.of(EarlyStopEvent)] == [4]
    assert not events.of(BestEvent)


@pytest.mark.parametrize(("objective", "metric"), [("Classification", "F1"), ("Reward", "Accuracy")])
def test_other_metrics_than_the_loss(objective: str, metric: str, make_task: MakeTask, train: Train) -> None:
    """The best model is the first one with the highest score."""
    rows = OBJECTIVES[objective][1]
    task = task_of(
        make_task,
        objective,
        NO_DROPOUT,
        validation=rows[:6],
        hyperparameters={"maxSteps": 6, "learningRate": 0.005},
        evaluation={"strategy": "Steps", "steps": 1, "loadBest": True, "metric": metric},
    )
    events = train(task)
    scores = {e.step: (e.metrics or {})[metric.lower()] for e in events.of(EvaluationEvent) if e.step}
    (best,) = events.of(BestEvent)
    assert best.step == max(scores, key=lambda step: (scores[step], -step))
    assert (best.metrics or {})[metric.lower()] == max(scores.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_no_number_ends_every_objective(
    objective: str, make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path
) -> None:
    """Exit code 24, with the step, whatever is learned (SFT: see test_worker_training)."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], math.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Diverged, match="training loss at step 1 is nan") as caught:
        train(task_of(make_task, objective, {"type": "LoRA"}, model_path=broken))
    assert caught.value.exit_code == 24


def evaluation_loss(task: WorkerTask, folder: Path) -> float:
    """Return the published model's mean loss per token of the answers in the validation rows."""
    setup = recipe.prepare(task, folder)
    model = result.load_result(setup).eval()
    total, count = 0.0, 0
    for row in GETS_WORSE["validation"]:
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt = setup.tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        ids = torch.tensor([setup.tokenizer.apply_chat_template(chat, return_dict=False)])
        answer = ids.shape[1] - len(prompt)
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -answer - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, -answer:], reduction="sum"))
        count += answer
    return total / count
