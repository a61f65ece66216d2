"""The recipes besides SFT on a tiny random Llama: pinned losses, masks, and results that reload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tests.trainer.conftest import MakeTask, Train
from tests.trainer.plain_trl import losses_of_plain_trl
from tests.trainer.small_tokenizers import bert_style
from tunewright_trainer.errors import InvalidData, InvalidModel
from tunewright_trainer.preference_rows import PreferenceTokenizer, write_pairs, write_scored, write_singles
from tunewright_trainer.protocol import EvaluationEvent, ResultEvent, StepEvent

pytestmark = pytest.mark.timeout(300)

LOSS_TOLERANCE = 2e-3
"""Other CPUs add in another order; a wrong mask, seed or schedule moves these losses by more."""
PAIRS = [
    {"prompt": f"What is {a} plus {b}?", "chosen": f"{a} plus {b} is {a + b}.", "rejected": "I do not know."}
    for a in range(6)
    for b in range(4)
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
    for pair in PAIRS[:12]
    for good in (True, False)
]
LABELLED = [
    {"text": text.format(n), "label": label}
    for n in range(12)
    for text, label in (("The sun shines on day {}", "good"), ("Rain and storm on day {}", "bad"))
]
OBJECTIVES: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "DPO": ("DPO", PAIRS, "Preference"),
    "KTO": ("KTO", JUDGED, "UnpairedPreference"),
    "Reward": ("Reward", PAIRS, "Preference"),
    "Classification": ("Classification", LABELLED, "Labelled"),
}
PINNED: dict[tuple[str, str], list[float]] = {
    ("DPO", "LoRA"): [0.6931, 0.6931, 0.6274, 0.5760],
    ("DPO", "Full"): [0.6931, 0.6931, 0.5045, 0.4100],
    ("KTO", "LoRA"): [0.5000, 0.5000, 0.4840, 0.4718],
    ("KTO", "Full"): [0.5000, 0.5000, 0.4498, 0.4240],
    ("Reward", "LoRA"): [0.6998, 0.7007, 0.6565, 0.6028],
    ("Reward", "Full"): [0.6998, 0.7007, 0.5950, 0.4036],
    ("Classification", "LoRA"): [0.7104, 0.6933, 0.5312, 0.4985],
    ("Classification", "Full"): [0.7104, 0.6933, 0.4131, 0.3111],
}


def task_of(make_task: MakeTask, objective: str, method: dict[str, Any], **changes: Any) -> Any:
    """Return a task on the objective's rows."""
    kind, rows, row_format = OBJECTIVES[objective]
    return make_task(rows=rows, row_format=row_format, objective={"type": kind}, method=method, **changes)


@pytest.mark.parametrize(("objective", "method"), PINNED)
def test_fixed_seed_gives_pinned_losses(objective: str, method: str, make_task: MakeTask, train: Train) -> None:
    """Every recipe trains to the recorded losses, step by step, and its files load to the trained logits."""
    events = train(task_of(make_task, objective, {"type": method}, hyperparameters={"learningRate": 0.002}))
    losses = [event.loss for event in events.of(StepEvent)]
    assert all(event.tokens_per_second for event in events.of(StepEvent))
    expected = PINNED[objective, method]
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE), [round(x or 0, 4) for x in losses]
    (result,) = events.of(ResultEvent)
    assert result.reload_max_difference < 1e-4


def test_losses_equal_those_of_plain_trl(make_task: MakeTask, train: Train, tiny: Path, tmp_path: Path) -> None:
    """The recipe adds nothing to the arithmetic of DPO: TRL with its own preparation gives the same losses."""
    from trl import DPOConfig, DPOTrainer

    events = train(task_of(make_task, "DPO", {"type": "LoRA", "lora": {"dropout": 0.0}}))
    chats = [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            **{field: [{"role": "assistant", "content": pair[field]}] for field in ("chosen", "rejected")},
        }
        for pair in PAIRS
    ]
    theirs = losses_of_plain_trl(DPOTrainer, DPOConfig, chats, tiny, tmp_path)
    assert [event.loss for event in events.of(StepEvent)] == pytest.approx(theirs, abs=1e-5)


