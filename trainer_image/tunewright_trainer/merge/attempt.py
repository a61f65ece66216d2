"""Carries out one attempt at a merge, from its document to its report. Imports no torch: processes of their own do.

find adapters and base -> published before? -> fetch adapters -> combine -> merge, check, export -> manifest last
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunewright_api.merge_run import MergeRun, merge_run_key
from tunewright_api.run_report import MergePlan, MergeVerification, PinnedAdapter, Progress, RunReport
from tunewright_trainer import model_files, publish, reports
from tunewright_trainer.artifact import MAX_DOCUMENT_BYTES
from tunewright_trainer.attempt import Attempt
from tunewright_trainer.errors import InvalidAdapter, InvalidModel, Stalled
from tunewright_trainer.inputs import ModelInput
from tunewright_trainer.merge import documents
from tunewright_trainer.merge.adapter import load_adapter
from tunewright_trainer.merge.base_input import check_together, fetch_base, find_base
from tunewright_trainer.merge.combination import (
    AdapterFolder,
    CombineTask,
    check_combination,
    run_combination,
)
from tunewright_trainer.merge.gate import short
from tunewright_trainer.merge.inputs import (
    AdapterInput,
    TrainedOn,
    combination_of,
    fetch_adapter,
    find_adapters,
    outputs_of,
    quantization_of,
)
from tunewright_trainer.merge.product import LOCAL_MODEL_FOLDER, MergeOrder, Producer, Product, check_disk
from tunewright_trainer.merge.verification import Location
from tunewright_trainer.merge.vllm import check_folder
from tunewright_trainer.publish import GGUF_FOLDER, MERGED_FOLDER, Published, Result
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import join
from tunewright_trainer.tracker import now

if TYPE_CHECKING:
    from tunewright_trainer.merge.gguf_tools import Tools

ADAPTERS_FOLDER = "adapters"
ADAPTER_FOLDER = "adapter"
CONFIGS_FOLDER = "configs"
BASE_FOLDER = "base"
OUTPUT_FOLDER = "output"
OWN = (
    ADAPTERS_FOLDER, ADAPTER_FOLDER, CONFIGS_FOLDER, BASE_FOLDER, OUTPUT_FOLDER, GGUF_FOLDER, LOCAL_MODEL_FOLDER,
    "combine.json", "logits.json",
)  # fmt: skip
"""Of a merge, in the work folder."""


def run(run: MergeRun, settings: SupervisorSettings) -> RunReport:
    """Carry out a merge and return its report; arguments and errors are those of `supervisor.run`."""
    return _Merge(run, settings).execute()


class _Merge:
    """One attempt to merge."""

    def __init__(self, run: MergeRun, settings: SupervisorSettings) -> None:
        self.run = run
        self.settings = settings
        self.attempt = Attempt(run, settings, OWN)
        self.log, self.stop, self.tracker = self.attempt.log, self.attempt.stop, self.attempt.tracker
        self.storage, self.together = self.attempt.storage, self.attempt.together
        self.attempt.watch = self._watch
        self._seen: tuple[Progress | None, int, float] = (None, 0, time.monotonic())
        self.notes: list[str] = []

    def execute(self) -> RunReport:
        """Run all steps and leave the report."""
        return self.attempt.execute(self._steps, lambda error: None)

    def _watch(self) -> None:
        """Notice a stop, and a merge that does not go on."""
        self.settings.stop.check()
        limit = self.run.stall_seconds
        seen, moment = (self.tracker.progress, self.log.lines), time.monotonic()
        if seen != self._seen[:2]:
            self._seen = (*seen, moment)
        elif limit is not None and moment - self._seen[2] > limit:
            raise Stalled(f"no sign of progress for {limit} s (retry.timeouts.stall) at stage {seen[0].stage}")

    def _steps(self) -> RunReport:
        adapters, base = self._find()
        quantization = quantization_of(self.run, adapters)
        tools = self._check_gguf(base)
        run_key = self.attempt.run_key = merge_run_key(
            self.run,
            base_version=base.version if base is not None else None,
            adapter_versions=tuple(adapter.version for adapter in adapters),
            tool_versions={"llama.cpp": tools.version} if tools is not None else None,
        )
        self.log.say(f"run key {run_key}")
        published = self.attempt.published_before()
        if published is not None:
            return self.attempt.cached(published)
        folders = self._fetch_adapters(adapters)
        vllm = None if self.run.adapter_only else self._check_vllm(adapters, folders)
        adapter_uri, folder = self._combine(adapters, folders)
        if base is None:
            return self._publish_adapter(adapters, folder)
        order = MergeOrder(
            name=self.run.name,
            base=self._fetch_base(base),
            adapter=folder,
            adapter_uri=adapter_uri,
            dtype=self.run.dtype,
            max_shard_bytes=self.run.max_shard_bytes,
            dequantized=quantization,
            outputs=outputs_of(adapters),
            prompts=self.run.verification.prompts or (),
            max_divergence=self.run.verification.max_divergence,
            gguf=self.run.gguf,
            tools=tools,
        )
        (product,) = self.together(partial(self._make, order, vllm))
        return self._publish_model(adapters, base, product)

    def _make(self, order: MergeOrder, vllm: list[str] | None) -> Product:
        with self.attempt.unpublished.writing():
            return Producer(self.attempt, order, self.notes).make(vllm)

    def _find(self) -> tuple[list[AdapterInput], ModelInput | None]:
        self.tracker.enter("Fetching", "looking up adapters and base")
        adapters: list[AdapterInput]
        adapters, _ = self.together(
            partial(find_adapters, self.run, self.storage, self.stop, self.settings.work / CONFIGS_FOLDER),
            self.attempt.check_push,
        )
        check_together(adapters)
        if len(adapters) > 1:
            check_combination(
                [(adapter.name, adapter.config) for adapter in adapters], combination_of(self.run, adapters)
            )
        for adapter in adapters:
            self.log.say(f"{adapter.field}: {adapter.place} at {adapter.version}")
        if self.run.adapter_only:
            return adapters, None
        (found,) = self.together(partial(find_base, self.run, adapters, self.storage, self.stop))
        self.log.say(f"base: {found.model.uri} at {found.model.version}")
        for note in found.notes:
            self.log.say(note)
            self.notes.append(note.removeprefix("warning: "))
        return adapters, found.model

    def _check_gguf(self, base: ModelInput | None) -> Tools | None:
        """Find llama.cpp's tools, and ask whether they know the model: before anything large is fetched."""
        if not self.run.gguf or base is None:
            return None
        from tunewright_trainer.merge.gguf_tools import check_architecture, find_tools

        tools = find_tools(self.settings.environment)
        (config,) = self.together(partial(self._read_config, base))
        check_architecture(base.uri, config, tools)
        return tools

    def _read_config(self, base: ModelInput) -> Mapping[str, Any]:
        if base.hub is not None:
            from tunewright_trainer import hub

            folder = self.settings.work / CONFIGS_FOLDER / BASE_FOLDER
            hub.download(base.hub, [model_files.CONFIG], folder, self.run.hub, self.stop, lambda size: None)
            data = (folder / model_files.CONFIG).read_bytes()
        else:
            stored = self.storage.read(join(base.uri, model_files.CONFIG), MAX_DOCUMENT_BYTES)
            data = stored[0] if stored is not None else b""
        try:
            config = json.loads(data)
        except ValueError as error:
            raise InvalidModel(f"{base.uri}/{model_files.CONFIG}: not valid JSON: {error}") from None
        if not isinstance(config, dict):
            raise InvalidModel(f"{base.uri}/{model_files.CONFIG}: must be a JSON object")
        return config

    def _fetch_adapters(self, adapters: list[AdapterInput]) -> list[Path]:
        """Fetch and check all adapters, which are small beside a model."""
        size = sum(adapter.size_bytes for adapter in adapters)
        check_disk(self.settings.work, 2 * size, "fetching and combining the adapters")
        self.tracker.enter("Fetching", f"{size / 1e6:.1f} MB of adapters", size)
        folder = self.settings.work / ADAPTERS_FOLDER
        advance = partial(self.tracker.advance, "Fetching")
        folders: list[Path] = self.together(
            *(
                partial(fetch_adapter, adapter, self.run, self.storage, folder / str(index), self.stop, advance)
                for index, adapter in enumerate(adapters)
            )
        )
        self.tracker.enter("Checking", "checking the adapters")
        for adapter, path in zip(adapters, folders, strict=True):
            self.together(partial(load_adapter, path, adapter.name))
        return folders

    def _check_vllm(self, adapters: list[AdapterInput], folders: list[Path]) -> list[str] | None:
        """Ask whether vLLM could serve the adapters as they are, where the run wants to know.

        Raises:
            InvalidAdapter: It could not, and the run requires it.
        """
        wanted = self.run.verification.vllm
        if wanted is None:
            return None
        found = [
            f"{adapter.name}: {problem}"
            for adapter, folder in zip(adapters, folders, strict=True)
            for problem in check_folder(folder, wanted.max_lora_rank).problems
        ]
        for line in found:
            self.log.say(f"vLLM: {line}")
        if found and wanted.required:
            raise InvalidAdapter(f"vLLM cannot serve the adapter (verification.vllm.required): {'; '.join(found)}")
        return short(found)

    def _combine(self, adapters: list[AdapterInput], folders: list[Path]) -> tuple[str, Path]:
        """Return the one adapter to go on with, and what to call it."""
        if len(adapters) == 1:
            return adapters[0].name, folders[0]
        combination, target = combination_of(self.run, adapters), self.settings.work / ADAPTER_FOLDER
        self.tracker.enter("Combining", f"{len(adapters)} adapters by {combination.type}")
        task = CombineTask(
            adapters=[AdapterFolder(uri=a.name, path=f) for a, f in zip(adapters, folders, strict=True)],
            combination=combination,
            output=target,
        )
        (result,) = self.together(
            partial(run_combination, task, self.settings.work, self.settings.environment, self.log, self.stop)
        )
        self.log.say(f"combined: rank {result.rank}, {result.modules} layers")
        for uri, missing in result.partial.items():
            self.notes.append(f"{uri} does not change {missing} of the {result.modules} layers")
        return "the combined adapter", target

    def _fetch_base(self, base: ModelInput) -> Location:
        if base.hub is not None:
            check_disk(self.settings.work, base.size_bytes, f"the base model {base.uri}")
            self.tracker.enter("Fetching", f"{base.size_bytes / 1e6:.1f} MB of {base.uri}", base.size_bytes)
        folder, advance = self.settings.work / BASE_FOLDER, partial(self.tracker.advance, "Fetching")
        (location,) = self.together(partial(fetch_base, base, self.run.hub, folder, self.stop, advance))
        found: Location = location
        return found

    def _publish_model(self, adapters: list[AdapterInput], base: ModelInput, product: Product) -> RunReport:
        pinned = product.plan.model_copy(
            update={"base_uri": base.uri, "base_version": base.version, "adapters": _pinned(adapters)}
        )
        finished = self._finished(adapters, TrainedOn(base.uri, base.version), pinned, product.verification, product)
        return self._publish("Model", MERGED_FOLDER, finished, dict(product.local), product)

    def _publish_adapter(self, adapters: list[AdapterInput], folder: Path) -> RunReport:
        """Publish the combination of adapters as an adapter."""
        (adapter,) = self.together(partial(load_adapter, folder))
        vllm = None
        if self.run.verification.vllm is not None:
            combined = AdapterInput("the combination", self.run.name, "", "", adapter.config, 1.0)
            vllm = self._check_vllm([combined], [folder])
        verification = MergeVerification(
            passed=True, adapter_tensors=len(adapter.tensors), vllm=vllm, notes=short(self.notes) or None
        )
        base = next((adapter.base for adapter in adapters if adapter.base is not None), None)
        plan = MergePlan(
            base_uri=base.uri if base else None,
            base_version=base.version if base else None,
            adapters=_pinned(adapters),
        )
        files = {f"{ADAPTER_FOLDER}/{name}": path for name, path in publish.output_files(folder).items()}
        finished = self._finished(adapters, base, plan, verification, None)
        return self._publish("Adapter", ADAPTER_FOLDER, finished, files, None)

    def _finished(
        self,
        adapters: list[AdapterInput],
        base: TrainedOn | None,
        plan: MergePlan,
        verification: MergeVerification,
        product: Product | None,
    ) -> documents.FinishedMerge:
        quantizations = {adapter.quantization for adapter in adapters}
        assert self.attempt.run_key is not None
        return documents.FinishedMerge(
            run=self.run,
            run_key=self.attempt.run_key,
            adapters=adapters,
            base=base,
            plan=plan,
            verification=verification,
            started_at=self.attempt.started_at,
            ended_at=now(),
            quantization=quantizations.pop() if len(quantizations) == 1 else None,
            outputs=outputs_of(adapters),
            versions=product.versions if product is not None else {},
        )

    def _publish(
        self,
        kind: Any,
        root: str,
        finished: documents.FinishedMerge,
        files: dict[str, Path],
        product: Product | None,
    ) -> RunReport:
        output = self.settings.work / OUTPUT_FOLDER
        (output / root).mkdir(parents=True)
        card = documents.card(finished)
        for name, text in (
            (f"{root}/README.md", card),
            ("README.md", card),
            ("run.json", documents.run_json(finished)),
        ):
            (output / name).write_text(text, encoding="utf-8")
        self.attempt.keep_log(output)
        files = {**files, **publish.output_files(output)}
        result = Result(
            finished.run_key,
            self.settings.writer,
            kind,
            root,
            files,
            documents.metrics(finished),
            product.stored if product is not None else (),
            finished.verification.document(),
        )
        published, others = self.attempt.publish(result)
        if others:
            return self.attempt.cached(published)
        self.log.say(f"published: {published.output.uri}")
        report = reports.merged(finished.run_key, finished.plan, finished.verification, published)
        self.attempt.keep_report(report)
        output_with_url = self.attempt.pushed(published, partial(self._local_copy, published))
        if output_with_url.hub_url is not None:
            report = report.model_copy(update={"output": output_with_url})
            self.attempt.keep_report(report)
        self.tracker.enter("Finished", published.output.uri)
        return report

    def _local_copy(self, published: Published) -> Path:
        """Return a folder with the result, for the Hub."""
        mounted = self.storage.local_path(published.output.uri)
        return mounted if mounted is not None else self.attempt.download(published)


def _pinned(adapters: list[AdapterInput]) -> list[PinnedAdapter]:
    return [PinnedAdapter(uri=a.place, version=a.version, weight=a.weight) for a in adapters]
