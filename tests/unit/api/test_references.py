"""References to results of other runs, wherever they stand in a document."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.api.builders import merge_spec, spec
from tunewright_api.references import (
    references,
    referred_jobs,
    referred_merge,
    with_digests,
    with_merged_model,
    with_results,
)
from tunewright_api.run_config import StorageSettings, TrainRun, build_train_run, run_key

MANIFEST = "s3://models/first/0123456789abcdef/manifest.json"


def continued(**reference: str) -> Any:
    """Return a spec that goes on from an adapter."""
    return spec(model={"uri": "hf://organisation/name", "continueFrom": reference})


def run(**reference: str) -> TrainRun:
    """Return its run document."""
    return build_train_run(continued(**reference), name="t", namespace="n", attempt=1, storage=StorageSettings())


def key(document: TrainRun, **digests: str) -> str:
    """Return the run key."""
    return run_key(document, model_version="c", data_versions={}, artifact_digests=digests)


def test_a_spec_without_references() -> None:
    """Nothing is found, nothing is copied."""
    plain = spec()
    assert references(plain) == ()
    assert with_results(plain, {"first": MANIFEST}) is plain


def test_names_become_addresses() -> None:
    """The name gives way to the manifest; everything else stays, and what is not known keeps its name."""
    named = continued(fineTuneJob="first")
    assert referred_jobs(named) == ("first",)
    resolved = with_results(named, {"first": MANIFEST})
    assert resolved == continued(uri=MANIFEST)
    assert referred_jobs(resolved) == ()
    assert with_results(named, {"another": MANIFEST}) == named
    assert with_results(resolved, {"first": "s3://other/x"}) is resolved


def test_references_are_found_in_lists() -> None:
    """Two reward models and an adapter: every one is found, each name once, and every one is resolved."""
    judges = [{"type": "Model", "model": {"fineTuneJob": name}} for name in ("judge", "first")]
    wanted = spec(objective={"type": "GRPO", "grpo": {"rewards": [{"type": "JSON"}, *judges]}})
    assert referred_jobs(wanted) == ("judge", "first")
    resolved = with_results(wanted, {"judge": MANIFEST})
    assert [r.uri or r.fine_tune_job for r in references(resolved)] == [MANIFEST, "first"]


def test_adapters_of_a_merge() -> None:
    """Those with a name are found, and keep weight and place when it gives way to an address."""
    merge = merge_spec(adapters=[{"uri": "s3://models/b"}, {"fineTuneJob": "first", "weight": 0.5}])
    assert (referred_jobs(merge), referred_merge(merge)) == (("first",), None)
    assert [a.document() for a in with_results(merge, {"first": MANIFEST}).adapters] == [
        {"uri": "s3://models/b"},
        {"uri": MANIFEST, "weight": 0.5},
    ]


def test_the_model_of_a_merge() -> None:
    """The name of an AdapterMerge gives way to its model; the run is then the same as one by address."""
    named = spec(model={"fromMerge": "other", "dtype": "Float32"})
    assert (referred_merge(named), referred_jobs(named)) == ("other", ())
    resolved = with_merged_model(named, "s3://models/merged")
    by_address = spec(model={"uri": "s3://models/merged", "dtype": "Float32"})
    assert referred_merge(resolved) is None
    documents = [
        build_train_run(one, name="t", namespace="n", attempt=1, storage=StorageSettings()).to_json()
        for one in (resolved, by_address)
    ]
    assert documents[0] == documents[1]
    assert TrainRun.model_validate_json(documents[0]).model.uri == "s3://models/merged"


def test_the_key_is_made_of_what_a_result_is() -> None:
    """The same adapter under two addresses is the same run, another adapter under the same address is another one."""
    by_manifest, by_folder = run(uri=MANIFEST), run(uri="s3://models/first")
    first = key(by_manifest, **{MANIFEST: "sha256:1"})
    assert key(by_folder, **{"s3://models/first": "sha256:1"}) == first
    assert key(by_manifest, **{MANIFEST: "sha256:2"}) != first
    plain = build_train_run(spec(), name="t", namespace="n", attempt=1, storage=StorageSettings())
    assert key(plain) != first


def test_a_digest_is_needed_for_every_reference() -> None:
    """A key that leaves an input out would find another run's result."""
    with pytest.raises(KeyError):
        with_digests(run(uri=MANIFEST), {})


def test_settings_come_from_the_adapter() -> None:
    """No default of ours stands in the document beside the adapter's own settings; the document survives the way."""
    document = run(uri=MANIFEST)
    assert document.lora is None
    assert TrainRun.model_validate_json(document.to_json()) == document
