"""Which tokens are learned, token by token: every row format and choice of loss, with each common kind of tokenizer."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Rows
from transformers import LlamaConfig, PreTrainedTokenizerBase

from tests.trainer.conftest import MakeTask
from tests.trainer.small_tokenizers import CHAT_TEMPLATE, bert_style, gpt2_style, llama_style
from tunewright_api.v1alpha1.objective import ObjectiveType
from tunewright_api.v1alpha1.parts import Dataset
from tunewright_trainer import classification, preference_rows, recipe
from tunewright_trainer.data_formats import ALPACA_WITH_INPUT, choose_format, with_templates
from tunewright_trainer.errors import InvalidData, InvalidModel
from tunewright_trainer.preference_rows import PreferenceTokenizer
from tunewright_trainer.prompt_rows import write_prompts
from tunewright_trainer.recipe import Setup
from tunewright_trainer.rows import IGNORED, row_tokenizer

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "llama": llama_style,
    "gpt2": gpt2_style,
    "bert": bert_style,
    "bert-ending": lambda: bert_style("[SEP]"),
}
NO_END, NO_TEMPLATE = "no end-of-sequence token", r"no chat template: set model\.chatTemplate"
LONG = 1000
TURNS = [("system", "Be brief."), ("user", "Say one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
CHATTED = "<s><|system|>Be brief.</s><|user|>Say one</s><|assistant|>«two</s>»<|user|>three</s><|assistant|>«four</s>»"
ALPACA = ALPACA_WITH_INPUT.format(instruction="Say.", input="one")


def in_lower_case(text: str) -> str:
    """Write a text as WordPiece decodes it: words and punctuation with spaces between them."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


Expected = dict[str, str]
LEARNED: dict[str, tuple[dict[str, Any], dict[str, str], Expected]] = {
    "Text": (
        {"text": "Say one."},
        {},
        {
            "llama": "«<s>Say one.</s>»",
            "gpt2": "«Say one.<|endoftext|>»",
            "bert": NO_END,
            "bert-ending": "«[CLS] say one . [SEP]»",
        },
    ),
    "Text behind a response template": (
        {"text": "Say one: two."},
        {"responseTemplate": ":"},
        {
            "llama": "<s>Say one:« two.</s>»",
            "gpt2": "Say one:« two.<|endoftext|>»",
            "bert": NO_END,
            "bert-ending": "[CLS] say one : «two . [SEP]»",
        },
    ),
    "PromptCompletion": (
        {"prompt": "Say one:", "completion": " two."},
        {},
        {
            "llama": "<s><|user|>Say one:</s><|assistant|>« two.</s>»",
            "gpt2": "Say one:« two.<|endoftext|>»",
            "bert": NO_END,
            "bert-ending": "[CLS] say one : «two . [SEP]»",
        },
    ),
    "PromptCompletion with a prompt template": (
        {"prompt": "one", "completion": " two."},
        {"promptTemplate": "Say {prompt}:"},
        {
            "llama": "<s>Say one:« two.</s>»",
            "gpt2": "Say one:« two.<|endoftext|>»",
            "bert": NO_END,
            "bert-ending": "[CLS] say one : «two . [SEP]»",
        },
    ),
    "Alpaca": (
        {"instruction": "Say.", "input": "one", "output": "two."},
        {},
        {
            "llama": f"<s><|user|>{ALPACA}</s><|assistant|>«two.</s>»",
            "gpt2": f"{ALPACA}«two.<|endoftext|>»",
            "bert": NO_END,
            "bert-ending": f"[CLS] {in_lower_case(ALPACA)} «two . [SEP]»",
        },
    ),
    "Messages": (
        {"messages": [{"role": role, "content": text} for role, text in TURNS]},
        {},
        {"llama": CHATTED, "gpt2": NO_TEMPLATE, "bert": NO_TEMPLATE, "bert-ending": NO_TEMPLATE},
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in TURNS
            ]
        },
        {},
        {"llama": CHATTED, "gpt2": NO_TEMPLATE, "bert": NO_TEMPLATE, "bert-ending": NO_TEMPLATE},
    ),
}
"""A row, settings of the data set, and what each tokenizer makes of it: learned parts in « », or why it is refused."""


