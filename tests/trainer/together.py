"""Trains several tasks one after the other in the same processes, whose start takes longer than the training.

Started by torch.distributed.run: `tests/trainer/together.py FOLDER...`, a task.json in each folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunewright_trainer import worker, world
from tunewright_trainer.protocol import read_task


class Staying(world.World):
    """Processes that stay together after a task."""

    def leave(self) -> None:
        """Only wait for each other."""
        self.gather(None)


def main() -> int:
    """Train; return 1 when a task failed."""
    worker.import_stack()
    joined = world.join(60.0)
    together = Staying(joined.rank, joined.size, joined.local_rank, joined.waiting)
    for folder in map(Path, sys.argv[1:]):
        task = read_task(folder)
        assert task is not None
        if worker.run_task(folder, task, together):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
