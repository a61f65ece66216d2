"""How many FineTuneJobs the operator carries: `make bench-controlplane`.

For each N: create N FineTuneJobs at once against a real API server, etcd and controller manager, and measure

- create -> Job: from the start of the request that creates the FineTuneJob to the Job's creation as this process's
  watch shows it. The controller manager is stopped meanwhile, because it would take the API server's time for pods,
  which are not measured (a further row shows what then remains);
- end -> terminal: kubelet and Job controller are played by this script, which gives every pod the status Succeeded
  with a report as termination message and then every Job the condition Complete; the operator is stopped meanwhile, so
  that for it all Jobs end at once. Measured from the moment it goes on to the last FineTuneJob's Complete;
- ceiling: the same number of status writes of the same size by this script, with as many at once as the operator has,
  while the operator is stopped: what the API server takes without any operator. End -> terminal is one such write per
  FineTuneJob, so their ratio says what the operator itself costs;
- CPU time by process while Jobs are created, and from end to terminal: the profile of either rate;
- requests: what the operator's own counter says, watches and the lists at its start not included, divided by N;
- restart: the operator is ended and started anew with all N in the cluster, until its queue is empty.

The operator runs as in production: a process of its own, with the chart's permissions and a service account's token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import ssl
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from kubernetes.aio import client, config

from bench.controlplane.objects import NAMESPACE, finetunejob, job_status, pod_status
from bench.controlplane.process import Operator
from tests.cluster import Cluster, down, processes, up
from tests.operator_process import grant, kubeconfig_of, kubectl
from tunewright_operator import kube
from tunewright_operator.kinds import FINETUNEJOB
from tunewright_operator.kube import Kube
from tunewright_operator.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FINETUNEJOBS = kube.workloads(FINETUNEJOB)
RESULTS = Path(__file__).parent / "results.json"
CLUSTER = f"bench-{os.getpid()}"
WRITERS = 32
SINGLES = 20
OPERATOR_CONCURRENCY = Settings.model_fields["concurrency"].default
Row = dict[str, Any]

# Kubeflow Trainer 2.3 with JobSet, and a 50-line prototype on kopf, on an idle machine of the same kind.
PEER = {"jobs_per_second": 33.0, "create_p95_seconds": 25.0, "requests_per_job": 9.3, "completions_per_second": 50.0}


@dataclass
class Seen:
    """Monotonic times at which the watches showed something, by name."""

    created: dict[str, float] = field(default_factory=dict)
    job: dict[str, float] = field(default_factory=dict)
    job_complete: dict[str, float] = field(default_factory=dict)
    terminal: dict[str, float] = field(default_factory=dict)
    pods: dict[str, str] = field(default_factory=dict)
    """Pod by FineTuneJob."""
    jobs_created: int = 0


async def watch(api: Kube, resource: kube.Resource, seen: Seen) -> None:
    """Follow a resource of the namespace and note times."""
    path = f"{resource[0]}/namespaces/{NAMESPACE}/{resource[1]}?watch=true"
    tls: ssl.SSLContext = api._client.rest_client.ssl_context
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**21) as session:
        # The API server ends a watch whose reader falls behind, with an error event or by closing the connection; a new
        # one begins with all that is there.
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{api.configuration.host}/{path}", ssl=tls) as response:
                    async for line in response.content:
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            break
                        note(resource, event["object"], seen)


def note(resource: kube.Resource, raw: dict[str, Any], seen: Seen) -> None:
    """Note what an object shows for the first time."""
    now = time.monotonic()
    labels, status = raw["metadata"].get("labels", {}), raw.get("status", {})
    if resource == FINETUNEJOBS:
        if status.get("completionTime"):
            seen.terminal.setdefault(raw["metadata"]["name"], now)
        return
    name = labels.get("tunewright.dev/finetunejob", "")
    if resource == kube.PODS:
        seen.pods.setdefault(name, raw["metadata"]["name"])
        return
    if name not in seen.job:
        seen.jobs_created += 1
    seen.job.setdefault(name, now)
    if any(c["type"] == "Complete" and c["status"] == "True" for c in status.get("conditions", [])):
        seen.job_complete.setdefault(name, now)


async def in_parallel(names: list[str], act: Any, at_once: int = WRITERS) -> None:
    """Call `act(name)` for all names, `at_once` at a time."""
    line = iter(names)

    async def worker() -> None:
        for name in line:
            await act(name)

    await asyncio.gather(*(worker() for _ in range(at_once)))


async def until(condition: Any, limit: float, what: str) -> None:
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not reached in {limit:.0f} s")
        await asyncio.sleep(0.02)


def percentile(values: list[float], share: float) -> float:
    """Return a percentile by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def signal_controller_manager(cluster: Cluster, number: signal.Signals) -> None:
    """Stop the controller manager, or let it go on."""
    for process in processes.running(cluster.kubeconfig.parent):
        if process.component == "kube-controller-manager":
            os.kill(process.pid, number)


