"""Entry point of the trainer image: `python -m tunewright_trainer`, everything by environment.

TUNEWRIGHT_RUN               the TrainRun or MergeRun document, JSON
TUNEWRIGHT_WRITER            UID of the pod; its first 8 hex digits name the folder of the result
TUNEWRIGHT_WORK              work folder, default /work
TUNEWRIGHT_TERMINATION_LOG   default /dev/termination-log
TUNEWRIGHT_PORT              port of /progress, /metrics and /healthz, default 8080
AWS_*                        credentials of the S3 service
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from tunewright_api.exit_codes import ExitCode
from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import RUN_ENVIRONMENT_VARIABLE, TrainRun
from tunewright_api.run_report import Progress
from tunewright_trainer import reports, supervisor
from tunewright_trainer.attempt import Run, write_report
from tunewright_trainer.errors import InternalError, InvalidConfiguration, TrainerError
from tunewright_trainer.run_log import Redactor
from tunewright_trainer.settings import SupervisorSettings
from tunewright_trainer.tracker import now

DEFAULT_PORT = 8080


def main() -> int:
    """Run one attempt and return its exit code."""
    settings = read_settings(os.environ)
    signal.signal(signal.SIGTERM, lambda *_: settings.stop.request("the pod was asked to stop (SIGTERM)"))
    redact = Redactor(settings.environment)
    try:
        return supervisor.run(read_run(os.environ), settings).exit_code
    except TrainerError as error:
        failure = error
    except Exception as error:
        # The only broad catch: whatever our own fault is, the pod leaves a report and the log a traceback.
        sys.stdout.write(redact(traceback.format_exc()))
        text = f"{type(error).__name__}: {error} (a fault of the trainer; the traceback is in the log)"
        failure = InternalError(text)
    progress = Progress(stage="Starting", updated_at=now())
    report = reports.failed(failure, progress, None, redact(str(failure)))
    sys.stdout.write(f"failed: {report.reason} (exit code {report.exit_code}): {report.message}\n")
    write_report(report, settings)
    return report.exit_code


def read_settings(environment: Mapping[str, str]) -> SupervisorSettings:
    """Return the settings of a pod."""
    digits = re.sub("[^0-9a-f]", "", environment.get("TUNEWRIGHT_WRITER", "").lower())
    return SupervisorSettings(
        work=Path(environment.get("TUNEWRIGHT_WORK", "/work")),
        writer=digits[:8].rjust(8, "0"),
        port=int(environment.get("TUNEWRIGHT_PORT", DEFAULT_PORT)),
        termination_log=Path(environment.get("TUNEWRIGHT_TERMINATION_LOG", "/dev/termination-log")),
        environment=dict(environment),
    )


def read_run(environment: Mapping[str, str]) -> Run:
    """Return the run document, of the kind that it says.

    Raises:
        InvalidConfiguration: There is none, or it is not one that this trainer understands.
    """
    text = environment.get(RUN_ENVIRONMENT_VARIABLE)
    if text is None:
        raise InvalidConfiguration(f"{RUN_ENVIRONMENT_VARIABLE} is not set: the operator sets it to the run document")
    kind: type[Run] = MergeRun if _kind_of(text) == "MergeRun" else TrainRun
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise InvalidConfiguration(
            f"{RUN_ENVIRONMENT_VARIABLE} does not fit this trainer; is its image of the operator's version? {problems}"
        ) from None


def _kind_of(text: str) -> object:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document.get("kind") if isinstance(document, dict) else None


if __name__ == "__main__":
    try:
        code = main()
    # The exit code decides on a retry, so nothing may end the process with one of Python's own.
    except BaseException:
        traceback.print_exc()
        code = int(ExitCode.INTERNAL_ERROR)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that would wait for threads that hang in a request.
    os._exit(code)
