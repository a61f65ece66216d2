"""Progress of a pod whose image may be anybody's: asked for over real HTTP, believed only within limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from tests.unit.operator.builders import NOW, SETTINGS, TIME, created, job, pod
from tunewright_api.run_report import MAX_PROGRESS_BYTES, Progress
from tunewright_operator import observe
from tunewright_operator.kinds import FINETUNEJOB, Key
from tunewright_operator.observe import Observer
from tunewright_operator.observed import ObservedPod, ObservedRun
from tunewright_operator.store import Entry, Store

VALID = {"stage": "Training", "step": 3, "totalSteps": 10, "percent": 30.0, "loss": 1.5, "updatedAt": TIME}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def pull(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[Answer], Awaitable[Progress | None]]]:
    """Give a function that asks a server with a given answer."""
    runners: list[web.AppRunner] = []
    observer = Observer(None, Store(), SETTINGS)  # type: ignore[arg-type]  # no request goes to the API server

    async def ask(answer: Answer) -> Progress | None:
        application = web.Application()
        application.router.add_get("/progress", answer)
        application.router.add_get("/elsewhere", text(json.dumps(VALID)))
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setattr(observe, "PROGRESS_PORT", runner.addresses[0][1])
        running = pod(phase="Running", running=True, ip="127.0.0.1")
        return await observer._progress(Entry(), running)

    yield ask
    await observer.close()
    for runner in runners:
        await runner.cleanup()


def text(body: str, **options: Any) -> Answer:
    """Return an answer with a body."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(text=body, **options)

    return answer


async def redirect(_: web.Request) -> web.StreamResponse:
    """Send the operator elsewhere."""
    raise web.HTTPFound("/elsewhere")


async def endless(request: web.Request) -> web.StreamResponse:
    """Never stop sending."""
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(10_000):
        await response.write(b" " * 16384)
    return response


async def silent(_: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.sleep(60)
    return web.Response()


async def test_valid(pull: Any) -> None:
    """A valid answer is progress."""
    progress = await pull(text(json.dumps(VALID)))
    assert progress == Progress.model_validate(VALID)


REFUSED: dict[str, Answer] = {
    "unknown field": text(json.dumps({**VALID, "more": 1})),
    "unknown stage": text(json.dumps({**VALID, "stage": "Dreaming"})),
    "not a number": text(json.dumps({**VALID, "loss": float("nan")})),
    "long history": text(json.dumps({**VALID, "lossHistory": [[n, 1.0] for n in range(65)]})),
    "no JSON": text("<html>"),
    "too long": text(json.dumps(VALID) + " " * MAX_PROGRESS_BYTES),
    "error": text(json.dumps(VALID), status=500),
    "redirect": redirect,
    "endless": endless,
    "silent": silent,
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED.keys())
async def test_refused(pull: Any, answer: Answer) -> None:
    """Anything else is no progress, and costs 2 seconds at most."""
    async with asyncio.timeout(4):
        assert await pull(answer) is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a list of the addresses that are asked for progress."""
    addresses: list[str] = []

    async def note(_: Observer, ip: str) -> Progress:
        addresses.append(ip)
        return Progress.model_validate(VALID)

    monkeypatch.setattr(Observer, "_pull", note)
    return addresses


async def test_no_more_often_than_the_interval(asked: list[str]) -> None:
    """After a write the pod is left alone for the interval; a pod that does not run is not asked."""
    observer = Observer(None, Store(), SETTINGS)  # type: ignore[arg-type]  # no request goes to the API server
    entry = Entry()
    running = pod(phase="Running", running=True, ip="10.0.0.1")
    assert await observer._progress(entry, running) is not None
    assert await observer._progress(entry, running) is None
    assert await observer._progress(Entry(), pod(ip="10.0.0.1")) is None
    await observer.close()
    assert asked == ["10.0.0.1"]


async def observed(completions: int, *pods: ObservedPod) -> ObservedRun:
    """Return what is seen of a run with these pods in the store."""
    store = Store()
    entry = store.entry(Key(FINETUNEJOB, "team-a", "bot"))
    entry.jobs = {"bot-train-1": job(completions=completions)}
    entry.pods = {one.name: one for one in pods}
    observer = Observer(None, store, SETTINGS)  # type: ignore[arg-type]  # no request goes to the API server
    try:
        return await observer.run(Key(FINETUNEJOB, "team-a", "bot"), "uid-1", created(), NOW)
    finally:
        await observer.close()


def running(index: int, **changes: Any) -> ObservedPod:
    """Return the pod of a node."""
    values = {"name": f"x-{index}", "index": index, "phase": "Running", "running": True, "ip": f"10.0.0.{index}"}
    return pod(**{**values, **changes})


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (running(1), ["10.0.0.0"]),
        (running(1, phase="Succeeded", running=False, exit_code=0), ["10.0.0.0"]),
        (running(1, phase="Pending", running=False), []),
        (running(1, phase="Failed", running=False, exit_code=1), []),
        (running(0, name="x-0-earlier", created="2026-01-01T11:00:00Z"), []),
    ],
    ids=["runs", "is done", "waits", "failed", "is not there"],
)
async def test_the_first_of_several_pods_is_asked(asked: list[str], second: ObservedPod, expected: list[str]) -> None:
    """And only once the others do their part: before that there is nothing to show."""
    seen = await observed(2, second, running(0))
    assert asked == expected
    assert seen.pod == running(0)
    assert seen.followers == (() if second.index == 0 else (second,))
    assert (seen.progress is not None) == bool(expected)


async def test_the_number_of_an_only_pod_is_not_looked_at(asked: list[str]) -> None:
    """Annotations of pods are the user's to give."""
    seen = await observed(1, running(3))
    assert (seen.pod, seen.followers, asked) == (running(3), (), ["10.0.0.3"])
