"""Rewards: what answers are worth, by themselves and against a row."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rule_cases.rewards import GRPO_RULES, PATTERN
from tunewright_api.v1alpha1.reinforcement import Length, RewardSource
from tunewright_trainer.rewards import Answer, build_rewards, exact_match, length, matches, pattern_problem, valid_json


def source(kind: str, **more: Any) -> RewardSource:
    """Return a reward of a spec."""
    return RewardSource.model_validate({"type": kind, **more})


def answer(text: str, tokens: int = 1, **columns: Any) -> Answer:
    """Return an answer to a row with further columns."""
    return Answer("Q", text, tokens, columns)


@pytest.mark.parametrize(
    ("text", "expected", "worth"),
    [
        ("4", "4", 1),
        (" 4\n", "4 ", 1),
        ("4", 4, 1),
        ("4", 4.0, 1),
        ("4.5", 4.5, 1),
        ("true", True, 1),
        ("four", "4", 0),
    ],
)
def test_exact_match(text: str, expected: object, worth: float) -> None:
    """White space around an answer does not count; numbers are compared as people write them."""
    assert exact_match([text], [expected]) == [worth]


def test_patterns_are_searched_for() -> None:
    """A pattern may stand anywhere unless it says otherwise."""
    assert matches(["is 42.", "none", ""], r"\d+") == [1, 0, 0]
    assert matches(["is 42.", "42"], r"^\d+$") == [0, 1]


def test_no_answer_makes_a_pattern_slow() -> None:
    """What a backtracking matcher would need longer than the age of the universe for is over at once."""
    began = time.monotonic()
    assert matches(["a" * 10_000 + "!"], "^(a|a)*$") == [0]
    assert time.monotonic() - began < 1


def test_the_rules_and_re2_agree_on_patterns() -> None:
    """What the API takes runs, and what it refuses does not."""
    judged = {
        case.changes["objective"]["grpo"]["rewards"][0]["regex"]["pattern"]: case.accepted
        for case in GRPO_RULES
        if case.part == PATTERN
    }
    assert {pattern: pattern_problem(pattern) is None for pattern in judged} == judged


@pytest.mark.parametrize(
    ("text", "keys", "worth"),
    [
        ('{"a": 1}', [], 1),
        (" [1, 2]\n", [], 1),
        ('{"a": 1}', ["a"], 1),
        ('{"a": 1}', ["a", "b"], 0),
        ('["a"]', ["a"], 0),
        ("```json\n{}\n```", [], 0),
        ("NaN", [], 0),
        ("", [], 0),
        ("[" * 100_000, [], 0),
        ("1" * 10_000, [], 0),
    ],
)
def test_json(text: str, keys: list[str], worth: float) -> None:
    """Only what any JSON parser reads counts, and nothing that a model says ends the run."""
    assert valid_json(text, keys) == worth


@pytest.mark.parametrize(
    ("wanted", "worth"),
    [
        ({"target": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 15: 0.5, 20: 0.0, 99: 0.0}),
        ({"minTokens": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ({"maxTokens": 10}, {0: 1.0, 10: 1.0, 15: 0.5, 30: 0.0}),
        ({"minTokens": 4, "maxTokens": 8}, {2: 0.5, 4: 1.0, 8: 1.0, 12: 0.5}),
    ],
)
def test_length(wanted: dict[str, int], worth: dict[int, float]) -> None:
    """1 where it should be, less the further away."""
    bounds = Length.model_validate(wanted)
    assert {tokens: length(tokens, bounds) for tokens in worth} == worth


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.integers(0, 5000))
def test_whatever_a_model_says_is_worth_something(texts: list[str], tokens: int) -> None:
    """Every function gives a number from 0 to 1 for each answer."""
    sources = [
        source("ExactMatch"),
        source("Regex", regex={"pattern": "(a|b)+c"}),
        source("JSON", json={"requiredKeys": ["a"]}),
        source("Length", length={"target": 7}),
    ]
    answers = [answer(text, tokens, answer="4") for text in texts]
    for reward in build_rewards(sources):
        worth = reward.score(answers)
        assert len(worth) == len(texts)
        assert all(0 <= value <= 1 for value in worth)


def test_rewards_are_named_and_models_take_their_places() -> None:
    """Two of a kind are told apart; each source of type Model gets the next model."""
    model = {"uri": "s3://models/judge"}
    sources = [
        source("Model", model=model),
        source("Regex", regex={"pattern": "a"}, weight=-2.0),
        source("Model", model=model),
        source("Regex", regex={"pattern": "b"}),
        source("ExactMatch", exactMatch={"column": "solution"}),
    ]
    rewards = build_rewards(sources, [lambda _: [0.25], lambda _: [0.75]])
    assert [(r.name, r.weight) for r in rewards] == [
        ("Model", 1.0), ("Regex", -2.0), ("Model2", 1.0), ("Regex2", 1.0), ("ExactMatch", 1.0)
    ]  # fmt: skip
    assert [r.score([answer("b", solution="b")]) for r in rewards] == [[0.25], [0.0], [0.75], [1.0], [1.0]]
