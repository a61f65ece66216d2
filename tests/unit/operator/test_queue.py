"""The work queue, on a clock that the test turns."""

from __future__ import annotations

import asyncio

import pytest

from tunewright_operator.queue import WorkQueue


class Clock:
    """Monotonic seconds under the test's control."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Recorder:
    """A handler that notes its calls, and answers or fails as told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, float | Exception | None] = {}

    async def __call__(self, key: str) -> float | None:
        """Handle a key."""
        self.calls.append(key)
        answer = self.answers.get(key)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def clock() -> Clock:
    """Give a clock."""
    return Clock()


@pytest.fixture
def recorder() -> Recorder:
    """Give a handler."""
    return Recorder()


@pytest.fixture
def queue(recorder: Recorder, clock: Clock) -> WorkQueue[str]:
    """Give a queue without jitter."""
    return WorkQueue(recorder, 2, clock=clock, jitter=lambda: 0.0)


async def test_a_key_is_in_line_once(queue: WorkQueue[str], recorder: Recorder) -> None:
    """Many reasons to look at a key make one look, in the order of the first."""
    for key in ("a", "b", "a", "a"):
        queue.add(key)
    await queue.work_off()
    assert recorder.calls == ["a", "b"]


async def test_urgent_keys_go_first(queue: WorkQueue[str], recorder: Recorder) -> None:
    """They overtake the others, also one that waits already, but every eighth turn is the others'."""
    for key in ("x", "y", "z"):
        queue.add(key)
    queue.add("z", urgent=True)
    for number in range(8):
        queue.add(str(number), urgent=True)
    queue.add("0")
    assert queue.has_urgent
    await queue.work_off()
    assert recorder.calls == ["z", *"012345", "x", "6", "7", "y"]
    assert not queue.has_urgent


async def test_a_key_added_while_it_runs_comes_again(clock: Clock) -> None:
    """News during a pass lead to another pass afterwards, never to two at once."""
    running, most = 0, 0
    calls: list[str] = []
    queue: WorkQueue[str]

    async def handler(key: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        calls.append(key)
        if len(calls) == 1:
            queue.add(key)
            queue.add(key)
        await asyncio.sleep(0)
        running -= 1

    queue = WorkQueue(handler, 2, clock=clock)
    queue.add("a")
    task = asyncio.create_task(queue.run())
    await asyncio.sleep(0.05)
    task.cancel()
    assert (calls, most) == (["a", "a"], 1)


async def test_workers_share_the_line(clock: Clock) -> None:
    """As many keys are handled at once as there are workers, and no more."""
    running, most, done = 0, 0, 0

    async def handler(_: str) -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        done += 1

    queue: WorkQueue[str] = WorkQueue(handler, 3, clock=clock)
    task = asyncio.create_task(queue.run())
    for number in range(10):
        queue.add(str(number))
    await asyncio.sleep(0.1)
    task.cancel()
    assert (most, done) == (3, 10)


async def test_failures_back_off_and_recover(queue: WorkQueue[str], recorder: Recorder, clock: Clock) -> None:
    """A failing key comes again after 1, 2, 4 ... at most 300 seconds; a success starts over."""
    recorder.answers["a"] = RuntimeError("no")
    queue.add("a")
    waits = []
    for _ in range(11):
        await queue.work_off()
        waits.append(queue.release_due())
        clock.now += waits[-1] or 0
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    recorder.answers["a"] = None
    await queue.work_off()
    assert queue.release_due() is None
    recorder.answers["a"] = RuntimeError("no")
    queue.add("a")
    await queue.work_off()
    assert queue.release_due() == 1


async def test_jitter_lengthens_by_a_tenth_at_most(recorder: Recorder, clock: Clock) -> None:
    """Keys that failed together do not come back in step."""
    queue: WorkQueue[str] = WorkQueue(recorder, 1, clock=clock, jitter=lambda: 1.0)
    recorder.answers["a"] = RuntimeError("no")
    queue.add("a")
    await queue.work_off()
    assert queue.release_due() == pytest.approx(1.1)


async def test_the_handler_says_when_to_come_again(queue: WorkQueue[str], recorder: Recorder, clock: Clock) -> None:
    """A key is put in line after the time that its pass asked for."""
    recorder.answers["a"] = 30.0
    queue.add("a")
    await queue.work_off()
    assert queue.release_due() == 30
    clock.now += 30
    await queue.work_off()
    assert recorder.calls == ["a", "a"]


async def test_the_earlier_timer_counts(queue: WorkQueue[str], recorder: Recorder, clock: Clock) -> None:
    """A later timer does not delay an earlier one; an earlier one replaces a later one."""
    queue.add_after("a", 10)
    queue.add_after("a", 20)
    assert queue.release_due() == 10
    queue.add_after("a", 5)
    clock.now += 5
    await queue.work_off()
    assert recorder.calls == ["a"]
    clock.now += 60
    await queue.work_off()
    assert recorder.calls == ["a"]


async def test_timers_run(recorder: Recorder) -> None:
    """With the real clock, a key with a timer reaches a worker, also when a later one was set first."""
    loop = asyncio.get_running_loop()
    queue: WorkQueue[str] = WorkQueue(recorder, 1, clock=loop.time)
    task = asyncio.create_task(queue.run())
    queue.add_after("late", 60)
    await asyncio.sleep(0)
    queue.add_after("soon", 0.01)
    await asyncio.sleep(0.1)
    task.cancel()
    assert recorder.calls == ["soon"]


def test_how_long_a_key_has_waited(queue: WorkQueue[str], clock: Clock) -> None:
    """Health looks at the oldest key in line."""
    assert queue.oldest_seconds() == 0
    queue.add("a")
    clock.now += 7
    queue.add("b")
    assert queue.oldest_seconds() == 7
