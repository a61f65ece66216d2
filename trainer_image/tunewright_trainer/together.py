"""Jobs at once, watched meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

POLL_SECONDS = 0.1


def run_together(
    jobs: Sequence[Callable[[], Any]], watch: Callable[[], None], before_last: Callable[[], None] | None = None
) -> list[Any]:
    """Run jobs at once and return their results in order. The first error ends all the others.

    Args:
        jobs: One thread each.
        watch: Called every 0.1 s; what it raises counts as an error.
        before_last: Called once when only the first job is left.
    """
    pool = ThreadPoolExecutor(len(jobs), "supervisor")
    futures = [pool.submit(job) for job in jobs]
    try:
        while _pending(futures):
            if before_last is not None and all(future.done() for future in futures[1:]):
                before_last()
                before_last = None
            watch()
        return [future.result() for future in futures]
    finally:
        # Not waited for: a thread in a hanging request must not hold up the report.
        pool.shutdown(wait=False, cancel_futures=True)


def _pending(futures: Sequence[Future[Any]]) -> bool:
    """Wait a moment; raise the first error; tell whether there is something left to wait for."""
    done, left = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    return bool(left)
