"""What every attempt has, whether it trains or merges: log, progress, storage, and an end in order."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import TrainRun
from tunewright_api.run_report import Progress, PublishedOutput, RunReport
from tunewright_trainer import artifact, publish, reports
from tunewright_trainer.dataset import BadRows
from tunewright_trainer.errors import CorruptArtifact, DiskFull, TrainerError
from tunewright_trainer.events import Heartbeat
from tunewright_trainer.publish import Published, Result
from tunewright_trainer.run_log import Redactor, RunLog
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.storage import Storage, join
from tunewright_trainer.together import run_together
from tunewright_trainer.tracker import Tracker, now
from tunewright_trainer.transfer import Stop

REPORT_FILE = "report.json"
LOG_FOLDER = "logs"
PUBLISHED_FOLDER = "published"
GIVE_WAY_SECONDS = 10.0
"""Longest wait for a request on its way, and longest removal of files: a pod that is deleted has 30 s by default."""

Run = TrainRun | MergeRun


class Attempt:
    """One attempt at a run: what all its steps share."""

    def __init__(self, run: Run, settings: SupervisorSettings, own: Sequence[str]) -> None:
        """Make the work folder and open the log.

        Args:
            run: The document.
            settings: Places and hooks on this machine.
            own: Files and folders in the work folder that an earlier process may have left there.
        """
        self.run = run
        self.settings = settings
        self.started_at = now()
        self.run_key: str | None = None
        _clear(settings.work, (*own, PUBLISHED_FOLDER, LOG_FOLDER))
        self.redact = Redactor(settings.environment)
        log_path = settings.work / LOG_FOLDER / f"attempt-{run.attempt}.log"
        self.log = RunLog(log_path, self.redact, echo=settings.echo)
        # An inner flag, so that the failure of one thread stops the others but nothing outside.
        self.stop = Stop(settings.stop)
        self.watch: Callable[[], None] = settings.stop.check
        """Called every 0.1 s while threads work; what it raises ends the attempt."""
        self._heartbeat = Heartbeat(self.log.say)
        self.tracker = Tracker(time.monotonic, self._on_progress)
        self.storage = Storage(run.storage, stop=self.stop, local=settings.local, pvc_root=settings.pvc_root)
        self.unpublished = Unpublished(self)

    @property
    def folder(self) -> str:
        """The folder of this attempt's files: no other attempt writes there."""
        return join(join(self.run.output_uri, self.run_key or ""), self.settings.writer)

    def _on_progress(self, progress: Progress) -> None:
        self._heartbeat.see(progress)
        if self.settings.on_progress is not None:
            self.settings.on_progress(progress)

    def execute(self, steps: Callable[[], RunReport], clean_up: Callable[[TrainerError | None], None]) -> RunReport:
        """Run all steps, clean up whatever happens, and leave the report.

        Args:
            steps: The work.
            clean_up: Called once, with the error that ended the steps; None: there was none, or a fault of our own.

        Raises:
            Exception: A fault of our own; the caller makes an InternalError report of it.
        """
        failure: TrainerError | None = None
        with self.log:
            server = None
            try:
                if self.settings.port is not None:
                    # Imported after the worker was started: its start waits for nothing.
                    from tunewright_trainer.http_server import ProgressServer

                    server = ProgressServer(self.settings.port, lambda: self.tracker.progress)
                report = steps()
            except TrainerError as error:
                failure = error
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                failure = DiskFull(f"no space left in {self.settings.work}: raise resources.ephemeralStorage")
            finally:
                self.stop.request("the attempt is over")
                clean_up(failure)
                self.unpublished.remove()
                if server is not None:
                    server.close()
            if failure is not None:
                report = self._failed(failure)
            write_report(report, self.settings)
        return report

    def _failed(self, error: TrainerError) -> RunReport:
        if isinstance(error, BadRows):
            for line in error.lines:
                self.log.say(line)
        report = reports.failed(error, self.tracker.progress, self.run_key, self.redact(str(error)))
        self.log.say(f"failed: {report.reason} (exit code {report.exit_code}): {report.message}")
        return report

    def together(self, *jobs: Callable[[], Any], before_last: Callable[[], None] | None = None) -> list[Any]:
        """Run jobs at once, watched meanwhile; see `run_together`."""
        return run_together(jobs, lambda: self.watch(), before_last)

    def published_before(self) -> Published | None:
        """Return the valid result of the same run, where there is one."""
        assert self.run_key is not None
        try:
            (found,) = self.together(partial(publish.find_published, self.storage, self.run.output_uri, self.run_key))
        except CorruptArtifact as error:
            self.log.say(f"a result with this run key is there but damaged, so it is made again: {error}")
            return None
        published: Published | None = found
        return published

    def cached(self, published: Published) -> RunReport:
        """Report another attempt's result as this one's."""
        self.log.say(f"the same run was published before: {published.output.uri}")
        # Who made it may have been killed before that.
        point = partial(publish.point_to, self.storage, self.run.output_uri, published.manifest.run_key, replaces=None)
        self.together(point)
        output = self.pushed(published, partial(self.download, published))
        self.tracker.enter("Finished", "the same run was published before")
        return reports.cached(published).model_copy(update={"output": output})

    def download(self, published: Published) -> Path:
        """Fetch the folder of a result that from_pretrained loads, and check every byte of it."""
        folder = self.settings.work / PUBLISHED_FOLDER
        artifact.download_artifact(published.output.manifest_uri, folder, self.storage)
        return folder

    def pushed(self, published: Published, fetch: Callable[[], Path]) -> PublishedOutput:
        """Push a published result to the Hub where the run asks for it; `fetch` returns a local copy of it."""
        if self.run.hub_output is None:
            return published.output
        # Imported only here: the hub client costs a second that other runs need not wait for.
        from tunewright_trainer import hub_push

        self.tracker.enter("Publishing", f"to hf://{self.run.hub_output.repository}")
        (url,) = self.together(partial(hub_push.push, self.run, published, fetch, self.stop, self.log.say))
        return published.output.model_copy(update={"hub_url": url})

    def check_push(self) -> None:
        """Make sure that the result may be pushed, where the run asks for it; raises as `hub_push.check` does."""
        if self.run.hub_output is not None:
            from tunewright_trainer import hub_push

            hub_push.check(self.run, self.stop)

    def publish(self, result: Result) -> tuple[Published, bool]:
        """Store the local files of a result and make it valid; returns what `publish.publish` does."""
        size = sum(path.stat().st_size for path in result.files.values())
        self.tracker.enter("Publishing", f"{size / 1e6:.1f} MB to {self.run.output_uri}", size)
        (outcome,) = self.together(partial(self._publish, result))
        published: tuple[Published, bool] = outcome
        return published

    def _publish(self, result: Result) -> tuple[Published, bool]:
        with self.unpublished.writing():
            advance = partial(self.tracker.advance, "Publishing")
            manifest = publish.store(self.storage, self.run.output_uri, result, advance)
            self.stop.check()
            self.unpublished.keep()
            return publish.make_valid(self.storage, self.run.output_uri, manifest, self.log.say)

    def keep_log(self, folder: Path) -> None:
        """Put a copy of the log as it is now into a folder of files to publish."""
        self.log.flush()
        (folder / LOG_FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(self.log.path, folder / LOG_FOLDER / self.log.path.name)

    def keep_report(self, report: RunReport) -> None:
        """Store the whole report beside the result."""
        data = report.model_dump_json(by_alias=True, exclude_none=True, indent=2).encode()
        self.storage.put(join(self.folder, REPORT_FILE), data, replaces="*")


class Unpublished:
    """Files of an attempt in storage that are no result yet, and their removal when they will never be one."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._idle = threading.Event()
        self._idle.set()
        self._is_kept = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Surround the work that stores files, in the thread that does it."""
        self._is_kept = False
        self._idle.clear()
        try:
            yield
        finally:
            self._idle.set()

    def keep(self) -> None:
        """Leave the files where they are from here on: a manifest may name them."""
        self._is_kept = True

    def remove(self) -> None:
        """Take the files away, unless they are kept.

        That works after a stop was requested, too, but takes no longer than a deleted pod has.
        """
        if self._is_kept:
            return
        attempt, settings = self._attempt, self._attempt.settings
        # What a request on its way would still store must not come after the removal.
        self._idle.wait(GIVE_WAY_SECONDS)
        stop = Stop()
        timer = threading.Timer(GIVE_WAY_SECONDS, stop.request, ["the removal took too long"])
        timer.daemon = True
        timer.start()
        storage = Storage(attempt.run.storage, stop=stop, local=settings.local, pvc_root=settings.pvc_root)
        try:
            storage.delete_folder(attempt.folder)
        except TrainerError as error:
            attempt.log.say(f"could not remove {attempt.folder}, which is no result and may be deleted: {error}")
        finally:
            timer.cancel()


def write_report(report: RunReport, settings: SupervisorSettings) -> None:
    """Leave the last words where Kubernetes finds them."""
    if settings.termination_log is not None:
        settings.termination_log.write_text(report.to_json(), encoding="utf-8")


def _clear(work: Path, names: Sequence[str]) -> None:
    """Make the work folder, and take away what an earlier process left in it."""
    work.mkdir(parents=True, exist_ok=True)
    for path in (work / name for name in names):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
