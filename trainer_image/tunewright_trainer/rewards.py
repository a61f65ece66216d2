"""What generated answers are worth: one pure function for each type of reward, over a batch of answers.

Regular expressions come from users and run on what a model says, so a backtracking matcher could be made to run for
hours by either of them. RE2, the matcher in pyarrow, takes time in proportion to the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tunewright_api.v1alpha1.reinforcement import ExactMatch, JSONAnswer, Length, RewardSource


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that the model generated, and the row that it answers."""

    prompt: str | list[dict[str, str]]
    """Text or turns, as in the data."""
    text: str
    """Without special tokens."""
    tokens: int
    """Length, the end-of-sequence token included."""
    columns: Mapping[str, Any]
    """All further columns of the row."""
    place: str = ""
    """Which row it is, for messages."""


Score = Callable[[Sequence[Answer]], list[float]]


@dataclass(frozen=True)
class Reward:
    """One reward of a run."""

    name: str
    weight: float
    score: Score


def build_rewards(
    sources: Sequence[RewardSource], models: Sequence[Score] = (), functions: Sequence[Score] = ()
) -> list[Reward]:
    """Return the rewards of a run, named by their types; of several of one type the later ones get a number.

    Args:
        sources: What the spec says.
        models: The reward models, one for each source of type Model.
        functions: The users' own functions, one for each source of type Function.
    """
    given = {"Model": iter(models), "Function": iter(functions)}
    built: list[Reward] = []
    for source in sources:
        same = sum(reward.name.rstrip("0123456789") == source.type for reward in built)
        name = f"{source.type}{same + 1}" if same else source.type
        score = next(given[source.type]) if source.type in given else function_of(source)
        built.append(Reward(name, source.weight, score))
    return built


def function_of(source: RewardSource) -> Score:
    """Return the function of a reward that we have ourselves."""
    match source.type:
        case "ExactMatch":
            column = (source.exact_match or ExactMatch()).column
            return lambda answers: exact_match([a.text for a in answers], [a.columns[column] for a in answers])
        case "Regex":
            assert source.regex is not None, "a rule asks for it"
            pattern = source.regex.pattern
            return lambda answers: matches([a.text for a in answers], pattern)
        case "JSON":
            keys = (source.json_answer or JSONAnswer()).required_keys or []
            return lambda answers: [valid_json(a.text, keys) for a in answers]
        case "Length":
            assert source.length is not None, "a rule asks for it"
            wanted = source.length
            return lambda answers: [length(a.tokens, wanted) for a in answers]
        case "Model" | "Function":
            raise AssertionError("given from outside")


def exact_match(texts: Sequence[str], expected: Sequence[object]) -> list[float]:
    """Return 1 for each text that equals what is expected, white space around both left out."""
    return [float(text.strip() == as_text(right)) for text, right in zip(texts, expected, strict=True)]


def as_text(value: object) -> str:
    """Return a right answer as people write it: 4 for the 4.0 that a table makes of it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def matches(texts: Sequence[str], pattern: str) -> list[float]:
    """Return 1 for each text in which the pattern is found."""
    found = pc.match_substring_regex(pa.array(texts, pa.string()), pattern)
    return [float(value) for value in found.to_pylist()]


def pattern_problem(pattern: str) -> str | None:
    """Return what is wrong with a pattern, None for one that RE2 takes."""
    try:
        matches([""], pattern)
    except pa.ArrowInvalid as error:
        return str(error).splitlines()[0]
    return None


def valid_json(text: str, required_keys: Sequence[str] = ()) -> float:
    """Return 1 for JSON; with required keys, for an object that has them all."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    # Thousands of brackets are nested too deeply to be read.
    except (ValueError, RecursionError):
        return 0.0
    if not required_keys:
        return 1.0
    return float(isinstance(value, dict) and all(key in value for key in required_keys))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def length(tokens: int, wanted: Length) -> float:
    """Return 1 within the bounds, and outside 1 less the distance from the bound as a share of it, at least 0."""
    lowest = wanted.target or wanted.min_tokens
    highest = wanted.target or wanted.max_tokens
    share = 0.0
    if lowest is not None and tokens < lowest:
        share = (lowest - tokens) / lowest
    if highest is not None and tokens > highest:
        share = (tokens - highest) / highest
    return max(0.0, 1.0 - share)
