"""Generate the CRDs from the models: `python -m tunewright_api.crd --write|--check`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tunewright_api import GROUP, VERSION
from tunewright_api.v1alpha1 import adaptermerge, finetunejob
from tunewright_api.v1alpha1.adaptermerge import AdapterMerge, AdapterMergeSpec
from tunewright_api.v1alpha1.finetunejob import FineTuneJob, FineTuneJobSpec
from tunewright_api.v1alpha1.status import AdapterMergeStatus, FineTuneJobStatus, RunStatus

CRD_FOLDER = Path("crds")
CHART_FOLDER = Path("charts/tunewright/templates")

Column = tuple[str, str, str, int]
"""Name, type, JSONPath, priority (1 = only with -o wide)."""


@dataclass(frozen=True)
class CustomResource:
    """What the definition of a custom resource is made of."""

    kind: str
    plural: str
    short_name: str
    description: str
    spec_description: str
    resource: type[FineTuneJob] | type[AdapterMerge]
    spec: type[FineTuneJobSpec] | type[AdapterMergeSpec]
    status: type[RunStatus]
    columns: tuple[Column, ...]


_FINETUNEJOB_COLUMNS: tuple[Column, ...] = (
    ("State", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress.percent", 0),
    ("Loss", "string", ".status.progress.loss", 0),
    ("ETA", "string", ".status.progress.etaSeconds", 0),
    ("Model", "string", ".spec.model.uri", 1),
    ("Method", "string", ".spec.method.type", 1),
    ("Attempt", "integer", ".status.attempt", 1),
    ("Output", "string", ".status.output.uri", 1),
    ("Reason", "string", ".status.failure.reason", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
_ADAPTERMERGE_COLUMNS: tuple[Column, ...] = (
    ("State", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress.percent", 0),
    ("Base", "string", ".status.plan.baseUri", 1),
    ("Attempt", "integer", ".status.attempt", 1),
    ("Output", "string", ".status.output.uri", 1),
    ("Reason", "string", ".status.failure.reason", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)
FINETUNEJOB = CustomResource(
    finetunejob.KIND,
    finetunejob.PLURAL,
    "ftj",
    "A fine-tuning run.",
    "What to train and where to put it.",
    FineTuneJob,
    FineTuneJobSpec,
    FineTuneJobStatus,
    _FINETUNEJOB_COLUMNS,
)
ADAPTERMERGE = CustomResource(
    adaptermerge.KIND,
    adaptermerge.PLURAL,
    "am",
    "A merge of adapters into their base model.",
    "Which adapters to merge into what, and where to put it.",
    AdapterMerge,
    AdapterMergeSpec,
    AdapterMergeStatus,
    _ADAPTERMERGE_COLUMNS,
)
CUSTOM_RESOURCES = (FINETUNEJOB, ADAPTERMERGE)

_KEPT = (
    "type", "format", "description", "enum", "default", "pattern", "minimum", "maximum", "minLength", "maxLength",
    "minItems", "maxItems", "required", "x-kubernetes-validations", "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
)  # fmt: skip


def structural(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Turn pydantic's JSON schema into a structural schema: references inlined, nullable unions unwrapped."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        schema = {**target, **{k: v for k, v in schema.items() if k != "$ref"}}
    options = [o for o in schema.get("anyOf", []) if o.get("type") != "null"]
    if len(options) == 1:
        schema = {
            **{k: v for k, v in schema.items() if k not in ("anyOf", "default")},
            **_described(options[0], schema),
        }
        return structural(schema, definitions)
    result = {k: v for k, v in schema.items() if k in _KEPT}
    if len(options) > 1:
        result["anyOf"] = options
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if result.get("default", 0) is None:
        del result["default"]
    for bound, kept in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in schema:
            result[kept], result[bound] = schema[bound], True
    if "enum" in result and "type" not in result:
        result["type"] = "integer" if isinstance(result["enum"][0], int) else "string"
    if "properties" in schema:
        result["properties"] = {k: structural(v, definitions) for k, v in schema["properties"].items()}
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        result["additionalProperties"] = structural(extra, definitions)
        result["maxProperties"] = schema.get("maxProperties", schema.get("maxLength", 64))
        result.pop("maxLength", None)
    elif extra is True:
        result["x-kubernetes-preserve-unknown-fields"] = True
    if "prefixItems" in schema:
        # A tuple: structural schemas know only one type for all items.
        result["items"] = {"type": "number"}
    elif "items" in schema:
        result["items"] = structural(schema["items"], definitions)
    return result


def _described(option: dict[str, Any], outer: dict[str, Any]) -> dict[str, Any]:
    """Keep the field's own description where the type it names has one too."""
    if "description" in outer:
        return {k: v for k, v in option.items() if k != "description"}
    return option


