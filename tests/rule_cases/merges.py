"""Rules, addresses and bounds of an AdapterMerge."""

from __future__ import annotations

from typing import Any

from tests.rule_cases.case import PREFIX, Case, Document

BASE_REVISION = "base.revision is only for hf:// models"
ADAPTER_REVISION = "revision of an adapter is only for hf:// adapters"
REFERENCE = "a reference names a result by exactly one of fineTuneJob and uri"
NO_WEIGHT = "weight of an adapter may not be 0"
ONE_WEIGHT = "adapters[0].weight is a share among several adapters"
ONE_COMBINATION = "combination is only for several adapters"
DENSITY = "combination.density is only for TIES, DARE and MagnitudePrune"
SVD_RANK = "combination.svdRank is only for SVD"
SEED = "combination.seed is only for DARE"
TWICE = "export.gguf names a type twice"
ADAPTER_ONLY = "output.adapterOnly publishes the combination of several adapters"
ADAPTER_EXPORT = "export needs a merged model, which output.adapterOnly does not make"
NAME_LENGTH = "metadata.name may have at most 45 characters"
NAME_FORM = "metadata.name may have only lower-case letters"
HUB_NAME = "hub.repository may not have"
POD_LABELS = "pod.labels may not start with tunewright.dev/"
TWO: list[Document] = [{"fineTuneJob": "a"}, {"uri": "s3://models/b"}]


def merge(name: str, accepted: bool, part: str = "", job_name: str = "case", **changes: Any) -> Case:
    """Return a case of an AdapterMerge."""
    return Case(name, accepted, changes, part, job_name, "AdapterMerge")


def adapter(name: str, accepted: bool, part: str, **fields: Any) -> Case:
    """Return a case of an AdapterMerge of this adapter and another one."""
    return merge(name, accepted, part, adapters=[fields, {"fineTuneJob": "b"}])


def output(**fields: Any) -> Document:
    """Return an output with further fields."""
    return {"uri": "s3://models/case", **fields}


MERGE_RULES = (
    merge("merge of a hub model with revision", True, BASE_REVISION, base={"uri": "hf://a/b", "revision": "v1"}),
    merge("merge of a bucket model with revision", False, BASE_REVISION, base={"uri": "s3://bkt/b", "revision": "v1"}),
    adapter("hub adapter with revision", True, ADAPTER_REVISION, uri="hf://a/b", revision="v1"),
    adapter("bucket adapter with revision", False, ADAPTER_REVISION, uri="s3://models/a", revision="v1"),
    adapter("adapter of a name with revision", False, ADAPTER_REVISION, fineTuneJob="a", revision="v1"),
    adapter("adapter by name", True, REFERENCE, fineTuneJob="a"),
    adapter("adapter by address", True, REFERENCE, uri="s3://models/a"),
    adapter("adapter by name and address", False, REFERENCE, fineTuneJob="a", uri="s3://models/a"),
    adapter("adapter by nothing", False, REFERENCE, weight=1.0),
    *(adapter(f"weight {weight}", True, NO_WEIGHT, fineTuneJob="a", weight=weight) for weight in (0.5, -1, 100)),
    adapter("weight 0", False, NO_WEIGHT, fineTuneJob="a", weight=0),
    adapter("weight of one of two", True, ONE_WEIGHT, fineTuneJob="a", weight=0.5),
    merge("weight of the only one", False, ONE_WEIGHT, adapters=[{"fineTuneJob": "a", "weight": 0.5}]),
    merge("combination of two", True, ONE_COMBINATION, adapters=TWO, combination={}),
    merge("combination of one", False, ONE_COMBINATION, combination={}),
    *(
        merge(f"density of {kind}", good, DENSITY, adapters=TWO, combination={"type": kind, "density": 0.5})
        for kind, good in (("TIES", True), ("DARE", True), ("MagnitudePrune", True), ("Linear", False), ("SVD", False))
    ),
    merge("density of the default", False, DENSITY, adapters=TWO, combination={"density": 0.5}),
    *(
        merge(f"rank of {kind}", kind == "SVD", SVD_RANK, adapters=TWO, combination={"type": kind, "svdRank": 8})
        for kind in ("SVD", "Concatenate")
    ),
    *(
        merge(f"seed of {kind}", kind == "DARE", SEED, adapters=TWO, combination={"type": kind, "seed": 0})
        for kind in ("DARE", "TIES")
    ),
    merge("two types of GGUF", True, TWICE, export={"gguf": ["Q8_0", "Q4_K_M"]}),
    merge("one type of GGUF twice", False, TWICE, export={"gguf": ["Q8_0", "F16", "Q8_0"]}),
    merge("adapter alone of two", True, ADAPTER_ONLY, adapters=TWO, output=output(adapterOnly=True)),
    merge("adapter alone of one", False, ADAPTER_ONLY, output=output(adapterOnly=True)),
    merge("export of a model", True, ADAPTER_EXPORT, output=output(adapterOnly=False), export={"gguf": ["F16"]}),
    merge(
        "export of an adapter",
        False,
        ADAPTER_EXPORT,
        adapters=TWO,
        output=output(adapterOnly=True),
        export={"gguf": ["F16"]},
    ),
    merge("merge with a name of 45 characters", True, NAME_LENGTH, "n" * 45),
    merge("merge with a name of 46 characters", False, NAME_LENGTH, "n" * 46),
    merge("merge with a hyphen in its name", True, NAME_FORM, "a-1"),
    merge("merge with a dot in its name", False, NAME_FORM, "a.b"),
    merge("push of a merge", True, HUB_NAME, output=output(hub={"repository": "org/name", "private": False})),
    merge("push of a merge to a bad name", False, HUB_NAME, output=output(hub={"repository": "org/a--b"})),
    merge("reserved label of a merge pod", False, POD_LABELS, pod={"labels": {f"{PREFIX}attempt": "9"}}),
)
"""Rules written as CEL on the server and as predicates in Python."""

