"""A step of a merge in a process of its own, for what imports torch: it may take memory, crash and be killed without
taking the supervisor along.

    FOLDER/MODULE.json          the task, written by the supervisor
    FOLDER/MODULE.result.json   written by the process: the step's own document, or an error event

The process exits with the code of its error. It gets no credentials, but those of S3 where it reads from there itself,
and what it prints goes to the log.
"""

from __future__ import annotations

import errno
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from tunewright_api.exit_codes import OUTCOMES, ExitCode
from tunewright_trainer.errors import DiskFull, TrainerError, fate_of
from tunewright_trainer.protocol import ErrorEvent
from tunewright_trainer.run_log import RunLog
from tunewright_trainer.transfer import Stop
from tunewright_trainer.worker import describe, set_environment
from tunewright_trainer.worker_process import (
    GRACE_SECONDS,
    WorkerProcess,
    death_of,
    die_with_parent,
    failure_of,
    memory_limit,
    oom_kills,
)

POLL_SECONDS = 0.1
T = TypeVar("T", bound=BaseModel)
R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Step:
    """A module to run, and how messages speak of it."""

    module: str
    """`python -m MODULE TASK.json`; its main calls `serve`."""
    name: str
    """What messages call its process."""
    saving: str
    """What the user can do for it to need less memory."""


def run_child(
    step: Step,
    task: BaseModel,
    result: type[R],
    folder: Path,
    environment: Mapping[str, str],
    log: RunLog,
    stop: Stop,
    *,
    reads_storage: bool = False,
) -> R:
    """Run a step and return what came of it.

    Args:
        step: What to run.
        task: What it is told.
        result: Type of what it answers.
        folder: For the files of both; work folder of the supervisor.
        environment: Of the process, less credentials.
        log: Takes what it prints.
        stop: Ends it when it is requested.
        reads_storage: Leave it the credentials of S3.

    Raises:
        WorkerFailure: The step gave up; code, reason and message are its own.
        Killed: It was killed from outside, most often for memory.
        InternalError: It crashed.
        Preempted: A stop was requested.
    """
    task_file = folder / f"{step.module.rpartition('.')[2]}.json"
    answer_file = _answer_file(task_file)
    answer_file.unlink(missing_ok=True)
    task_file.write_text(task.model_dump_json(by_alias=True))
    kills_before = oom_kills()
    process = WorkerProcess(
        [sys.executable, "-m", step.module, str(task_file)], environment, log, reads_storage=reads_storage
    )
    try:
        while process.exit_code() is None:
            stop.sleep(POLL_SECONDS)
        code = process.wait(GRACE_SECONDS)
    finally:
        process.stop()
    if code == ExitCode.SUCCESS and answer_file.exists():
        return result.model_validate_json(answer_file.read_bytes())
    if answer_file.exists():
        raise failure_of(ErrorEvent.model_validate_json(answer_file.read_bytes()))
    raise death_of(
        code or 0,
        log.last_worker_line(),
        oom_kills=oom_kills() - kills_before,
        memory_limit=memory_limit(),
        process=step.name,
        saving=step.saving,
    )


def serve(task_type: type[T], work: Callable[[T], BaseModel]) -> int:
    """Be the process of a step: read the task that the command line names, carry it out, and write what came of it.

    Args:
        task_type: Type of the task.
        work: Carries it out. It imports what is slow itself: the environment is set before it is called.

    Returns:
        The exit code.
    """
    task_file = Path(sys.argv[1])
    die_with_parent()
    set_environment(processes=1)
    try:
        answer = work(task_type.model_validate_json(task_file.read_bytes()))
    except TrainerError as error:
        code, reason = fate_of(error)
        return _fail(task_file, code, reason, str(error))
    # Whatever our own fault is, the supervisor gets an event and the log a traceback.
    except Exception as error:
        if _is_full(error):
            message = f"no space left in {task_file.parent}: raise resources.ephemeralStorage"
            return _fail(task_file, DiskFull.exit_code, DiskFull.reason, message)
        return _fail(task_file, ExitCode.INTERNAL_ERROR, OUTCOMES[ExitCode.INTERNAL_ERROR].reason, describe(error))
    _write(task_file, answer.model_dump_json(by_alias=True))
    return ExitCode.SUCCESS


def _is_full(error: Exception) -> bool:
    """Tell whether a disk is full; safetensors' errors have the number in their text alone."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"(os error {errno.ENOSPC})" in str(error)


def _fail(task_file: Path, code: ExitCode, reason: str, message: str) -> int:
    traceback.print_exc()
    event = ErrorEvent(exit_code=code, reason=reason, message=message)
    _write(task_file, json.dumps(event.model_dump(by_alias=True)))
    return code


def _write(task_file: Path, document: str) -> None:
    """Write the answer whole or not at all: the process may be killed at any moment."""
    temporary = task_file.with_suffix(".result.tmp")
    temporary.write_text(document)
    temporary.rename(_answer_file(task_file))


def _answer_file(task_file: Path) -> Path:
    return task_file.with_suffix(".result.json")
