"""Runs one attempt from its document to its report. Imports no torch: a wrong key or a bad row shows in seconds.

The order is the point: the worker starts first, because importing the training stack takes longer than all that the
supervisor does meanwhile.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.manifest import ManifestFile
from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import RunReport
from tunewright_trainer import (
    documents,
    inputs,
    launcher,
    publish,
    reports,
    reward_code,
    reward_inputs,
    start_adapter,
)
from tunewright_trainer.attempt import Attempt, Run
from tunewright_trainer.dataset import PreparedData
from tunewright_trainer.errors import InvalidInput, Preempted, Stalled, TrainerError
from tunewright_trainer.events import MetricsFile
from tunewright_trainer.inputs import Inputs
from tunewright_trainer.listener import Listener
from tunewright_trainer.protocol import (
    EVENTS_FILE,
    OUTPUT_FOLDER,
    TASK_FILE,
    ResultEvent,
    WorkerTask,
    write_task,
)
from tunewright_trainer.publish import MERGED_FOLDER, Published, Result
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.tracker import now
from tunewright_trainer.tracking import TENSORBOARD_FOLDER, WANDB_FOLDER, Trackers
from tunewright_trainer.worker_process import GRACE_SECONDS, WorkerProcess

if TYPE_CHECKING:
    from tunewright_trainer.merge.gguf_tools import Tools
    from tunewright_trainer.merge.product import Product

POLL_SECONDS = 0.1
WORKER_END_SECONDS = 10.0
"""Time for the worker to end by itself after its result: CUDA and thread pools need a moment."""
METRICS_FILE = "metrics.jsonl"
OWN = (
    OUTPUT_FOLDER, TENSORBOARD_FOLDER, WANDB_FOLDER, "data", "model", "rewards", "adapter", "scratch", TASK_FILE,
    EVENTS_FILE, METRICS_FILE,
)  # fmt: skip
"""Of a training attempt, in the work folder."""


def run(run: Run, settings: SupervisorSettings) -> RunReport:
    """Carry out a run and return its report; the report also goes to `settings.termination_log`.

    Every failure that is foreseen ends in a report with its exit code and reason. The worker is gone on return.

    Args:
        run: What to train, or to merge.
        settings: Places and hooks on this machine.

    Raises:
        Exception: A fault of our own; the caller makes an InternalError report of it.
    """
    if isinstance(run, MergeRun):
        # Imported only here: numpy costs a tenth of a second, which the start of a worker need not wait for.
        from tunewright_trainer.merge import attempt

        return attempt.run(run, settings)
    return _Training(run, settings).execute()


class _Training:
    """One attempt to train: the workers, and what is made of their output."""

    def __init__(self, run: TrainRun, settings: SupervisorSettings) -> None:
        self.run = run
        self.settings = settings
        self.attempt = Attempt(run, settings, OWN)
        self.log, self.stop, self.tracker = self.attempt.log, self.attempt.stop, self.attempt.tracker
        self.storage, self.together = self.attempt.storage, self.attempt.together
        self.metrics = MetricsFile(settings.work / METRICS_FILE)
        self.trackers = Trackers(run, settings.work, settings.environment, self.log.say)
        self.place = launcher.find_place(run, settings.environment)
        command = launcher.launch_command(run, self.place, settings.worker_command, settings.work)
        self.worker = WorkerProcess([*command, "--work", str(settings.work)], settings.environment, self.log)
        takers = (self.tracker.handle, self.metrics.write, self.trackers.write)
        self.listener = Listener(self.worker, settings.work, self.log, takers, expects_result=self.place.is_first)
        self.attempt.watch = self._watch
        self.model_path = settings.work / "model"
        self.tools: Tools | None = None

    def execute(self) -> RunReport:
        """Run all steps, end the workers whatever happens, and leave the report."""
        return self.attempt.execute(self._steps, self._clean_up)

    def _clean_up(self, error: TrainerError | None) -> None:
        self.worker.stop(GRACE_SECONDS if isinstance(error, Preempted | Stalled) else 0.0)
        self.trackers.close(finished=self.tracker.progress.stage == "Finished")

    def _steps(self) -> RunReport:
        launcher.check_place(self.run, self.settings.environment)
        found = self._find_inputs()
        run_key = self.attempt.run_key = found.key(self.run)
        self.log.say(f"run key {run_key}")
        published = self.attempt.published_before()
        if not self.place.is_first:
            return self._take_part(found, published)
        if published is not None:
            return self.attempt.cached(published)
        self.trackers.start()
        data = self._fetch(found)
        result = self._follow()
        self.worker.wait(WORKER_END_SECONDS)
        return self._publish(found, data, result)

    def _find_inputs(self) -> Inputs:
        self.tracker.enter("Fetching", "looking up model and data")
        data, model, rewards, adapter, _ = self.together(
            partial(inputs.find_data, self.run, self.storage, self.stop),
            partial(inputs.find_model, self.run, self.storage, self.stop),
            partial(reward_inputs.find_reward_models, self.run, self.storage, self.stop),
            partial(start_adapter.find, self.run, self.storage),
            self._check_push,
        )
        for note in adapter.notes if adapter is not None else ():
            self.log.say(note)
        return Inputs(model, data, rewards, adapter, reward_code.function_digests(self.run))

    def _check_push(self) -> None:
        if self.place.is_first:
            self.attempt.check_push()

    def _fetch(self, found: Inputs) -> PreparedData:
        """Fetch and check everything, and hand it to the worker."""
        self.tracker.enter("Fetching", f"{found.size_bytes / 1e6:.1f} MB of model and data", found.size_bytes)
        work, advance = self.settings.work, partial(self.tracker.advance, "Fetching")
        checked = partial(self.tracker.advance, "Checking")
        data: PreparedData
        # Data first: a bad row is told while a large model still downloads.
        data, model_path, rewards, adapter_path = self.together(
            partial(inputs.fetch_data, self.run, found, self.storage, work / "data", self.stop, advance, checked),
            partial(inputs.fetch_model, self.run, found.model, self.storage, work / "model", self.stop, advance),
            partial(
                reward_inputs.fetch_reward_models, self.run, found, self.storage, work / "rewards", self.stop, advance
            ),
            partial(start_adapter.fetch, found.adapter, self.storage, work / "adapter", advance),
            before_last=lambda: self.tracker.enter("Checking", "checking the rows", found.data_bytes),
        )
        self._check_merge(found.model.uri, model_path)
        self.tracker.checked(data, found.adapter.manifest_uri if found.adapter is not None else None)
        self.log.say(
            f"{data.train_rows} rows to train on, {data.validation_rows} to evaluate on, format {data.format.name} "
            f"({data.format.why})"
        )
        pods = f"es of {self.run.nodes} pods" if self.run.nodes > 1 else ""
        self.tracker.enter("Loading", f"waiting for the training process{pods}")
        write_task(
            work,
            WorkerTask(
                run=self.run,
                model_path=model_path,
                adapter_path=adapter_path,
                adapter_outputs=found.adapter_outputs,
                train_path=data.train_path,
                validation_path=data.validation_path,
                row_format=data.format.row_format,
                output_path=work / OUTPUT_FOLDER,
                reward_models=rewards,
                run_key=self.attempt.run_key or "",
            ),
        )
        return data

    def _check_merge(self, uri: str, model_path: Path) -> None:
        """Find what output.merge needs before anything is trained."""
        self.model_path = model_path
        if self.run.merge is not None and self.place.is_first:
            from tunewright_trainer.merge import after_training

            self.tools = after_training.find_tools(self.run, self.settings.environment)
            after_training.check_model(uri, model_path, self.tools)

    def _take_part(self, found: Inputs, published: Published | None) -> RunReport:
        """Train along in a pod that is not the first of its run: that one looks after progress and result."""
        if published is None:
            self._fetch(found)
            while not self.listener.ended_well:
                self.settings.stop.check()
                self.listener.listen()
                time.sleep(POLL_SECONDS)
        self.tracker.enter("Finished", "the first pod has the result")
        return reports.took_part(self.run, self.place.node_rank, self.attempt.run_key)

    def _follow(self) -> ResultEvent:
        """Follow the workers to their result."""
        limit = self.run.stall_seconds
        last_sign = time.monotonic()
        while self.listener.result is None:
            self.settings.stop.check()
            # Pods start minutes apart; before all of them are there the workers say nothing.
            if self.listener.listen() or (self.run.nodes > 1 and not self.listener.heard):
                last_sign = time.monotonic()
            elif limit is not None and time.monotonic() - last_sign > limit:
                progress = self.tracker.progress
                raise Stalled(
                    f"no sign of progress for {limit} s (retry.timeouts.stall) at stage {progress.stage}, "
                    f"step {progress.step}"
                )
            if self.listener.result is None:
                time.sleep(POLL_SECONDS)
        return self.listener.result

    def _publish(self, found: Inputs, data: PreparedData, result: ResultEvent) -> RunReport:
        run_key = self.attempt.run_key
        assert run_key is not None
        finished = self._finished(self.run, run_key, found, data, result)
        self.log.say(f"trained: {result.steps} steps in {result.train_seconds:.0f} s")
        product = self._merged(finished) if self.run.merge is not None else None
        published, others = self.attempt.publish(self._result(finished, product))
        if others:
            return self.attempt.cached(published)
        self.log.say(f"published: {published.output.uri}")
        report = reports.succeeded(finished, published, self.tracker.early_stop)
        if product is not None:
            report = report.model_copy(update={"merge": product.plan, "verification": product.verification})
        self.attempt.keep_report(report)
        output = self.attempt.pushed(published, lambda: self.settings.work / OUTPUT_FOLDER / result.root)
        if output.hub_url is not None:
            report = report.model_copy(update={"output": output})
            self.attempt.keep_report(report)
        self.tracker.enter("Finished", published.output.uri)
        return report

    def _finished(
        self, run: TrainRun, run_key: str, found: Inputs, data: PreparedData, result: ResultEvent
    ) -> documents.Finished:
        return documents.Finished(
            run=run,
            run_key=run_key,
            inputs=found,
            data=data,
            plan=self.tracker.plan,
            evaluation=self.tracker.evaluation,
            loss=self.tracker.progress.loss,
            result=result,
            started_at=self.attempt.started_at,
            ended_at=now(),
        )

    def _merged(self, finished: documents.Finished) -> Product:
        """Make the merged weights. Where they cannot be had, the adapter is published by itself before the run fails.

        Raises:
            InvalidInput: They cannot; the message says where the adapter is.
        """
        from tunewright_trainer.merge.after_training import make_merged

        result, base = finished.result, finished.inputs.model
        adapter = self.settings.work / OUTPUT_FOLDER / result.root
        arguments = (self.run, base, self.model_path, adapter, result.outputs, self.tools)
        try:
            with self.attempt.unpublished.writing():
                (product,) = self.together(partial(make_merged, self.attempt, *arguments))
        except InvalidInput as error:
            alone = self.run.model_copy(update={"merge": None})
            key = finished.inputs.key(alone)
            published, _ = publish.publish(
                self.storage,
                self.run.output_uri,
                self._result(replace(finished, run=alone, run_key=key), None),
                say=self.log.say,
            )
            raise type(error)(
                f"{error}. The adapter itself is published at {published.output.uri}: the same FineTuneJob without "
                "output.merge finds it there"
            ) from None
        merged: Product = product
        return merged

    def _result(self, finished: documents.Finished, product: Product | None) -> Result:
        """Return what is published: the worker's output, our own documents, and the merged weights."""
        result, metrics = finished.result, documents.metrics(finished)
        files, verification = self._files(finished), None
        stored: tuple[ManifestFile, ...] = ()
        if product is not None:
            model = replace(finished, result=result.model_copy(update={"kind": "Model"}))
            card = self.settings.work / OUTPUT_FOLDER / "merged-model.md"
            card.write_text(documents.card(model), encoding="utf-8")
            files = {**files, **product.local, f"{MERGED_FOLDER}/README.md": card}
            stored, verification = product.stored, product.verification.document()
            metrics = {**metrics, "merge": product.plan.document()}
        writer = self.settings.writer
        return Result(finished.run_key, writer, result.kind, result.root, files, metrics, stored, verification)

    def _files(self, finished: documents.Finished) -> dict[str, Path]:
        """Return what is published, by name, after adding our own documents to the worker's output."""
        work = self.settings.work
        output = work / OUTPUT_FOLDER
        card = documents.card(finished)
        # peft's own README.md is an empty form.
        (output / finished.result.root / "README.md").write_text(card, encoding="utf-8")
        (output / "README.md").write_text(card, encoding="utf-8")
        (output / "run.json").write_text(documents.run_json(finished), encoding="utf-8")
        shutil.copyfile(work / METRICS_FILE, output / METRICS_FILE)
        self.trackers.add_files(output)
        self.attempt.keep_log(output)
        return publish.output_files(output)

    def _watch(self) -> None:
        self.settings.stop.check()
        if self.listener.result is None:
            self.listener.listen()
