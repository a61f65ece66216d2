"""One local run through the supervisor with all that it says of its progress; prints it as JSON.

python -m bench.data.watched SPEC WORK, where SPEC is a FineTuneJob with local paths as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from bench.machine import peak_bytes
from tunewright_api.run_config import StorageSettings, build_train_run
from tunewright_api.run_report import Progress
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer import supervisor
from tunewright_trainer.settings import SupervisorSettings

WORKER_STAGES = ("Checking", "Loading", "Training", "Verifying")
"""Stages in which the worker lives."""


def main() -> int:
    """Run and report."""
    job = parse_finetunejob(json.loads(Path(sys.argv[1]).read_text()), local=True)
    run = build_train_run(job.spec, name="bench", namespace="bench", attempt=1, storage=StorageSettings())
    began = time.monotonic()
    said: list[dict[str, Any]] = []

    def watch(progress: Progress) -> None:
        said.append(
            {
                "seconds": time.monotonic() - began,
                "stage": progress.stage,
                "percent": progress.percent,
                "message": progress.message,
                "supervisor_bytes": peak_bytes(),
                "worker_bytes": peak_bytes(worker_id()) if progress.stage in WORKER_STAGES else 0,
            }
        )

    settings = SupervisorSettings(
        work=Path(sys.argv[2]), writer="0" * 8, port=0, local=True, echo=False, on_progress=watch
    )
    report = supervisor.run(run, settings)
    print(json.dumps({"exit_code": report.exit_code, "message": report.message, "said": said}))
    return report.exit_code


@functools.cache
def worker_id() -> int:
    """Return the worker's process id; found once, because looking for children looks at every process."""
    (worker,) = psutil.Process().children()
    return worker.pid


if __name__ == "__main__":
    sys.exit(main())
