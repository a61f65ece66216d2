"""The worker under the real launcher, with a recipe that only waits for the others: without the training stack it
starts in seconds.

LIGHT_WORKER names what happens: "finish", or after some steps "kill 1" or "refuse 1" (in the process of that rank).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.trainer.fake_worker import save
from tunewright_trainer import worker
from tunewright_trainer.errors import InvalidData
from tunewright_trainer.protocol import PlanEvent, StepEvent, WorkerTask
from tunewright_trainer.world import ALONE, World

if TYPE_CHECKING:
    from tunewright_trainer.callback import Report
    from tunewright_trainer.recipe import Recipe

STEPS = 20
FATEFUL_STEP = 10
PLAN = PlanEvent(total_steps=STEPS, dtype="Float32", trainable_parameters=8, total_parameters=100, train_rows=3)


def recipe(task: WorkerTask, report: Report, scratch: Path, world: World = ALONE) -> None:
    """Take steps that wait for all processes, as training does."""
    (task.output_path.parent / f"pid-{world.rank}").write_text(str(os.getpid()))
    report(PLAN)
    behaviour, _, rank = os.environ["LIGHT_WORKER"].partition(" ")
    for step in range(1, STEPS + 1):
        world.gather(step)
        report(StepEvent(step=step, loss=1.0, learning_rate=0.1))
        if step == FATEFUL_STEP and str(world.rank) == rank:
            if behaviour == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InvalidData("row 3 of this process is unusable")
        time.sleep(0.02)
    world.leave()
    if world.is_first:
        save(task.output_path, STEPS)


def the_recipe(task: WorkerTask) -> Recipe:
    """Return the only recipe, whatever the objective."""
    return recipe


worker.import_stack = lambda: None
worker.recipe_of = the_recipe

if __name__ == "__main__":
    worker.main()