def test_reward_model_ranks_unseen_pairs(make_task: MakeTask, train: Train, tiny: Path) -> None:
    """Loaded with plain peft, the adapter and its head score the better one of pairs it has not seen higher."""
    seen, unseen = PAIRS[::2], PAIRS[1::2]
    task = make_task(
        rows=seen,
        validation=unseen,
        row_format="Preference",
        objective={"type": "Reward"},
        hyperparameters={"maxSteps": 30, "learningRate": 0.005},
    )
    evaluations = train(task).of(EvaluationEvent)
    assert evaluations[-1].metrics is not None
    assert evaluations[-1].metrics["accuracy"] > 0.9
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, task.output_path / "adapter").eval()
    probe = load_file(task.output_path / "probe.safetensors")
    with torch.inference_mode():
        logits = model(input_ids=probe["input_ids"]).logits
    assert (logits - probe["logits"]).abs().max().item() < 1e-4


def test_classifier_beats_the_majority(make_task: MakeTask, train: Train) -> None:
    """On texts it has not seen the classifier is right nearly always, and it knows its labels by name."""
    task = make_task(
        rows=LABELLED[:16],
        validation=LABELLED[16:],
        row_format="Labelled",
        objective={"type": "Classification"},
        method={"type": "Full"},
        hyperparameters={"maxSteps": 20, "learningRate": 0.003},
    )
    events = train(task)
    before, after = events.of(EvaluationEvent)[0], events.of(EvaluationEvent)[-1]
    assert after.metrics is not None
    assert min(after.metrics["accuracy"], after.metrics["f1"]) > 0.9
    assert after.loss < before.loss
    model = AutoModelForSequenceClassification.from_pretrained(task.output_path / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}


@pytest.mark.parametrize(
    "method",
    [
        {"type": "QLoRA", "quantization": {"bits": 4}},
        {"type": "QLoRA", "quantization": {"bits": 8}},
        {"type": "LoRA", "lora": {"useDora": True, "rank": 4}},
    ],
    ids=["nf4", "int8", "dora"],
)
@pytest.mark.parametrize("dtype", ["Float32", "BFloat16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_adapters_on_quantized_bases_reload(
    objective: str, dtype: str, method: dict[str, Any], make_task: MakeTask, train: Train
) -> None:
    """The result of every recipe loads to the trained logits, heads and quantized bases included."""
    steps = {"maxSteps": 2, "learningRate": 0.001}
    model = {"uri": "hf://tests/tiny", "dtype": dtype}
    events = train(task_of(make_task, objective, method, model=model, hyperparameters=steps))
    assert len(events.of(ResultEvent)) == 1  # the worker's own comparison is what is tested


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return tokens as text, special ones included."""
    return str(tokenizer.decode(ids))


@pytest.fixture
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's, with its chat template."""
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny)
    return loaded


