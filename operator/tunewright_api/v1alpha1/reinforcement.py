"""Objectives that learn from rewards: the model answers prompts by itself, and what is rewarded becomes likelier."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import PythonFunction, Rule, SpecModel
from tunewright_api.v1alpha1.parts import ArtifactRef

RewardType = Literal["Model", "ExactMatch", "Regex", "JSON", "Length", "Function"]
Tokens = Annotated[int, Field(ge=1, le=1_048_576)]

_FOREIGN_SYNTAX = re.compile(
    r"\\."  # an escaped character: only what follows is looked at
    r"|\[\^?\]?(?:\\.|\[:\^?[a-z]+:\]|[^\]\\])*\]"  # a class of characters
    r"|(?P<around>\(\?(?:[=!>(#]|<[=!]|P=))"
    r"|(?P<possessive>[*+?}]\+)"
)


def is_pattern(pattern: str) -> bool:
    """Tell whether a text is a regular expression that RE2 takes, as far as Python's own `re` can tell.

    RE2, which matches in linear time, lacks what needs backtracking: back references, lookaround, atomic groups.
    """
    try:
        with warnings.catch_warnings():
            # Python warns of what a later version may read differently; RE2 will not.
            warnings.simplefilter("ignore", FutureWarning)
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    for found in _FOREIGN_SYNTAX.finditer(pattern):
        if found.lastgroup is not None or re.fullmatch(r"\\[1-9Z]", found.group()):
            return False
    return True


class ExactMatch(SpecModel):
    """1 for an answer equal to a column of the row, white space around both left out; else 0."""

    column: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default="answer", description="Column with the right answer."
    )


class Regex(SpecModel):
    """1 for an answer in which a regular expression is found, else 0."""

    pattern: Annotated[str, Field(min_length=1, max_length=512)] = Field(
        description="RE2 syntax: no lookaround and no back references, so that no answer can make it slow. "
        "^ and $ stand for the whole answer, (?s) lets . match line ends."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            # Not `|| true`, which would swallow the error that a pattern outside the syntax gives.
            "''.matches(self.pattern) in [true, false]",
            "regex.pattern is no regular expression in RE2 syntax, which has no lookaround and no back references",
            lambda r: is_pattern(r.pattern),
        ),
    )


class JSONAnswer(SpecModel):
    """1 for an answer that is JSON from its first to its last character, else 0."""

    required_keys: list[Annotated[str, Field(min_length=1, max_length=128)]] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="The answer must be an object with these keys. Default: any JSON will do.",
    )


class Length(SpecModel):
    """1 for an answer of the wanted length, less the further away it is, 0 from twice the bound on."""

    min_tokens: Tokens | None = Field(default=None, description="Shortest wanted length.")
    max_tokens: Tokens | None = Field(default=None, description="Longest wanted length.")
    target: Tokens | None = Field(default=None, description="The one wanted length, instead of bounds.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.target) != (has(self.minTokens) || has(self.maxTokens))",
            "length wants either a target, or minTokens, maxTokens or both",
            lambda x: (x.target is not None) != (x.min_tokens is not None or x.max_tokens is not None),
        ),
        Rule(
            "!has(self.minTokens) || !has(self.maxTokens) || self.minTokens <= self.maxTokens",
            "length.minTokens may not be above length.maxTokens",
            lambda x: x.min_tokens is None or x.max_tokens is None or x.min_tokens <= x.max_tokens,
        ),
    )


class FunctionReward(SpecModel):
    """What a Python function of one's own says of the answers; it runs in a process of its own in the training pod."""

    module: PythonFunction = Field(
        description="The function as package.module:function; the image (pod.image) must have it. It is called with "
        "lists of prompts, completions and further columns of the rows, and returns one number for each."
    )
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=60, description="Time for one call, which scores all answers of a step; longer ones end the run."
    )


def _belongs_to(field: str, kind: RewardType) -> Rule:
    return Rule(
        f"(self.type == '{kind}') == has(self.{field})",
        f"rewards[].{field} belongs to type {kind}: {kind} needs it, the other types forbid it",
        lambda r: (r.type == kind) == (getattr(r, field) is not None),
    )


class RewardSource(SpecModel):
    """One of the things that an answer is rewarded for; the block of its type holds its settings."""

    type: RewardType = Field(
        description="Model asks a reward model; ExactMatch, Regex, JSON and Length are functions of the answer; "
        "Function calls a function of your own."
    )
    weight: Annotated[float, Field(ge=-1000, le=1000)] = Field(
        default=1.0, description="Factor of this reward in the sum of all; below 0 it is a penalty."
    )
    model: ArtifactRef | None = Field(
        default=None, description="The model of type Model: what a FineTuneJob of objective Reward published."
    )
    exact_match: ExactMatch | None = Field(default=None, description="Settings of type ExactMatch.")
    regex: Regex | None = Field(default=None, description="The pattern of type Regex.")
    # `json` is a method of every pydantic model.
    json_answer: JSONAnswer | None = Field(default=None, alias="json", description="Settings of type JSON.")
    length: Length | None = Field(default=None, description="The length of type Length.")
    function: FunctionReward | None = Field(default=None, description="The function of type Function.")

    RULES: ClassVar[tuple[Rule, ...]] = (
        _belongs_to("model", "Model"),
        _belongs_to("regex", "Regex"),
        _belongs_to("length", "Length"),
        _belongs_to("function", "Function"),
        Rule(
            "!has(self.exactMatch) || self.type == 'ExactMatch'",
            "rewards[].exactMatch is only for type ExactMatch: remove it or change the type",
            lambda r: r.exact_match is None or r.type == "ExactMatch",
        ),
        Rule(
            "!has(self.json) || self.type == 'JSON'",
            "rewards[].json is only for type JSON: remove it or change the type",
            lambda r: r.json_answer is None or r.type == "JSON",
        ),
        Rule(
            "!has(self.weight) || self.weight != 0.0",
            "rewards[].weight may not be 0, which would reward nothing: remove the reward",
            lambda r: r.weight != 0,
        ),
    )


Rewards = Annotated[list[RewardSource], Field(min_length=1, max_length=8)]


class GRPO(SpecModel):
    """Group relative policy optimization (Shao et al. 2024): answers to one prompt are compared with each other."""

    rewards: Rewards = Field(description="What answers are rewarded for; the reward is the weighted sum.")
    generations: Annotated[int, Field(ge=2, le=256)] = Field(
        default=8, description="Answers per prompt, the group that is compared."
    )
    max_completion_length: Tokens = Field(default=256, description="Tokens per answer; longer ones are cut.")
    max_prompt_length: Tokens | None = Field(
        default=None,
        description="Tokens of the prompt; longer ones lose their beginning. Default: what maxSequenceLength leaves "
        "beside the answer.",
    )
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(default=1.0, description="Temperature of the sampling.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Sampling from the likeliest tokens that make up this share."
    )
    beta: Annotated[float, Field(ge=0, le=10)] = Field(
        default=0.0, description="Weight of the divergence from the model at the start; 0 needs no reference."
    )
    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="How far the likelihood of a token may move in one step before it is clipped."
    )
    loss: Literal["DAPO", "GRPO", "DrGRPO", "BNPO"] = Field(
        default="DAPO",
        description="How tokens are averaged: over all answers of a step (DAPO), per answer (GRPO), by the constant "
        "maxCompletionLength and without dividing by the group's deviation (DrGRPO), or over the micro-batch (BNPO).",
    )