@dataclass(frozen=True)
class Bench:
    """One size on a fresh cluster, phase after phase; each returns its part of the row."""

    names: list[str]
    cluster: Cluster
    api: Kube
    operator: Operator
    seen: Seen

    def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time that everything at work has used so far, by process."""
        found = {p.component: psutil.Process(p.pid) for p in processes.running(self.cluster.kubeconfig.parent)}
        times = {name: process.cpu_times() for name, process in {**found, "benchmark": psutil.Process()}.items()}
        return {name: t.user + t.system for name, t in times.items()} | {"operator": self.operator.cpu_seconds()}

    def cpu_since(self, before: dict[str, float]) -> dict[str, float]:
        """Return the CPU time used since `before`, by process."""
        return {name: round(value - before[name], 1) for name, value in self.cpu_seconds().items()}

    async def submit(self, name: str) -> None:
        """Create a FineTuneJob and note when the request began."""
        self.seen.created[name] = time.monotonic()
        await self.api.create(FINETUNEJOBS, NAMESPACE, finetunejob(name))

    async def singles(self, count: int) -> Row:
        """Create `count` FineTuneJobs one after the other, each when the one before has its Job."""
        waits = []
        for number in range(count):
            name = f"single-{number}"
            await self.submit(name)
            await until(lambda name=name: name in self.seen.job, 30, "single Job")
            waits.append(self.seen.job[name] - self.seen.created[name])
        await asyncio.sleep(3)
        return {"single_create_p95_seconds": round(percentile(waits, 0.95), 3)}

    async def creation(self, *, with_pods: bool) -> Row:
        """Create all at once, until all have their Job."""
        seen, before = self.seen, self.cpu_seconds()
        if not with_pods:
            signal_controller_manager(self.cluster, signal.SIGSTOP)
        began = time.monotonic()
        await in_parallel(self.names, self.submit)
        calls = len(self.names) / (time.monotonic() - began)
        await until(lambda: all(n in seen.job for n in self.names), 600, "Jobs")
        waits = [seen.job[name] - seen.created[name] for name in self.names]
        took = max(seen.job[name] for name in self.names) - min(seen.created[name] for name in self.names)
        used = self.cpu_since(before)
        signal_controller_manager(self.cluster, signal.SIGCONT)
        await until(lambda: all(n in seen.pods for n in self.names), 900, "pods")
        await asyncio.sleep(3)
        return {
            "create_calls_per_second": round(calls, 1),
            "jobs_per_second": round(len(self.names) / took, 1),
            **{f"create_p{share}_seconds": round(percentile(waits, share / 100), 3) for share in (50, 95, 99)},
            "create_cpu_seconds": used,
        }

    async def completion(self) -> Row:
        """End all pods and Jobs while the operator is stopped, until all FineTuneJobs are terminal."""
        seen = self.seen
        signal_controller_manager(self.cluster, signal.SIGSTOP)
        await in_parallel(self.names, self._end_pod)
        await asyncio.sleep(3)
        self.operator.signal(signal.SIGSTOP)
        await in_parallel(self.names, self._end_job)
        await until(lambda: all(n in seen.job_complete for n in self.names), 900, "ends of Jobs")
        before, first = self.cpu_seconds(), time.monotonic()
        self.operator.signal(signal.SIGCONT)
        await until(lambda: all(n in seen.terminal for n in self.names), 900, "ends")
        used = self.cpu_since(before)
        signal_controller_manager(self.cluster, signal.SIGCONT)
        lags = [seen.terminal[n] - first for n in self.names]
        return {
            "completions_per_second": round(len(lags) / max(lags), 1),
            "terminal_p95_seconds": round(percentile(lags, 0.95), 3),
            "finish_cpu_seconds": used,
        }

    async def ceiling(self) -> Row:
        """Write every status once more, with the operator stopped."""
        everything = {o["metadata"]["name"]: o["status"] async for o in self.api.list(FINETUNEJOBS, NAMESPACE)}

        async def write(name: str) -> None:
            changed = {**everything[name], "usage": {"gpuSeconds": 1, "lostGpuSeconds": 0}}
            await self.api.patch_status(FINETUNEJOBS, NAMESPACE, name, {"status": changed})

        self.operator.signal(signal.SIGSTOP)
        began = time.monotonic()
        await in_parallel(self.names, write, OPERATOR_CONCURRENCY)
        rate = len(self.names) / (time.monotonic() - began)
        self.operator.signal(signal.SIGCONT)
        return {"status_writes_per_second_without_operator": round(rate, 1)}

    async def _end_pod(self, name: str) -> None:
        await self.api.patch_status(kube.PODS, NAMESPACE, self.seen.pods[name], {"status": pod_status()})

    async def _end_job(self, name: str) -> None:
        await self.api.patch_status(kube.JOBS, NAMESPACE, f"{name}-train-1", {"status": job_status()})

    async def restart(self) -> Row:
        """Start the operator with everything in the cluster and wait until it has caught up."""
        await self.operator.stop()
        began = time.monotonic()
        await self.operator.start()
        async with self.operator.memory_sampled():
            while True:
                found = await self.operator.metrics()
                events = found.get('tunewright_watch_events_total{resource="finetunejobs"}', 0)
                if events >= len(self.names) and found["tunewright_workqueue_depth"] == 0:
                    break
                await asyncio.sleep(0.1)
            took = time.monotonic() - began
            await asyncio.sleep(2)
        writes = sum(value for key, value in (await self.operator.requests()).items() if not key.startswith("get"))
        return {
            "restart_seconds": round(took, 1),
            "restart_writes": int(writes),
            "restart_peak_rss_mb": round(self.operator.peak_rss / 1e6),
        }


async def measure(count: int, cluster: Cluster, folder: Path, *, with_pods: bool) -> Row:
    """Run one size on a fresh cluster; `with_pods`: pods are made while Jobs are, not afterwards."""
    configuration = client.Configuration()
    await config.load_kube_config(  # type: ignore[no-untyped-call]
        str(cluster.kubeconfig), client_configuration=configuration
    )
    names = [f"run-{number:05d}" for number in range(count)]
    kubectl(cluster, "create", "namespace", NAMESPACE)
    # A group, so that a watch that fails ends the measurement instead of leaving it to wait.
    async with Kube(configuration, WRITERS) as api, asyncio.TaskGroup() as watching:
        operator, seen = Operator(kubeconfig_of(cluster, folder), folder / "operator.log"), Seen()
        await operator.start()
        tasks = [watching.create_task(watch(api, r, seen)) for r in (FINETUNEJOBS, kube.JOBS, kube.PODS)]
        bench = Bench(names, cluster, api, operator, seen)
        await asyncio.sleep(1)
        row: Row = {"finetunejobs": count, "pods_meanwhile": with_pods, "rss_idle_mb": operator.rss_mb()}
        async with operator.memory_sampled():
            row |= await bench.singles(SINGLES)
            before = await operator.settled_requests()
            row |= await bench.creation(with_pods=with_pods)
            row |= await bench.completion()
            after = await operator.settled_requests()
            row |= await bench.ceiling()
        row["requests"] = {key: round((value - before.get(key, 0)) / count, 3) for key, value in after.items()}
        row["requests_per_job"] = round(sum(row["requests"].values()), 2)
        row["duplicate_jobs"] = await jobs_of(api) - count - SINGLES
        row["peak_rss_mb"] = round(operator.peak_rss / 1e6)
        row |= await bench.restart()
        await operator.stop()
        for task in tasks:
            task.cancel()
    return row


async def jobs_of(api: Kube) -> int:
    """Count the Jobs of the namespace."""
    return sum([1 async for _ in api.list(kube.JOBS, NAMESPACE)])


COLUMNS = (
    ("N", "finetunejobs"),
    ("and pods", "pods_meanwhile"),
    ("Jobs/s", "jobs_per_second"),
    ("p50 s", "create_p50_seconds"),
    ("p95 s", "create_p95_seconds"),
    ("p99 s", "create_p99_seconds"),
    ("1 CR p95", "single_create_p95_seconds"),
    ("ends/s", "completions_per_second"),
    ("ceiling", "status_writes_per_second_without_operator"),
    ("end p95", "terminal_p95_seconds"),
    ("req/CR", "requests_per_job"),
    ("RSS MB", "peak_rss_mb"),
    ("restart s", "restart_seconds"),
    ("writes", "restart_writes"),
    ("twice", "duplicate_jobs"),
)


def print_table(rows: list[Row]) -> None:
    """Print the rows, and what they mean next to a peer."""
    print("".join(f"{title:>10}" for title, _ in COLUMNS))
    for row in rows:
        print("".join(f"{row[key]:>10}" for _, key in COLUMNS))
    row = next((r for r in rows if r["finetunejobs"] == 1000), rows[-1])
    print(
        f"\n{row['finetunejobs']} FineTuneJobs at once: {row['jobs_per_second']} Jobs/s, "
        f"{row['jobs_per_second'] / PEER['jobs_per_second']:.1f} times Kubeflow Trainer 2.3 "
        f"({PEER['jobs_per_second']:.0f} Jobs/s); {row['requests_per_job']} API requests per FineTuneJob "
        f"(Trainer: {PEER['requests_per_job']})"
    )
    cores, used = os.cpu_count() or 1, row["finish_cpu_seconds"]
    parts = ", ".join(f"{name} {1000 * seconds / row['finetunejobs']:.1f}" for name, seconds in used.items() if seconds)
    each = 1000 * sum(used.values()) / row["finetunejobs"]
    print(f"End -> terminal: {each:.1f} ms of CPU each ({parts}), at most {1000 * cores / each:.0f}/s on {cores} cores")


def machine() -> Row:
    """Describe where the numbers were measured."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Measure all sizes, write the results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[200, 1000, 5000], help="numbers of FineTuneJobs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    arguments = parser.parse_args()
    described = machine()
    rows = []
    for size, with_pods in [
        *((size, False) for size in arguments.sizes),
        *([(1000, True)] if 1000 in arguments.sizes and len(arguments.sizes) > 1 else []),
    ]:
        down(CLUSTER)
        cluster = up("control-plane", name=CLUSTER)
        grant(cluster)
        print(f"N = {size} ...", file=sys.stderr, flush=True)
        rows.append(asyncio.run(measure(size, cluster, cluster.kubeconfig.parent, with_pods=with_pods)))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    down(CLUSTER)
    versions = {name: version(name) for name in ("tunewright", "kopf", "kubernetes", "aiohttp", "pydantic", "uvloop")}
    versions["python"] = platform.python_version()
    document = {"machine": described, "versions": versions, "peer": PEER, "rows": rows}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
