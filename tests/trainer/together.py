"""Trains several tasks one after the other in the same processes, whose start takes longer than the training.

Started by torch.distributed.run: `tests/trainer/together.py FOLDER...`, a task.json in each folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from tunewright_trainer import recipe, worker, world
from tunewright_trainer.protocol import read_task
from tunewright_trainer.sharding import local


class Staying(world.World):
    """Processes that stay together after a task."""

    def leave(self) -> None:
        """Only wait for each other."""
        self.gather(None)


def note_held(rank: int) -> None:
    """Have every base that is loaded from now on described in a file: how many of its weights a process holds."""
    load = recipe.load_base

    def loaded(*args: Any, **settings: Any) -> Any:
        model = load(*args, **settings)
        weights = list(model.parameters())
        held = {
            "sharded": sum(isinstance(weight, DTensor) for weight in weights),
            "whole": sum(not isinstance(weight, DTensor) for weight in weights),
            "held": sum(local(weight).numel() for weight in weights),
            "all": sum(weight.numel() for weight in weights),
        }
        (Path(args[0].task.output_path).parent / f"held-{rank}.json").write_text(json.dumps(held))
        return model

    recipe.load_base = loaded


def main() -> int:
    """Train; return 1 when a task failed."""
    worker.import_stack()
    joined = world.join(60.0)
    together = Staying(joined.rank, joined.size, joined.local_rank, joined.waiting)
    note_held(joined.rank)
    for folder in map(Path, sys.argv[1:]):
        task = read_task(folder)
        assert task is not None
        if worker.run_task(folder, task, together):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
