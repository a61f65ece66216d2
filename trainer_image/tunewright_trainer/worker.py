"""The training process: `python -m tunewright_trainer.worker --work DIR`.

It imports the training stack (20 s of CPU) while the supervisor still fetches model and data, waits for the task,
trains, and ends with the exit code of `tunewright_api.exit_codes`. What it says goes to events.jsonl; stdout and
stderr are the run's log.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tunewright_api.exit_codes import OUTCOMES, ExitCode
from tunewright_trainer.errors import GpuOutOfMemory, TrainerError, fate_of
from tunewright_trainer.protocol import ErrorEvent, WorkerTask, read_task, write_event

if TYPE_CHECKING:
    from tunewright_trainer.callback import Report

POLL_SECONDS = 0.05
PARENT_POLL_SECONDS = 0.5
SCRATCH_FOLDER = "scratch"


def main() -> int:
    """Run the worker and return its exit code."""
    parser = argparse.ArgumentParser(description="Train what the task file in the work folder says.")
    parser.add_argument("--work", type=Path, required=True, help="work folder shared with the supervisor")
    work: Path = parser.parse_args().work
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    set_environment()
    # Here, not at the top: the environment must be set first, and a bad import must be reported as an event.
    try:
        import_stack()
        return run_task(work, wait_for_task(work))
    # Whatever our own fault is, the supervisor gets an event and the log a traceback.
    except Exception as error:
        traceback.print_exc()
        return fail(work, ExitCode.INTERNAL_ERROR, OUTCOMES[ExitCode.INTERNAL_ERROR].reason, describe(error))


def run_task(work: Path, task: WorkerTask) -> int:
    """Train; turn what the run is to blame for into its event and exit code."""
    import torch

    try:
        recipe_of(task)(task, partial(write_event, work), work / SCRATCH_FOLDER)
    except TrainerError as error:
        traceback.print_exc()
        code, reason = fate_of(error)
        return fail(work, code, reason, str(error))
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        given = task.run.hyperparameters
        message = (
            f"the GPU has no memory left with batchSize {given.batch_size} and maxSequenceLength "
            f"{given.max_sequence_length}: lower one of them, set gradientCheckpointing, or use QLoRA "
            f"({str(error).splitlines()[0]})"
        )
        return fail(work, GpuOutOfMemory.exit_code, GpuOutOfMemory.reason, message)
    return ExitCode.SUCCESS


def recipe_of(task: WorkerTask) -> Callable[[WorkerTask, Report, Path], None]:
    """Return the recipe of the task's objective."""
    from tunewright_trainer import classification, grpo, ppo, preference, reward, sft

    match task.run.objective.type:
        case "SFT":
            return sft.train
        case "DPO" | "KTO":
            return preference.train
        case "Reward":
            return reward.train
        case "GRPO":
            return grpo.train
        case "PPO":
            return ppo.train
        case "Classification":
            return classification.train


def import_stack() -> None:
    """Import the recipe with everything it needs, and keep progress bars out of the log."""
    import datasets
    import transformers

    from tunewright_trainer import classification, grpo, ppo, preference, reward, sft  # noqa: F401

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def wait_for_task(work: Path) -> WorkerTask:
    """Return the task once the supervisor has written it."""
    while (task := read_task(work)) is None:
        time.sleep(POLL_SECONDS)
    return task


def fail(work: Path, code: ExitCode, reason: str, message: str) -> int:
    """Report why the worker gives up."""
    write_event(work, ErrorEvent(exit_code=code, reason=reason, message=message))
    return code


def describe(error: Exception) -> str:
    """Return an unforeseen error in one line; its traceback is in the log."""
    return f"{type(error).__name__}: {error}".splitlines()[0] + " (traceback in the log)"


def end_with_parent(parent: int) -> None:
    """End this process once its parent is gone: nobody would publish what it trains."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(ExitCode.INTERNAL_ERROR)


def set_environment() -> None:
    """Set what libraries read while they are imported; what the pod sets itself wins."""
    defaults = {
        # Everything is on disk; a look-up at the hub would wait for a network that may not be there.
        "HF_HUB_OFFLINE": "1",
        # A spec asks for one GPU at most; the trainer refuses to start where it sees more.
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": str(cpu_limit()),
        # Waiting threads sleep instead of spinning: where cores are shared, as they are under a container's limit or
        # beside other pods, spinning takes the time of the thread that is waited for (steps took 2 to 4 times as long).
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def cpu_limit(cgroup_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many CPUs this process may use: the smaller of its affinity and its container's limit, at least 1.

    PyTorch counts the node's cores; with more threads than the limit allows, a step waits for throttled threads.
    """
    allowed = len(os.sched_getaffinity(0))
    if cgroup_file.exists():
        quota, period = cgroup_file.read_text().split()
        if quota != "max":
            allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


if __name__ == "__main__":
    sys.exit(main())
