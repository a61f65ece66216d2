"""Base models, constrained types and the rule that is CEL in the CRD and Python here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


@dataclass(frozen=True)
class Rule:
    """One validation rule, written twice: as CEL for the API server and as a predicate for Python.

    `tests/rule_cases` holds an accept and a reject case per rule; both writings must give the same verdict.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool]


class SpecModel(BaseModel):
    """Part of a spec: camelCase on the wire, immutable, unknown fields refused, no type coercion.

    Strict types mirror the API server: `"2e-4"` in quotes is a string there, so it is an error here too.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)
    RULES: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> SpecModel:
        broken = [rule.message for rule in self.RULES if not rule.holds(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Carry the rules into the schema, where the CRD generator finds them."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        if cls.RULES:
            schema["x-kubernetes-validations"] = [{"rule": r.cel, "message": r.message} for r in cls.RULES]
        return schema

    def document(self) -> dict[str, Any]:
        """Return the object as it stands in YAML: camelCase names, unset fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(BaseModel):
    """Part of a status: what another version of the operator wrote is read without complaint."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)

    def document(self) -> dict[str, Any]:
        """Return the object as the API server stores it: camelCase names, unset fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _is_local_path(value: str) -> bool:
    return value.startswith(("/", "./", "../"))


def _uri_type(pattern: str, meaning: str) -> Any:
    """Return a string type held to `pattern`; a local path passes only in the validation context of a local run."""

    def check(value: str, info: ValidationInfo) -> str:
        if isinstance(info.context, dict) and info.context.get("local") and _is_local_path(value):
            return value
        if not re.search(pattern, value):
            raise ValueError(f"{value!r} is not {meaning}")
        return value

    return Annotated[
        str,
        AfterValidator(check),
        WithJsonSchema({"type": "string", "pattern": pattern, "maxLength": 1024}),
    ]


# [a-zA-Z0-9...] rather than \w: Go's RE2 (API server) and Python's re must agree to the letter.
_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_CLAIM = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# A path of one or more segments that are neither empty nor start with a dot: nothing can climb out with "..".
_PATH = r"(/[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]*)+"

ModelUri = _uri_type(
    rf"^(hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*|s3://{_BUCKET}({_PATH})?/?|pvc://{_CLAIM}{_PATH}/?)$",
    "a model URI: use hf://organisation/name, s3://bucket/prefix or pvc://claim/path",
)
DataUri = _uri_type(
    rf"^(s3://{_BUCKET}{_PATH}|pvc://{_CLAIM}{_PATH}|hf://datasets/{_HUB_NAME}/{_HUB_NAME}({_PATH})?)$",
    "a data URI: use s3://bucket/key, pvc://claim/path or hf://datasets/organisation/name/path, ending in .jsonl, "
    ".json, .csv or .parquet, or hf://datasets/organisation/name for a split of a data set",
)
OutputUri = _uri_type(
    rf"^(s3://{_BUCKET}|pvc://{_CLAIM}){_PATH}/?$",
    "an output URI: use s3://bucket/prefix or pvc://claim/path",
)
ArtifactUri = _uri_type(
    rf"^(s3://{_BUCKET}|pvc://{_CLAIM}){_PATH}/?$",
    "the URI of a published result: use s3://bucket/prefix or pvc://claim/path, ending with a run's folder, its "
    "manifest.json or its adapter",
)

AdapterUri = _uri_type(
    rf"^(hf://{_HUB_NAME}/{_HUB_NAME}|(s3://{_BUCKET}|pvc://{_CLAIM}){_PATH}/?)$",
    "the URI of an adapter: use s3://bucket/prefix, pvc://claim/path or hf://organisation/name",
)


def _matches(pattern: str, meaning: str, max_length: int) -> Any:
    """Return a string type held to `pattern` with a message that says what it stands for."""

    def check(value: str) -> str:
        if len(value) > max_length or not re.search(pattern, value):
            raise ValueError(f"{value!r} is not {meaning}")
        return value

    return Annotated[
        str,
        AfterValidator(check),
        WithJsonSchema({"type": "string", "pattern": pattern, "maxLength": max_length}),
    ]


def _quantity_text(value: Any) -> Any:
    """Take the plain integers that people write (`cpu: 4`) as the text Kubernetes means."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"


def _check_quantity(value: str) -> str:
    if len(value) > 32 or not re.search(_QUANTITY, value):
        raise ValueError(f"{value!r} is not a quantity: use a number such as 4, 500m or 16Gi")
    return value


Quantity = Annotated[
    str,
    BeforeValidator(_quantity_text),
    AfterValidator(_check_quantity),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "pattern": _QUANTITY,
            "maxLength": 32,
        }
    ),
]

Duration = _matches(
    r"^[1-9][0-9]{0,6}(s|m|h|d)$", "a duration: use a whole number with s, m, h or d, such as 90s or 12h", 8
)
PythonFunction = _matches(
    r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$",
    "the name of a function: use package.module:function",
    256,
)
ObjectName = _matches(
    r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "an object name: lower-case letters, digits, '-' and '.'", 253
)
FineTuneJobName = _matches(
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "the name of a FineTuneJob: lower-case letters, digits and '-'", 45
)
AdapterMergeName = _matches(
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "the name of an AdapterMerge: lower-case letters, digits and '-'", 45
)
SplitName = _matches(
    r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$",
    "the name of a split: use a name such as train, and maxSamples for a part",
    128,
)
HubRepository = _matches(rf"^{_HUB_NAME}/{_HUB_NAME}$", "a repository: use organisation/name", 96)
HubBranch = _matches(r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*$", "a branch: use main or v1.2", 128)
LabelKey = _matches(r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$", "a label key", 317)
LabelValue = _matches(r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$", "a label value", 63)
ShortText = Annotated[str, Field(max_length=253)]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(duration: str) -> int:
    """Return the length in seconds of a `Duration` such as `90s` or `12h`."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]
