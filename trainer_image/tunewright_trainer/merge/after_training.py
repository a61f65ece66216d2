"""The merged weights that a training publishes beside its adapter (output.merge), made and proved as every merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.merged import MergedOutput, bytes_of
from tunewright_trainer import model_files
from tunewright_trainer.attempt import Attempt
from tunewright_trainer.inputs import ModelInput
from tunewright_trainer.merge.product import MergeOrder, Producer, Product
from tunewright_trainer.merge.verification import Location

if TYPE_CHECKING:
    from tunewright_trainer.merge.gguf_tools import Tools


def find_tools(run: TrainRun, environment: Mapping[str, str]) -> Tools | None:
    """Find llama.cpp's tools where the run wants GGUF files; raises as `gguf_tools.find_tools` does."""
    if not _wanted(run).gguf:
        return None
    from tunewright_trainer.merge import gguf_tools

    return gguf_tools.find_tools(environment)


def check_model(uri: str, folder: Path, tools: Tools | None) -> None:
    """Ask whether the tools know the model, before it is trained.

    Raises:
        InvalidModel: They do not.
    """
    if tools is not None:
        from tunewright_trainer.merge.gguf_tools import check_architecture

        check_architecture(uri, json.loads((folder / model_files.CONFIG).read_bytes()), tools)


def make_merged(
    attempt: Attempt,
    run: TrainRun,
    base: ModelInput,
    base_folder: Path,
    adapter_folder: Path,
    outputs: Sequence[str] | None,
    tools: Tools | None,
) -> Product:
    """Merge the adapter that was trained into its base; raises as `Producer.make` does.

    Args:
        attempt: The training's.
        run: Its document.
        base: The base model.
        base_folder: Where it lies on this machine.
        adapter_folder: The trained adapter.
        outputs: Names of the outputs of a classification head.
        tools: From `find_tools`.
    """
    wanted = _wanted(run)
    order = MergeOrder(
        name=run.name,
        base=Location(uri=base.uri, path=base_folder),
        adapter=adapter_folder,
        adapter_uri="the trained adapter",
        dtype=wanted.dtype,
        max_shard_bytes=bytes_of(wanted.max_shard_size),
        outputs=outputs,
        gguf=wanted.gguf or (),
        tools=tools,
    )
    return Producer(attempt, order).make()


def _wanted(run: TrainRun) -> MergedOutput:
    assert run.merge is not None
    return run.merge
