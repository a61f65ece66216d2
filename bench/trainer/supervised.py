"""One local run through the supervisor, as `tunewright run` does it; prints the supervisor's own numbers as JSON.

python -m bench.trainer.supervised SPEC WORK, where SPEC is a FineTuneJob with local paths as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil

from bench.machine import peak_bytes
from tunewright_api.run_config import StorageSettings, build_train_run
from tunewright_api.validation import parse_finetunejob
from tunewright_trainer import supervisor
from tunewright_trainer.settings import SupervisorSettings


def main() -> int:
    """Run and report."""
    job = parse_finetunejob(json.loads(Path(sys.argv[1]).read_text()), local=True)
    run = build_train_run(job.spec, name="bench", namespace="bench", attempt=1, storage=StorageSettings())
    work = Path(sys.argv[2])
    worker_started: list[float] = []

    def watch(_: object) -> None:
        if not worker_started:
            worker_started.extend(p.create_time() for p in psutil.Process().children())

    settings = SupervisorSettings(work=work, writer="0" * 8, port=0, local=True, echo=False, on_progress=watch)
    report = supervisor.run(run, settings)
    numbers = {
        "exit_code": report.exit_code,
        "message": report.message,
        "worker_start_seconds": worker_started[0] - psutil.Process(os.getpid()).create_time(),
        "supervisor_peak_bytes": peak_bytes(),
        "seconds": time.time() - psutil.Process().create_time(),
    }
    print(json.dumps(numbers))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
