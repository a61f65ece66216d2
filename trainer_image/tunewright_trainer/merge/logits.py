"""The process that compares logits: `python -m tunewright_trainer.merge.logits TASK.json`; see logit_check.py."""

from __future__ import annotations

import sys

from tunewright_trainer.merge.child import serve
from tunewright_trainer.merge.verification import LogitsOutcome, LogitsTask


def work(task: LogitsTask) -> LogitsOutcome:
    """Import what is slow, and compare."""
    import transformers

    from tunewright_trainer.merge.logit_check import check

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return check(task)


if __name__ == "__main__":
    sys.exit(serve(LogitsTask, work))
