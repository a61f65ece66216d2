"""GRPO on a tiny random Llama: pinned rewards, a reward that rises, reward models, and results that reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from tests.trainer.conftest import Events, MakeTask, Train, task_maker
from tunewright_trainer import recipe, worker
from tunewright_trainer.errors import InvalidData, InvalidModel
from tunewright_trainer.prompt_rows import write_prompts
from tunewright_trainer.protocol import EvaluationEvent, PlanEvent, ResultEvent, RewardModelFolder, StepEvent
from tunewright_trainer.reward_models import load_reward_models
from tunewright_trainer.rewards import Answer

pytestmark = [
    pytest.mark.timeout(300),
    # TRL 1.16 turns checkpointing off for generation by its old name.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning"),
]

ONE_ANSWER = 1 / 16
"""How far a step's mean moves when rounding on another CPU makes one answer of it another."""
PROMPTS = [
    {"prompt": f"What is {a} plus {b}?", "columns": json.dumps({"answer": a + b})} for a in range(4) for b in range(4)
]
WORD = {"type": "Regex", "regex": {"pattern": "^ [a-z]"}}
PINNED = {
    "LoRA": [0.375, 0.3125, 0.6875, 0.375, 0.4375, 0.5],
    "Full": [0.3125, 0.4375, 0.3125, 0.4375, 0.1875, 0.5],
}


def task_of(make_task: MakeTask, method: dict[str, Any], *rewards: dict[str, Any], **changes: Any) -> Any:
    """Return a task with two short answers to each of two prompts a step."""
    settings = {"generations": 8, "maxCompletionLength": 3, **changes.pop("grpo", {})}
    given = {"batchSize": 16, **changes.pop("hyperparameters", {})}
    return make_task(
        rows=changes.pop("rows", PROMPTS),
        row_format="Prompts",
        objective={"type": "GRPO", "grpo": {"rewards": list(rewards or [WORD]), **settings}},
        method=method,
        hyperparameters=given,
        **changes,
    )


def measured(events: Events, name: str) -> list[float]:
    """Return a metric of every step."""
    return [(event.metrics or {})[name] for event in events.of(StepEvent)]


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_fixed_seed_gives_pinned_rewards(method: str, make_task: MakeTask, train: Train) -> None:
    """The recipe draws and rewards the recorded answers, step by step, and its files load to the trained logits."""
    events = train(task_of(make_task, {"type": method}, hyperparameters={"maxSteps": 6}))
    rewards = measured(events, "reward")
    assert rewards == pytest.approx(PINNED[method], abs=ONE_ANSWER), rewards
    (result,) = events.of(ResultEvent)
    assert result.reload_max_difference < 1e-4


def test_what_is_rewarded_becomes_likelier(make_task: MakeTask, train: Train) -> None:
    """A share of the answers begins with the rewarded letters at first, nearly all do in the end."""
    task = task_of(
        make_task,
        {"type": "Full"},
        WORD,
        {"type": "Length", "length": {"target": 2}, "weight": 0.5},
        validation=PROMPTS[:2],
        grpo={"maxCompletionLength": 1},
        hyperparameters={"maxSteps": 12, "learningRate": 0.05, "scheduler": "Constant"},
    )
    events = train(task)
    before, after = events.of(EvaluationEvent)[0].metrics, events.of(EvaluationEvent)[-1].metrics
    assert before is not None
    assert after is not None
    assert before["rewards/Regex/mean"] < 0.7
    assert after["rewards/Regex/mean"] > 0.9
    assert after["reward"] == pytest.approx(after["rewards/Regex/mean"] + 0.5 * after["rewards/Length/mean"])
    assert set(after) >= {"reward_std", "completions/mean_length", "entropy"}
    (plan,) = events.of(PlanEvent)
    assert (plan.total_steps, plan.train_rows) == (12, len(PROMPTS))
    samples = json.loads((task.output_path / "samples.json").read_text())
    assert samples[0]["prompt"] == "What is 0 plus 0?"
    assert samples[0]["base"] != samples[0]["tuned"]


def test_rewards_equal_those_of_plain_trl(make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path) -> None:
    """The recipe adds nothing to the algorithm: TRL with its own preparation of chats draws the same answers."""
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    def digits(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [float(turns[0]["content"][:1] == " ") for turns in completions]

    reward = {"type": "Regex", "regex": {"pattern": "^ "}}
    events = train(task_of(make_task, {"type": "LoRA"}, reward, grpo={"beta": 0.1}))
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        reward_funcs=digits,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=GRPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=4, per_device_train_batch_size=16, num_generations=8,
            max_completion_length=3, beta=0.1, learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=0.06,
            gradient_accumulation_steps=1, logging_steps=1, seed=42, use_cpu=True, bf16=False,
            gradient_checkpointing=None, activation_checkpointing=False, save_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
    )  # fmt: skip
    set_seed(42)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert measured(events, "reward") == [log["reward"] for log in logs]
    assert measured(events, "kl") == pytest.approx([log["kl"] for log in logs], abs=1e-6)
    assert [event.loss for event in events.of(StepEvent)] == pytest.approx([log["loss"] for log in logs], abs=1e-6)


def test_quantized_bases_checkpointing_and_cut_prompts(make_task: MakeTask, train: Train) -> None:
    """An adapter on a 4-bit base learns held to the start, and loads to the trained logits."""
    task = task_of(
        make_task,
        {"type": "QLoRA", "quantization": {}},
        grpo={"beta": 0.1, "maxPromptLength": 6},
        hyperparameters={"maxSteps": 3, "gradientCheckpointing": True},
    )
    events = train(task)
    (plan,) = events.of(PlanEvent)
    assert plan.cut_rows == len(PROMPTS)
    assert measured(events, "kl")[-1] > 0
    assert events.of(ResultEvent)[0].reload_max_difference < 1e-3


PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f"It is {a + b}.", "rejected": "I do not know."}
    for a in range(4)
    for b in range(4)
]


@pytest.fixture(scope="module")
def judge(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reward model's adapter, trained by the reward recipe."""
    folder = tmp_path_factory.mktemp("judge")
    task = task_maker(tiny, folder)(
        rows=PAIRS,
        row_format="Preference",
        objective={"type": "Reward"},
        hyperparameters={"maxSteps": 20, "learningRate": 0.005},
    )
    worker.recipe_of(task)(task, Events().append, folder / "scratch")
    return Path(task.output_path / "adapter")


def test_a_reward_model_scores_as_plain_peft_does(judge: Path, make_task: MakeTask, tiny: Path, tmp_path: Path) -> None:
    """Answers of all lengths at once get the scores that each would get alone, the better one the higher."""
    task = task_of(make_task, {"type": "LoRA"}, {"type": "Model", "model": {"uri": "s3://models/judge"}})
    folder = RewardModelFolder(uri="s3://models/judge", path=judge, is_adapter=True)
    task = task.model_copy(update={"reward_models": [folder]})
    (score,) = load_reward_models(recipe.prepare(task, tmp_path / "scratch"))
    asked = [(pair["prompt"], pair[field]) for pair in PAIRS for field in ("chosen", "rejected")]
    scores = score([Answer(prompt, text, 0, {}) for prompt, text in asked])
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, judge).eval()
    tokenizer = AutoTokenizer.from_pretrained(judge)
    for (prompt, text), value in zip(asked, scores, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        ids = cast("Any", tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True))["input_ids"]
        with torch.inference_mode():
            assert value == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-4)
    assert all(good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True))


def test_a_reward_model_and_functions_together(judge: Path, make_task: MakeTask, train: Train) -> None:
    """The reward is the weighted sum of all; each has its own mean."""
    task = task_of(
        make_task,
        {"type": "LoRA"},
        {"type": "Model", "model": {"uri": "s3://models/judge"}, "weight": 2.0},
        {"type": "ExactMatch"},
        hyperparameters={"maxSteps": 2},
    )
    folder = RewardModelFolder(uri="s3://models/judge", path=judge, is_adapter=True)
    events = train(task.model_copy(update={"reward_models": [folder]}))
    means = [measured(events, f"rewards/{name}/mean") for name in ("Model", "ExactMatch")]
    assert measured(events, "reward") == pytest.approx([2 * m + e for m, e in zip(*means, strict=True)], abs=1e-5)
    assert all(value != 0 for value in means[0])


def test_a_reward_model_that_does_not_fit_its_base(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """Files that cannot be loaded are named by where they came from."""
    (tmp_path / "judge").mkdir()
    task = task_of(make_task, {"type": "LoRA"}, {"type": "Model", "model": {"uri": "s3://models/judge"}})
    folder = RewardModelFolder(uri="s3://models/judge", path=tmp_path / "judge", is_adapter=True)
    with pytest.raises(InvalidModel, match=r"the reward model s3://models/judge cannot be loaded"):
        train(task.model_copy(update={"reward_models": [folder]}))


def test_fewer_prompts_than_a_step_takes(make_task: MakeTask, train: Train) -> None:
    """No step could be made of them; the message says how many are needed."""
    with pytest.raises(InvalidData, match=r"there are 1 training rows, but a step takes 2 prompts"):
        train(task_of(make_task, {"type": "LoRA"}, rows=PROMPTS[:1]))


def written(tmp_path: Path, *prompts: Any) -> Path:
    """Write rows of prompts as the supervisor does."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "columns": "{}"}) + "\n" for prompt in prompts))
    return path


def test_prompts_token_by_token(tiny: Path, tmp_path: Path) -> None:
    """A prompt ends where the answer begins; what is too long loses its beginning."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}]
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    file = write_prompts(tokenizer, written(tmp_path, turns, "Q"), "training", tmp_path, 64)
    rows = Dataset.from_file(str(file.path)).to_list()
    texts = [str(tokenizer.decode(row["prompt"])) for row in rows]
    assert texts[0] == rendered
    assert texts[1].endswith("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert json.loads(rows[0]["row"]) == {"prompt": turns, "columns": "{}", "place": "training row 1"}
    assert (file.rows, file.dropped, file.cut) == (2, 0, 0)
    short = write_prompts(tokenizer, written(tmp_path, turns), "validation", tmp_path, 5)
    assert rendered.endswith(str(tokenizer.decode(Dataset.from_file(str(short.path))[0]["prompt"])))
    assert (short.rows, short.cut) == (1, 1)


def test_prompts_that_cannot_be_rendered(tiny: Path, tmp_path: Path) -> None:
    """A template that refuses a row is told with the row; plain text needs none, chats do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidData, match=r"training row 1: the chat template refuses it \(roles must alternate\)"):
        write_prompts(tokenizer, written(tmp_path, "Q"), "training", tmp_path, 64)
    tokenizer.chat_template = None
    file = write_prompts(tokenizer, written(tmp_path, "Say:"), "training", tmp_path, 64)
    assert tokenizer.decode(Dataset.from_file(str(file.path))[0]["prompt"]) == "Say:"
    with pytest.raises(InvalidModel, match=r"training row 1 is a chat, but the model has no chat template"):
        write_prompts(tokenizer, written(tmp_path, [{"role": "user", "content": "Q"}]), "training", tmp_path, 64)
