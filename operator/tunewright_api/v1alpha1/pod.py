"""Placement and identity of the training pod; nothing here can widen its privileges."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tunewright_api.base import LabelKey, LabelValue, ObjectName, Rule, ShortText, SpecModel

_RESERVED_PREFIX = "tunewright.dev/"


class ImagePullSecret(SpecModel):
    """Name of a registry Secret in the same namespace."""

    name: ObjectName


class Toleration(SpecModel):
    """A taint that the pod tolerates; the fields are those of Kubernetes."""

    key: ShortText | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: ShortText | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = Field(default=None, ge=0)


class NodeRequirement(SpecModel):
    """A condition on a node label; the fields are those of Kubernetes."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: list[LabelValue] | None = Field(default=None, max_length=32)


class NodeSelectorTerm(SpecModel):
    """Conditions that must all hold."""

    match_expressions: list[NodeRequirement] = Field(min_length=1, max_length=16)


class NodeSelector(SpecModel):
    """Terms of which one must hold."""

    node_selector_terms: list[NodeSelectorTerm] = Field(min_length=1, max_length=8)


class PreferredNode(SpecModel):
    """A weighted preference."""

    weight: int = Field(ge=1, le=100)
    preference: NodeSelectorTerm


class NodeAffinity(SpecModel):
    """Which nodes the pod must or should run on; the fields are those of Kubernetes."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    preferred_during_scheduling_ignored_during_execution: list[PreferredNode] | None = Field(default=None, max_length=8)


class Affinity(SpecModel):
    """Node affinity; affinity between pods is not offered."""

    node_affinity: NodeAffinity | None = None


def _unreserved(metadata: dict[str, str] | None) -> bool:
    return not any(key.startswith(_RESERVED_PREFIX) for key in metadata or {})


# Key of a label or annotation: an optional prefix that is a host name, then a name of at most 63 characters.
_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"


def _are_keys(*mappings: dict[str, str] | None) -> bool:
    return all(re.search(_KEY, key) for mapping in mappings for key in mapping or {})


class Pod(SpecModel):
    """Placement and identity of the training pod."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = Field(
        default=None, description="Trainer image. Default: the platform's."
    )
    image_pull_secrets: list[ImagePullSecret] | None = Field(
        default=None, max_length=8, description="Registry Secrets in the same namespace."
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount that carries a cloud identity; its token is never mounted."
    )
    node_selector: dict[str, LabelValue] | None = Field(
        default=None, max_length=16, description="Labels that the node must have."
    )
    tolerations: list[Toleration] | None = Field(default=None, max_length=16, description="Tolerated taints.")
    affinity: Affinity | None = Field(default=None, description="Node affinity.")
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pod.")
    runtime_class_name: ObjectName | None = Field(default=None, description="RuntimeClass of the pod.")
    labels: dict[str, LabelValue] | None = Field(default=None, max_length=16, description="Further labels of the pod.")
    annotations: dict[str, Annotated[str, Field(max_length=1024)]] | None = Field(
        default=None, max_length=16, description="Further annotations of the pod."
    )

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            f"!has(self.labels) || self.labels.all(k, !k.startsWith('{_RESERVED_PREFIX}'))",
            f"pod.labels may not start with {_RESERVED_PREFIX}: the operator finds its pods by them",
            lambda p: _unreserved(p.labels),
        ),
        Rule(
            f"!has(self.annotations) || self.annotations.all(k, !k.startsWith('{_RESERVED_PREFIX}'))",
            f"pod.annotations may not start with {_RESERVED_PREFIX}: they are the operator's",
            lambda p: _unreserved(p.annotations),
        ),
        Rule(
            " && ".join(
                f"(!has(self.{field}) || self.{field}.all(k, k.matches('{_KEY}')))"
                for field in ("labels", "annotations", "nodeSelector")
            ),
            "keys in pod.labels, pod.annotations and pod.nodeSelector are names such as team or example.com/team",
            lambda p: _are_keys(p.labels, p.annotations, p.node_selector),
        ),
    )