def _schema_of(model: type[BaseModel], description: str) -> dict[str, Any]:
    schema = model.model_json_schema(by_alias=True)
    result = structural({k: v for k, v in schema.items() if k != "$defs"}, schema.get("$defs", {}))
    return {**result, "description": description}


def _drop_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """Remove defaults: the API server must not fill in a status that the operator left out."""
    result = {k: v for k, v in schema.items() if k != "default"}
    if "properties" in result:
        result["properties"] = {k: _drop_defaults(v) for k, v in result["properties"].items()}
    if "items" in result:
        result["items"] = _drop_defaults(result["items"])
    return result


def crd(of: CustomResource) -> dict[str, Any]:
    """Return the CustomResourceDefinition of a kind."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{of.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": of.kind,
                "listKind": f"{of.kind}List",
                "plural": of.plural,
                "singular": of.kind.lower(),
                "shortNames": [of.short_name],
                "categories": ["tunewright"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}
                        for name, kind, path, priority in of.columns
                    ],
                    "schema": {"openAPIV3Schema": _schema(of)},
                }
            ],
        },
    }


def _schema(of: CustomResource) -> dict[str, Any]:
    spec = _schema_of(of.spec, of.spec_description)
    spec["x-kubernetes-validations"] = [*spec.get("x-kubernetes-validations", []), *of.spec.transition_rules()]
    return {
        "type": "object",
        "description": of.description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _status_schema(of.status),
        },
        "x-kubernetes-validations": [{"rule": r.cel, "message": r.message} for r in of.resource.RULES],
    }


def _status_schema(model: type[RunStatus]) -> dict[str, Any]:
    status = _drop_defaults(_schema_of(model, "What the operator observed."))
    status.pop("required", None)
    conditions = status["properties"]["conditions"]
    conditions["x-kubernetes-list-type"] = "map"
    conditions["x-kubernetes-list-map-keys"] = ["type"]
    for part in status["properties"].values():
        if part["type"] == "object":
            # Written whole by one writer: nobody needs to know who owns which field of it, and on every write the API
            # server would work it out.
            part["x-kubernetes-map-type"] = "atomic"
    return status


def render() -> dict[Path, str]:
    """Return the generated files by path: the plain CRDs, and the same as chart templates with a keep policy."""
    files = {}
    for of in CUSTOM_RESOURCES:
        files[CRD_FOLDER / f"{of.plural}.yaml"], files[CHART_FOLDER / f"crd-{of.plural}.yaml"] = _rendered(crd(of))
    return files


def _rendered(definition: dict[str, Any]) -> tuple[str, str]:
    import yaml

    head = "# Generated by `make generate` from operator/tunewright_api; do not edit.\n"
    plain = head + yaml.safe_dump(definition, sort_keys=False, width=110, allow_unicode=True)
    body = yaml.safe_dump(definition["spec"], sort_keys=False, width=110, allow_unicode=True)
    if "{{" in body:
        raise AssertionError("the CRD's text may not look like a Helm template")
    template = (
        head
        + "{{- if .Values.crds.enabled }}\n"
        + "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nmetadata:\n"
        + f"  name: {definition['metadata']['name']}\n"
        + '  labels:\n    {{- include "tunewright.labels" . | nindent 4 }}\n'
        + "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n"
        + "spec:\n"
        + "".join(f"  {line}\n" if line else "\n" for line in body.splitlines())
        + "{{- end }}\n"
    )
    return plain, template


def main() -> int:
    """Write the generated files, or check that the committed ones are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write the files")
    mode.add_argument("--check", action="store_true", help="fail when a committed file differs")
    arguments = parser.parse_args()
    stale = []
    for path, text in render().items():
        if arguments.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path)
    for path in stale:
        print(f"{path} is out of date: run `make generate`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