MERGE_SCHEMA = (
    merge("smallest merge", True),
    merge(
        "largest merge",
        True,
        base={"uri": "pvc://models/base"},
        adapters=[{"uri": f"hf://organisation/adapter-{n}", "weight": 0.25} for n in range(16)],
        combination={"type": "DARE", "density": 1.0, "seed": 4_294_967_295},
        quantizedBase="Dequantized",
        dtype="BFloat16",
        maxShardSize="500MB",
        verification={"prompts": ["Hello"] * 32, "maxDivergence": 0.05, "vllm": {"maxLoraRank": 64, "required": True}},
        export={"gguf": ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M"]},
        output=output(hub={"repository": "org/name"}),
        storage={"secretName": "s3", "endpoint": "http://10.0.0.1:9000"},
        hub={"secretName": "hf-token"},
        resources={"cpu": 2, "memory": "4Gi", "ephemeralStorage": "100Gi"},
        pod={"nodeSelector": {"disk": "ssd"}, "priorityClassName": "high"},
        retry={"maxRestarts": 0, "timeouts": {"queue": "1h", "run": "2h", "stall": "10m"}},
        ttlAfterFinished="1d",
        suspend=True,
    ),
    merge("merge of nothing", False, "adapters", adapters=[]),
    merge("merge without adapters", False, "adapters", adapters=None),
    merge("merge of 17", False, "adapters", adapters=[{"fineTuneJob": "a"}] * 17),
    merge("merge to nowhere", False, "output", output=None),
    *(
        adapter(f"adapter {uri}", True, "", uri=uri)
        for uri in ("s3://bucket/out", "s3://bucket/a/0123456789abcdef/manifest.json", "pvc://c/a/", "hf://org/name")
    ),
    *(
        adapter(f"adapter {uri}", False, "adapters[0].uri", uri=uri)
        for uri in ("s3://bucket", "hf://org", "s3://bucket/../x", "pvc://claim", "/local/path", "https://x/y")
    ),
    *(
        adapter(f"adapter of {name}", False, "adapters[0].fineTuneJob", fineTuneJob=name)
        for name in ("A", "team/a", "n" * 46)
    ),
    adapter("weight of 101", False, "adapters[0].weight", fineTuneJob="a", weight=101),
    merge("base by name", False, "base.uri", base={"uri": "org/name"}),
    merge("unknown combination", False, "combination.type", adapters=TWO, combination={"type": "Average"}),
    *(
        merge(
            f"density {value}",
            False,
            "combination.density",
            adapters=TWO,
            combination={"type": "TIES", "density": value},
        )
        for value in (0, 1.5)
    ),
    *(
        merge(f"shards of {size}", False, "maxShardSize", maxShardSize=size)
        for size in ("5GiB", "0GB", "5 GB", "5", "1234567MB", "1.5GB")
    ),
    merge("unknown GGUF", False, "export.gguf[0]", export={"gguf": ["Q2_K"]}),
    merge("export of nothing", False, "export.gguf", export={"gguf": []}),
    merge("33 prompts", False, "verification.prompts", verification={"prompts": ["a"] * 33}),
    merge("empty prompt", False, "verification.prompts[0]", verification={"prompts": [""]}),
    merge("no divergence", False, "verification.maxDivergence", verification={"maxDivergence": 0}),
)
"""Addresses, bounds and types."""

MERGE_UNKNOWN_FIELDS = (
    ({"adapter": {"uri": "s3://b/x"}}, "adapter", "adapters"),
    ({"resources": {"gpus": 1}}, "gpus", None),
    ({"output": {"uri": "s3://b/x", "adapteronly": True}}, "adapteronly", "adapterOnly"),
    ({"model": {"uri": "hf://a/b"}}, "model", None),
)
"""Misspelt fields, or such as a FineTuneJob has."""
