"""The processes that train together, seen from one of them: who it is, and how they wait for each other.

The launcher (`launcher.py`) puts a process's place into its environment. Gradients and metrics are exchanged by PyTorch
and its users; here is only what the recipes themselves need. Waiting goes over a group of its own: PyTorch ends a
collective operation that takes half an hour, but one pod may fetch a large model for hours longer than another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tunewright_trainer.errors import InputsChanged, InternalError
from tunewright_trainer.protocol import WorkerTask

WAITING_LIMIT = timedelta(days=1)
"""For what one pod fetches or prepares longer than another; a process that ends is noticed by its connections."""
_GLOO = "gloo/transport"
"""Part of every message of gloo about a connection: the file of its source."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among the processes of this pod."""
    waiting: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Tell whether this is the process that reports, saves and verifies."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Wait for all processes; return what each of them gave, by rank."""
        if self.waiting is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def once_per_pod(self, make: Callable[[], T]) -> T:
        """Let one process of each pod make something, files above all, and give it to all of the pod."""
        made = make() if self.local_rank == 0 else None
        shared: T = self.gather(made)[self.rank - self.local_rank]  # type: ignore[assignment]  # a maker's, never None
        return shared

    def agree(self, task: WorkerTask) -> None:
        """Wait until every process has its task, and make sure that all have the same one.

        Raises:
            InputsChanged: The pods found different inputs.
            InternalError: There are more or fewer processes than the run has.
        """
        if self.size != task.run.world_size:
            raise InternalError(f"{self.size} processes were started, the run has {task.run.world_size}")
        keys = self.gather(task.run_key)
        if len(set(keys)) > 1:
            raise InputsChanged(
                f"the pods of the run found different inputs (run keys {', '.join(sorted(set(keys)))}): the model or "
                "the data were changed while the pods started; the next attempt starts from what is there then"
            )

    def leave(self) -> None:
        """Part from the others after the last thing that is done together.

        What follows in the first process takes as long as it takes, and the others may end before it.
        """
        if self.waiting is not None:
            self.gather(None)
            dist.destroy_process_group()


ALONE = World()


def join(collective_seconds: float) -> World:
    """Find the other processes of the run; a process that no launcher started trains alone.

    Args:
        collective_seconds: Longest time of one collective operation in training (`ddp_timeout`).
    """
    if not dist.is_torchelastic_launched():
        return ALONE
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=collective_seconds))
    waiting = dist.new_group(backend="gloo", timeout=WAITING_LIMIT)
    assert isinstance(waiting, dist.ProcessGroup), "this process is in the group of all"
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), waiting)


def is_peer_lost(error: Exception) -> bool:
    """Tell whether an error says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or _GLOO in str(error)