def prepared(raw: dict[str, Any], settings: dict[str, str], objective: ObjectiveType) -> tuple[Any, dict[str, Any]]:
    """Return the format that the supervisor finds in a row, and the row as the worker reads it."""
    dataset = Dataset.model_validate({"train": [{"uri": "s3://data/rows.jsonl"}], **settings})
    chosen = choose_format(dataset.format, dataset.columns, raw, "line 1", objective)
    chosen = with_templates(chosen, dataset, raw, "line 1")
    return chosen.row_format, chosen.normalise(raw)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return tokens as text, special ones included; the tokens must be those that the text is made of."""
    text = str(tokenizer.decode(ids))
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    return text


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> str:
    """Return tokens as text with the learned ones in « ». A label must be the token itself."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    parts = [(learned, decoded(tokenizer, [token for token, _ in run])) for learned, run in runs]
    return (" " if tokenizer.mask_token else "").join(f"«{text}»" if learned else text for learned, text in parts)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("loss", ["Answers", "AllTokens"])
@pytest.mark.parametrize("case", LEARNED)
def test_learned_tokens(case: str, loss: str, kind: str) -> None:
    """Answers are learned with their end, prompts only with AllTokens; special tokens stand once where they belong."""
    raw, settings, all_expected = LEARNED[case]
    expected = all_expected[kind]
    row_format, row = prepared(raw, settings, "SFT")
    tokenizer = TOKENIZERS[kind]()
    if expected in (NO_END, NO_TEMPLATE):
        with pytest.raises(InvalidModel, match=expected):
            row_tokenizer(tokenizer, row_format, LONG, learns_all=loss == "AllTokens")
        return
    if loss == "AllTokens":
        expected = f"«{expected.translate({ord(mark): None for mark in '«»'})}»"
    rows = row_tokenizer(tokenizer, row_format, LONG, learns_all=loss == "AllTokens")
    (found,) = rows.tokenize([row], "training")
    assert marked(tokenizer, found.input_ids, found.labels) == expected


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("llama", "<s>Say one.", "«<s>Say one.</s>»"),
        ("llama", "Say one.</s>", "«<s>Say one.</s>»"),
        ("llama", "<s>Say one.</s>", "«<s>Say one.</s>»"),
        ("gpt2", "Say one.<|endoftext|>", "«Say one.<|endoftext|>»"),
        ("bert-ending", "[CLS] say one. [SEP]", "«[CLS] say one . [SEP]»"),
    ],
)
def test_texts_that_were_rendered_elsewhere(kind: str, text: str, expected: str) -> None:
    """What a text has already is not put there a second time."""
    tokenizer = TOKENIZERS[kind]()
    (found,) = row_tokenizer(tokenizer, "Text", LONG).tokenize([{"text": text}], "training")
    assert marked(tokenizer, found.input_ids, found.labels) == expected


def test_a_chat_template_makes_a_chat_model_of_any() -> None:
    """With model.chatTemplate a GPT-2 learns chats, and writes what the template writes, nothing more."""
    tokenizer = gpt2_style()
    tokenizer.chat_template = CHAT_TEMPLATE
    raw, _, expected = LEARNED["Messages"]
    (found,) = row_tokenizer(tokenizer, "Messages", LONG).tokenize([raw], "training")
    end = "<|endoftext|>"
    assert marked(tokenizer, found.input_ids, found.labels) == re.sub("</?s>", lambda _: end, expected["llama"])