def written(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as jsonl."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TURNS = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "very bad"}],
}
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_pairs_token_by_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The prompt ends where the answers begin, and each answer ends with the end of its turn."""
    file = write_pairs(PreferenceTokenizer(tokenizer, 64, None), written(tmp_path, [TURNS]), "training", tmp_path)
    (row,) = Dataset.from_file(str(file.path)).to_list()
    assert decoded(tokenizer, row["prompt_ids"]) == RENDERED
    assert decoded(tokenizer, row["chosen_ids"]) == "good<|im_end|>\n"
    assert decoded(tokenizer, row["rejected_ids"]) == "very bad<|im_end|>\n"
    assert (file.rows, file.dropped, file.cut) == (1, 0, 0)


def test_pairs_without_a_chat_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Plain text is taken as it is, with an end-of-sequence token after each answer."""
    tokenizer.chat_template = None
    rows = [{"prompt": "Say:", "chosen": " good", "rejected": " bad"}]
    file = write_pairs(PreferenceTokenizer(tokenizer, 64, None), written(tmp_path, rows), "training", tmp_path)
    (row,) = Dataset.from_file(str(file.path)).to_list()
    texts = [decoded(tokenizer, row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert texts == ["Say:", f" good{tokenizer.eos_token}", f" bad{tokenizer.eos_token}"]


def test_limits_cut_the_prompt_from_its_beginning_and_answers_at_their_end(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The end of the prompt is what an answer answers; rows whose answers no longer differ are dropped."""
    rows = PreferenceTokenizer(tokenizer, max_length=8, max_prompt_length=5)
    file = write_pairs(rows, written(tmp_path, [TURNS]), "training", tmp_path)
    (row,) = Dataset.from_file(str(file.path)).to_list()
    assert len(row["prompt_ids"]) == 5
    assert RENDERED.endswith(decoded(tokenizer, row["prompt_ids"]))
    assert len(row["rejected_ids"]) <= 3
    assert (file.rows, file.cut) == (1, 1)
    with pytest.raises(InvalidData, match=r"none of the 1 training rows fits into 8 tokens .*maxSequenceLength"):
        write_pairs(PreferenceTokenizer(tokenizer, 8, None), written(tmp_path, [TURNS]), "training", tmp_path)


def test_judged_answers_token_by_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Pairs become a good and a bad answer; each batch's answers are also given to another prompt of the batch."""
    rows = [TURNS, {**TURNS, "prompt": [{"role": "user", "content": "Other"}]}]
    limits = PreferenceTokenizer(tokenizer, 64, None)
    file = write_singles(limits, written(tmp_path, rows), "training", tmp_path, batch_size=2)
    found = Dataset.from_file(str(file.path)).to_list()
    assert [row["label"] for row in found] == [True, False, True, False]
    answers = [decoded(tokenizer, row["completion_ids"]) for row in found]
    assert answers == ["good<|im_end|>\n", "very bad<|im_end|>\n"] * 2
    assert [decoded(tokenizer, row["KL_completion_ids"]) for row in found] == answers[::-1]


def test_scored_answers_token_by_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A reward model reads prompt and answer as one; a pair that is too long is left out whole."""
    limits = PreferenceTokenizer(tokenizer, 30, None)
    long = {**TURNS, "rejected": [{"role": "assistant", "content": "word " * 40}]}
    file = write_scored(limits, written(tmp_path, [TURNS, long]), "training", tmp_path)
    (row,) = Dataset.from_file(str(file.path)).to_list()
    assert decoded(tokenizer, row["chosen_ids"]) == f"{RENDERED}good<|im_end|>\n"
    assert (file.rows, file.dropped) == (1, 1)


def test_labels_outside_the_list(make_task: MakeTask, train: Train) -> None:
    """A label that is not in the list is refused with its row and the remedy."""
    task = make_task(
        rows=LABELLED,
        row_format="Labelled",
        objective={"type": "Classification", "classification": {"labels": ["good", "neutral"]}},
    )
    with pytest.raises(InvalidData, match=r"training row 2: label 'bad' is not among good, neutral: .*\.labels"):
        train(task)


def test_a_single_label(make_task: MakeTask, train: Train) -> None:
    """Rows that all have one label teach nothing."""
    task = make_task(rows=LABELLED[::2], row_format="Labelled", objective={"type": "Classification"})
    with pytest.raises(InvalidData, match=r"have 1 different labels .* the right column"):
        train(task)


def bert(folder: Path, kind: type[BertModel] | type[BertForSequenceClassification]) -> Path:
    """Write a random BERT, without end of sequence or chat template."""
    words = bert_style()
    words.save_pretrained(folder)
    set_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=words.pad_token_id, max_position_embeddings=64,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "rate"),
    [({"type": "Full"}, 0.01), ({"type": "LoRA", "lora": {"targets": "QueryValue"}}, 0.03)],
    ids=["Full", "LoRA"],
)
@pytest.mark.parametrize("objective", ["Classification", "Reward"])
def test_models_that_only_read(
    objective: str, method: dict[str, Any], rate: float, make_task: MakeTask, train: Train, tmp_path: Path
) -> None:
    """A model of BERT's kind learns labels and scores, and its files load to the trained logits."""
    base = bert(tmp_path / "bert", BertModel)
    given = {"maxSteps": 40, "learningRate": rate, "maxSequenceLength": 48}
    events = train(task_of(make_task, objective, method, model_path=base, hyperparameters=given))
    losses = [event.loss or 0.0 for event in events.of(StepEvent)]
    assert losses[-1] < 0.5 * losses[0]
    assert events.of(ResultEvent)[0].reload_max_difference < 1e-4


def test_a_base_with_another_head(make_task: MakeTask, train: Train, tmp_path: Path) -> None:
    """A classifier of two labels is no base for a score; the message says what is."""
    base = bert(tmp_path / "bert", BertForSequenceClassification)
    with pytest.raises(InvalidModel, match=r"such as a head with another number of outputs than 1: set model\.uri to"):
        train(task_of(make_task, "Reward", {"type": "LoRA"}, model_path=base))
