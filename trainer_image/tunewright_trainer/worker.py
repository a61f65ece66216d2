"""The training process: `python -m tunewright_trainer.worker --work DIR`, several of them under `launcher.py`.

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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import BaseModel

from tunewright_api.exit_codes import OUTCOMES, ExitCode
from tunewright_trainer.errors import GpuOutOfMemory, PeerLost, TrainerError, fate_of
from tunewright_trainer.protocol import ErrorEvent, WorkerTask, read_task, write_event
from tunewright_trainer.worker_process import die_with_parent

if TYPE_CHECKING:
    from tunewright_trainer.recipe import Recipe
    from tunewright_trainer.world import World

POLL_SECONDS = 0.05
PARENT_POLL_SECONDS = 0.5
SCRATCH_FOLDER = "scratch"
LAUNCHER_PID = "TUNEWRIGHT_LAUNCHER_PID"
"""Environment variable with the parent's process id, under a launcher."""


def main() -> NoReturn:
    """Run the worker, and end the process with its exit code."""
    code = run()
    if "LOCAL_RANK" in os.environ:
        # Without Python's way to end, which may wait for operations that nobody else takes part in any more, or fail,
        # upon which the launcher would end the process that verifies the result.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run() -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description="Train what the task file in the work folder says.")
    parser.add_argument("--work", type=Path, required=True, help="work folder shared with the supervisor")
    parser.add_argument(
        "--collective-seconds", type=float, default=0.0, help="limit of a collective operation, under a launcher"
    )
    given = parser.parse_args()
    die_with_parent()
    # A thread besides: the launcher may have ended before this line, and not every container runtime has such a kernel.
    parent = int(os.environ.get(LAUNCHER_PID, os.getppid()))
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    set_environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # Here, not at the top: the environment must be set first, and a bad import must be reported as an event.
    try:
        import_stack()
        return train_together(given.work, given.collective_seconds)
    # Whatever our own fault is, the supervisor gets an event and the log a traceback.
    except Exception as error:
        traceback.print_exc()
        return fail(given.work, ExitCode.INTERNAL_ERROR, OUTCOMES[ExitCode.INTERNAL_ERROR].reason, describe(error))


def train_together(work: Path, collective_seconds: float) -> int:
    """Join the other processes where there are some, take the task and carry it out."""
    from tunewright_trainer.world import is_peer_lost, join

    try:
        world = join(collective_seconds)
        return run_task(work, wait_for_task(work), world)
    except Exception as error:
        if not is_peer_lost(error):
            raise
        traceback.print_exc()
        message = (
            "the connection to the other training processes is lost: see how the other pods of the Job ended; where "
            f"none failed, see whether a NetworkPolicy or a node keeps them apart ({describe(error)})"
        )
        return fail(work, PeerLost.exit_code, PeerLost.reason, message)


def run_task(work: Path, task: WorkerTask, world: World | None = None) -> int:
    """Train; turn what the run is to blame for into its event and exit code."""
    import torch

    from tunewright_trainer.world import ALONE

    world = world or ALONE
    report = partial(write_event, work) if world.is_first else keep_quiet
    try:
        world.agree(task)
        recipe_of(task)(task, report, work / SCRATCH_FOLDER, world)
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


def keep_quiet(_: BaseModel) -> None:
    """Report nothing: the first process of the run tells for all."""


def recipe_of(task: WorkerTask) -> Recipe:
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


def set_environment(processes: int) -> None:
    """Set what libraries read while they are imported; what the pod sets itself wins.

    Args:
        processes: Training processes that share this machine's CPUs, with a GPU each where it has some.
    """
    defaults = {
        # Everything is on disk; a look-up at the hub would wait for a network that may not be there.
        "HF_HUB_OFFLINE": "1",
        # No more than the run asks for: a process that trains alone would take all that it sees.
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes))),
        "OMP_NUM_THREADS": str(max(1, cpu_limit() // processes)),
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
    main()
