"""Several training processes: `python -m tunewright_trainer.launcher WORK ...`, between the supervisor and the workers.

It is PyTorch's own launcher (`torch.distributed.run`), which finds the launchers of the other pods, starts this pod's
workers with their places in the environment, and ends them all when one of them fails. Added are the protocol's words
for what went wrong: an exit code that says how a worker died, and an event where the pods do not find each other.
A run of one process is started without it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewright_api.exit_codes import ExitCode
from tunewright_api.run_config import TrainRun
from tunewright_trainer.errors import InvalidConfiguration, PeerLost
from tunewright_trainer.protocol import ErrorEvent, write_event
from tunewright_trainer.worker import LAUNCHER_PID, set_environment

NODE_RANK = "PET_NODE_RANK"
ADDRESS = "PET_MASTER_ADDR"
PORT = "PET_MASTER_PORT"
"""What the operator puts into the environment of each of several pods; the names are PyTorch's."""
DEFAULT_PORT = 29500
RENDEZVOUS_SECONDS = 1800
"""How long pods wait for each other. An autoscaler gives a new node 15 minutes, and an image of 10 GB takes 10 more;
pods that wait hold their GPUs, so it is not hours."""
COLLECTIVE_SECONDS = 1800.0
"""PyTorch's own limit for a collective operation in training, where hyperparameters.extra.ddp_timeout says no other."""
SHUTDOWN_SECONDS = 3
"""From SIGTERM to SIGKILL for the other workers of a pod; less than the supervisor gives the launcher itself."""


@dataclass(frozen=True)
class Place:
    """Which of a run's pods this one is, and where the first of them is reached."""

    node_rank: int = 0
    address: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def is_first(self) -> bool:
        """Tell whether this pod publishes, tracks and shows the progress."""
        return self.node_rank == 0


def find_place(run: TrainRun, environment: Mapping[str, str]) -> Place:
    """Return the place of this pod; a run of one pod has only one."""
    if run.nodes == 1:
        return Place()
    return Place(
        node_rank=int(environment.get(NODE_RANK, "0")),
        address=environment.get(ADDRESS, "127.0.0.1"),
        port=int(environment.get(PORT, DEFAULT_PORT)),
    )


def check_place(run: TrainRun, environment: Mapping[str, str]) -> None:
    """Refuse several processes where they cannot work.

    Raises:
        InvalidConfiguration: Naming the fields.
    """
    if run.objective.type == "PPO" and run.world_size > 1:
        raise InvalidConfiguration(
            "objective PPO trains in one process: set resources.gpus to 0 or 1 and resources.nodes to 1"
        )
    missing = [name for name in (NODE_RANK, ADDRESS, PORT) if name not in environment]
    if run.nodes > 1 and missing:
        raise InvalidConfiguration(
            f"resources.nodes is {run.nodes}, but {', '.join(missing)} is not set: the operator does that in a "
            "cluster; a run on this machine has one node, so set resources.nodes to 1"
        )


def launch_command(run: TrainRun, place: Place, worker_command: Sequence[str], work: Path) -> tuple[str, ...]:
    """Return what the supervisor starts: the worker itself, or a launcher of several."""
    if run.world_size == 1:
        return tuple(worker_command)
    if run.nodes == 1:
        # The launcher takes a free port by itself.
        meeting = ["--standalone", f"--local-addr={place.address}"]
    else:
        meeting = [
            f"--node-rank={place.node_rank}",
            f"--master-addr={place.address}",
            f"--master-port={place.port}",
            f"--rdzv-conf=timeout={RENDEZVOUS_SECONDS}",
        ]
    limit = (run.hyperparameters.extra or {}).get("ddp_timeout", COLLECTIVE_SECONDS)
    return (
        *(sys.executable, "-m", "tunewright_trainer.launcher", str(work)),
        f"--nnodes={run.nodes}",
        f"--nproc-per-node={run.processes}",
        *meeting,
        "--max-restarts=0",  # the operator starts an attempt again as a whole
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        f"--log-dir={os.devnull}",  # the workers' output is the launcher's own
        "--no-python",
        *worker_command,
        f"--collective-seconds={limit}",
    )


def main() -> int:
    """Run the workers of this pod and return an exit code that says how they ended."""
    # Later than the start of the supervisor, which shares the upper half of this module.
    import torch.distributed as dist
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    work, given = Path(sys.argv[1]), run.parse_args(sys.argv[2:])
    set_environment(int(given.nproc_per_node))
    os.environ[LAUNCHER_PID] = str(os.getpid())
    try:
        run.run(given)
    except ChildFailedError as error:
        return exit_code_of(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        return 128 + error.sigval
    except dist.DistError as error:
        traceback.print_exc()
        message = (
            f"the {given.nnodes} pods of the run did not find each other at {given.master_addr}:{given.master_port} "
            f"({given.rdzv_conf.replace('=', ' ')} s): see whether all pods of the Job were scheduled and run, and "
            f"whether a NetworkPolicy keeps them from the first one's port ({str(error).splitlines()[0]})"
        )
        write_event(work, ErrorEvent(exit_code=PeerLost.exit_code, reason=PeerLost.reason, message=message))
        return PeerLost.exit_code
    return ExitCode.SUCCESS


def exit_code_of(codes: Iterable[int]) -> int:
    """Return the exit code of workers of which one failed: what killed a worker is the cause of what became of others.

    Args:
        codes: Of those that did not end well; negative is a signal. SIGTERM is the launcher's own.
    """
    own = [code for code in codes if code != -signal.SIGTERM]
    killed = [-code for code in own if code < 0]
    if killed:
        return 128 + (signal.SIGKILL if signal.SIGKILL in killed else killed[0])
    return next(iter(own), ExitCode.INTERNAL_ERROR)


if __name__ == "__main__":
    sys.exit(main())
