"""The operator's process, with what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil

from tests.cluster import ports


class Operator:
    """The operator's process."""

    def __init__(self, kubeconfig: Path, log: Path) -> None:
        self._kubeconfig = kubeconfig
        self._log = log
        self.port = ports.free(1)[0]

    async def start(self) -> None:
        """Start and wait until the first list is done."""
        variables = {**os.environ, "KUBECONFIG": str(self._kubeconfig), "TUNEWRIGHT_PORT": str(self.port)}
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tunewright_operator", env=variables, stdout=log, stderr=log
            )
        self._usage = psutil.Process(self._process.pid)
        self.peak_rss = 0
        async with aiohttp.ClientSession() as session:
            while True:
                try:
                    async with session.get(f"http://127.0.0.1:{self.port}/readyz") as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """End the process in order."""
        self._process.send_signal(signal.SIGTERM)
        await self._process.wait()

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def rss_mb(self) -> int:
        """Return the resident memory, in megabytes."""
        return round(self._usage.memory_info().rss / 1e6)

    @contextlib.asynccontextmanager
    async def memory_sampled(self) -> AsyncIterator[None]:
        """Note the peak of the resident memory meanwhile."""
        task = asyncio.create_task(self._sample_memory())
        yield
        task.cancel()

    async def _sample_memory(self) -> None:
        while True:
            self.peak_rss = max(self.peak_rss, self._usage.memory_info().rss)
            await asyncio.sleep(0.1)

    async def metrics(self) -> dict[str, float]:
        """Return the operator's metrics, by name with labels."""
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{self.port}/metrics") as response,
        ):
            text = await response.text()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def signal(self, number: signal.Signals) -> None:
        """Stop the process, or let it go on."""
        self._process.send_signal(number)

    async def settled_requests(self) -> dict[str, float]:
        """Return `requests` once they no longer rise: events are posted behind the work."""
        found = await self.requests()
        while True:
            await asyncio.sleep(2)
            before, found = found, await self.requests()
            if found == before:
                return found

    async def requests(self) -> dict[str, float]:
        """Return requests to the API server by verb and resource, without lists."""
        found: dict[str, float] = {}
        for name, value in (await self.metrics()).items():
            if name.startswith("tunewright_api_requests_total") and 'verb="list"' not in name:
                labels = dict(part.split("=") for part in name[name.index("{") + 1 : -1].split(","))
                key = f"{labels['verb']} {labels['resource']}".replace('"', "")
                found[key] = found.get(key, 0) + value
        return found