PAIR = {"prompt": "Say one:", "chosen": " two.", "rejected": " three."}
TURNED = {
    "prompt": [{"role": "user", "content": "Say one:"}],
    "chosen": [{"role": "assistant", "content": " two."}],
    "rejected": [{"role": "assistant", "content": " three."}],
}
JUDGED = {"prompt": "Say one:", "completion": " two.", "label": True}
ASKED, TWO, THREE = "<s><|user|>Say one:</s><|assistant|>", " two.</s>", " three.</s>"
GPT2 = ("Say one:", " two.<|endoftext|>", " three.<|endoftext|>")
BERT = ("[CLS] say one :", "two . [SEP]", "three . [SEP]")
READ = ("[CLS] say one : two . [SEP]", "[CLS] say one : three . [SEP]")
JUDGED_ROWS: dict[str, tuple[ObjectiveType, list[dict[str, Any]], dict[str, tuple[str, ...] | str]]] = {
    "Preference, DPO": (
        "DPO",
        [PAIR],
        {"llama": (ASKED, TWO, THREE), "gpt2": GPT2, "bert": NO_END, "bert-ending": BERT},
    ),
    "Preference in turns, DPO": (
        "DPO",
        [TURNED],
        {"llama": (ASKED, TWO, THREE), "gpt2": NO_TEMPLATE, "bert": NO_TEMPLATE, "bert-ending": NO_TEMPLATE},
    ),
    "Preference, KTO": (
        "KTO",
        [PAIR],
        {
            "llama": (ASKED, TWO, ASKED, THREE),
            "gpt2": (GPT2[0], GPT2[1], GPT2[0], GPT2[2]),
            "bert": NO_END,
            "bert-ending": (BERT[0], BERT[1], BERT[0], BERT[2]),
        },
    ),
    "UnpairedPreference, KTO": (
        "KTO",
        [JUDGED],
        {"llama": (ASKED, TWO), "gpt2": GPT2[:2], "bert": NO_END, "bert-ending": BERT[:2]},
    ),
    "Preference, Reward": (
        "Reward",
        [PAIR],
        {
            "llama": (ASKED + TWO, ASKED + THREE),
            "gpt2": (GPT2[0] + GPT2[1], GPT2[0] + GPT2[2]),
            "bert": READ,
            "bert-ending": READ,
        },
    ),
    "Prompts, GRPO": (
        "GRPO",
        [{"prompt": "Say one:", "answer": 2}],
        {"llama": (ASKED,), "gpt2": ("Say one:",), "bert": NO_END, "bert-ending": ("[CLS] say one :",)},
    ),
    "Prompts in turns, PPO": (
        "PPO",
        [{"prompt": TURNED["prompt"]}],
        {"llama": (ASKED,), "gpt2": NO_TEMPLATE, "bert": NO_END, "bert-ending": NO_TEMPLATE},
    ),
    "Labelled, Classification": (
        "Classification",
        [{"text": "Say one:", "label": "good"}],
        {
            "llama": ("<s>Say one:",),
            "gpt2": ("Say one:",),
            "bert": ("[CLS] say one : [SEP]",),
            "bert-ending": ("[CLS] say one : [SEP]",),
        },
    ),
    "Texts and turns in one file": (
        "DPO",
        [PAIR, TURNED],
        {
            "llama": (ASKED, TWO, THREE) * 2,
            "gpt2": NO_TEMPLATE,
            "bert": NO_TEMPLATE,
            "bert-ending": NO_TEMPLATE,
        },
    ),
}
"""Objective, rows, and the sequences that each tokenizer makes of them, or why it is refused."""


@pytest.fixture
def setup_of(make_task: MakeTask, tmp_path: Path) -> Callable[[str, ObjectiveType], Setup]:
    """Builds what a run with a tokenizer has, loaded from files as the worker loads it."""

    def build(kind: str, objective: ObjectiveType) -> Setup:
        folder = tmp_path / kind
        tokenizer = TOKENIZERS[kind]()
        tokenizer.save_pretrained(folder)
        small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
        small |= {"num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaConfig(vocab_size=len(tokenizer), **small).save_pretrained(folder)
        block = {"rewards": [{"type": "JSON"}], "maxCompletionLength": 8}
        named = {objective.lower(): block} if objective in ("GRPO", "PPO") else {}
        task = make_task(model_path=folder, objective={"type": objective, **named}, hyperparameters={"batchSize": 8})
        return recipe.prepare(task, tmp_path / "scratch")

    return build


def sequences(setup: Setup, objective: ObjectiveType, path: Path) -> list[list[int]]:
    """Return all token sequences that the recipe of an objective writes down, row by row."""
    scratch = setup.scratch
    rows = PreferenceTokenizer(setup.tokenizer, LONG, None, needs_end=objective != "Reward")
    match objective:
        case "DPO":
            file, names = preference_rows.write_pairs(rows, path, "training", scratch), ["prompt", "chosen", "rejected"]
        case "KTO":
            file = preference_rows.write_singles(rows, path, "training", scratch, batch_size=2)
            names = ["prompt", "completion"]
        case "Reward":
            file, names = preference_rows.write_scored(rows, path, "training", scratch), ["chosen", "rejected"]
        case "Classification":
            file, names = classification.tokenize(setup, ["bad", "good"], path, "training", lambda _: None), ["input"]
        case _:
            file, names = write_prompts(setup.tokenizer, path, "training", scratch, LONG), ["prompt"]
    columns = [name if objective in ("GRPO", "PPO") else f"{name}_ids" for name in names]
    return [row[column] for row in Rows.from_file(str(file.path)).to_list() for column in columns]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("case", JUDGED_ROWS)
def test_judged_and_asked_tokens(
    case: str, kind: str, setup_of: Callable[[str, ObjectiveType], Setup], tmp_path: Path
) -> None:
    """Prompts end where answers begin, answers with their end; what only reads needs no end of sequence."""
    objective, raw, all_expected = JUDGED_ROWS[case]
    expected = all_expected[kind]
    setup = setup_of(kind, objective)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(prepared(row, {}, objective)[1]) + "\n" for row in raw))
    if isinstance(expected, str):
        with pytest.raises(InvalidModel, match=expected):
            sequences(setup, objective, path)
        return
    assert tuple(decoded(setup.tokenizer, ids) for ids in sequences(setup, objective, path)) == expected


def test_a_template_that_refuses_a_pair(tmp_path: Path) -> None:
    """The row is named, whatever it is part of."""
    tokenizer = llama_style()
    refusal = "{% if 'three' in messages[-1]['content'] %}{{ raise_exception('no three') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{**PAIR, "rejected": " four."}, PAIR]))
    with pytest.raises(InvalidData, match=r"training row 2: the chat template refuses it \(no three\): .*Say one"):
        preference_rows.write_pairs(PreferenceTokenizer(tokenizer, LONG, None), path, "training", tmp_path)


def test_a_text_that_is_cut_keeps_its_frame(setup_of: Callable[[str, ObjectiveType], Setup], tmp_path: Path) -> None:
    """A classifier of BERT's kind reads [CLS] and [SEP] around every text, however long the text was."""
    setup = setup_of("bert", "Classification")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one two " * LONG, "label": "good"}) + "\n")
    file = classification.tokenize(setup, ["bad", "good"], path, "training", lambda _: None)
    (row,) = Rows.from_file(str(file.path)).to_list()
    limit = setup.task.run.hyperparameters.max_sequence_length
    assert decoded(setup.tokenizer, row["input_ids"]) == "[CLS]" + " one two" * ((limit - 2) // 2) + " [SEP]"
    assert file.cut == 1


def test_padding(setup_of: Callable[[str, ObjectiveType], Setup]) -> None:
    """The end of sequence pads where there is no token of its own for it."""
    found = {kind: setup_of(kind, "SFT").tokenizer.pad_token for kind in TOKENIZERS}
    assert found == {"llama": "<pad>", "gpt2": "<|endoftext|>", "bert": "[PAD]", "bert-ending": "[PAD]"}


def test_nothing_to_pad_with(setup_of: Callable[[str, ObjectiveType], Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths need it; the message says where to set it."""

    def bare() -> PreTrainedTokenizerBase:
        tokenizer = gpt2_style()
        tokenizer.eos_token = tokenizer.bos_token = tokenizer.unk_token = None
        return tokenizer

    monkeypatch.setitem(TOKENIZERS, "bare", bare)
    with pytest.raises(
        InvalidModel, match=r"tests/tiny has neither a padding nor .* set pad_token in tokenizer_config"
    ):
        setup_of("bare", "SFT")
