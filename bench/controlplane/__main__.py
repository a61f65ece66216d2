"""How many FineTuneJobs the operator carries: `make bench-controlplane`.

For each N: create N FineTuneJobs at once against a real API server, etcd and controller manager, and measure

- create -> Job: from the start of the request that creates the FineTuneJob to the Job's creation as this process's
  watch shows it. The controller manager is stopped meanwhile, because it would take the API server's time for pods,
  which are not measured (a further row shows what then remains);
- end -> terminal: kubelet and Job controller are played by this script, which gives every pod the status Succeeded
  with a report as termination message and then every Job the condition Complete; the operator is stopped meanwhile, so
  that for it all Jobs end at once. Measured from the moment it goes on to the last FineTuneJob's Complete;
- requests: what the operator's own counter says, watches and the lists at its start not included, divided by N;
- restart: the operator is ended and started anew with all N in the cluster, until its queue is empty.

The operator runs as in production: a process of its own, with the chart's permissions and a service account's token.
"""

from __future__ import annotations

import argparse
import asyncio
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

from tests.cluster import Cluster, down, ports, processes, up
from tests.operator_process import grant, kubeconfig_of, kubectl
from tunewright_operator import kube
from tunewright_operator.kube import Kube

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results.json"
NAMESPACE = "bench"
CLUSTER = f"bench-{os.getpid()}"
WRITERS = 32

# Kubeflow Trainer 2.3 with JobSet, and a 50-line prototype on kopf, on an idle machine of the same kind.
PEER = {"jobs_per_second": 33.0, "create_p95_seconds": 25.0, "requests_per_job": 9.3, "completions_per_second": 50.0}

REPORT = {
    "version": 1,
    "exitCode": 0,
    "reason": "Succeeded",
    "message": "",
    "stage": "Finished",
    "step": 10,
    "totalSteps": 10,
    "runKey": "0123456789abcdef",
    "loss": 1.5,
    "output": {
        "uri": "s3://models/bench/0123456789abcdef/01234567/adapter",
        "manifestUri": "s3://models/bench/0123456789abcdef/manifest.json",
        "digest": "sha256:" + "0" * 64,
        "sizeBytes": 1000,
    },
}


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


def finetunejob(name: str) -> dict[str, Any]:
    """Return a FineTuneJob as users write it."""
    return {
        "apiVersion": "tunewright.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
            "dataset": {"train": [{"uri": "s3://datasets/support/train.jsonl"}], "validationFraction": 0.1},
            "method": {"type": "LoRA"},
            "output": {"uri": f"s3://models/{name}"},
            "storage": {"secretName": "s3-credentials"},
        },
    }


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

    async def sample_memory(self) -> None:
        """Note the peak of the resident memory until cancelled."""
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


async def watch(api: Kube, resource: kube.Resource, seen: Seen) -> None:
    """Follow a resource of the namespace and note times."""
    path = f"{resource[0]}/namespaces/{NAMESPACE}/{resource[1]}?watch=true"
    tls: ssl.SSLContext = api._client.rest_client.ssl_context
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**21) as session:
        # The API server ends a watch whose reader falls behind; a new one begins with all that is there.
        while True:
            async with session.get(f"{api.configuration.host}/{path}", ssl=tls) as response:
                async for line in response.content:
                    note(resource, json.loads(line)["object"], seen)


def note(resource: kube.Resource, raw: dict[str, Any], seen: Seen) -> None:
    """Note what an object shows for the first time."""
    now = time.monotonic()
    labels, status = raw["metadata"].get("labels", {}), raw.get("status", {})
    if resource == kube.FINETUNEJOBS:
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


async def in_parallel(names: list[str], act: Any) -> None:
    """Call `act(name)` for all names, `WRITERS` at a time."""
    line = iter(names)

    async def worker() -> None:
        for name in line:
            await act(name)

    await asyncio.gather(*(worker() for _ in range(WRITERS)))


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


def pod_status(now: str) -> dict[str, Any]:
    """Return what a kubelet says of a pod that has succeeded."""
    ended = {"exitCode": 0, "reason": "Completed", "message": json.dumps(REPORT), "startedAt": now, "finishedAt": now}
    return {
        "phase": "Succeeded",
        "conditions": [{"type": "Ready", "status": "False", "reason": "PodCompleted", "lastTransitionTime": now}],
        "containerStatuses": [
            {
                "name": "trainer",
                "image": "x",
                "imageID": "x",
                "ready": False,
                "restartCount": 0,
                "state": {"terminated": ended},
            }
        ],
    }


def job_status(now: str) -> dict[str, Any]:
    """Return what the Job controller says of a Job that is complete."""
    kinds = ("SuccessCriteriaMet", "Complete")
    conditions = [
        {"type": kind, "status": "True", "reason": "CompletionsReached", "lastTransitionTime": now} for kind in kinds
    ]
    return {
        "active": 0,
        "ready": 0,
        "succeeded": 1,
        "terminating": 0,
        "completionTime": now,
        "conditions": conditions,
        "uncountedTerminatedPods": {},
    }


def signal_controller_manager(cluster: Cluster, number: signal.Signals) -> None:
    """Stop the controller manager, or let it go on."""
    for process in processes.running(cluster.kubeconfig.parent):
        if process.component == "kube-controller-manager":
            os.kill(process.pid, number)


async def measure(count: int, cluster: Cluster, folder: Path, *, with_pods: bool) -> dict[str, Any]:
    """Run one size on a fresh cluster; `with_pods`: pods are made while Jobs are, not afterwards."""
    configuration = client.Configuration()
    await config.load_kube_config(  # type: ignore[no-untyped-call]
        str(cluster.kubeconfig), client_configuration=configuration
    )
    async with Kube(configuration, WRITERS) as api:
        kubectl(cluster, "create", "namespace", NAMESPACE)
        operator = Operator(kubeconfig_of(cluster, folder), folder / "operator.log")
        await operator.start()
        seen = Seen()
        tasks = [asyncio.create_task(watch(api, r, seen)) for r in (kube.FINETUNEJOBS, kube.JOBS, kube.PODS)]
        memory = asyncio.create_task(operator.sample_memory())
        await asyncio.sleep(1)
        row: dict[str, Any] = {"finetunejobs": count, "pods_meanwhile": with_pods}
        row["rss_idle_mb"] = round(operator._usage.memory_info().rss / 1e6)

        single: list[float] = []
        for number in range(20):
            name = f"single-{number}"
            seen.created[name] = time.monotonic()
            await api.create(kube.FINETUNEJOBS, NAMESPACE, finetunejob(name))
            await until(lambda name=name: name in seen.job, 30, "single Job")
            single.append(seen.job[name] - seen.created[name])
        row["single_create_p95_seconds"] = round(percentile(single, 0.95), 3)
        await asyncio.sleep(3)

        names = [f"run-{number:05d}" for number in range(count)]
        before, cpu = await operator.settled_requests(), operator.cpu_seconds()

        async def create(name: str) -> None:
            seen.created[name] = time.monotonic()
            await api.create(kube.FINETUNEJOBS, NAMESPACE, finetunejob(name))

        if not with_pods:
            signal_controller_manager(cluster, signal.SIGSTOP)
        began = time.monotonic()
        await in_parallel(names, create)
        row["create_calls_per_second"] = round(count / (time.monotonic() - began), 1)
        await until(lambda: all(n in seen.job for n in names), 600, "Jobs")
        waits = [seen.job[name] - seen.created[name] for name in names]
        took = max(seen.job[name] for name in names) - min(seen.created[name] for name in names)
        row["jobs_per_second"] = round(count / took, 1)
        for share in (50, 95, 99):
            row[f"create_p{share}_seconds"] = round(percentile(waits, share / 100), 3)
        row["create_cpu_seconds"] = round(operator.cpu_seconds() - cpu, 1)

        signal_controller_manager(cluster, signal.SIGCONT)
        await until(lambda: all(n in seen.pods for n in names), 900, "pods")
        await asyncio.sleep(3)
        cpu = operator.cpu_seconds()

        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

        async def end_pod(name: str) -> None:
            await api.patch_status(kube.PODS, NAMESPACE, seen.pods[name], {"status": pod_status(now)})

        async def end_job(name: str) -> None:
            await api.patch_status(kube.JOBS, NAMESPACE, f"{name}-train-1", {"status": job_status(now)})

        signal_controller_manager(cluster, signal.SIGSTOP)
        await in_parallel(names, end_pod)
        await asyncio.sleep(3)
        operator.signal(signal.SIGSTOP)
        await in_parallel(names, end_job)
        await until(lambda: all(n in seen.job_complete for n in names), 900, "ends of Jobs")
        first = time.monotonic()
        operator.signal(signal.SIGCONT)
        await until(lambda: all(n in seen.terminal for n in names), 900, "ends")
        signal_controller_manager(cluster, signal.SIGCONT)
        last = max(seen.terminal[n] for n in names)
        lags = [seen.terminal[n] - first for n in names]
        row["completions_per_second"] = round(count / (last - first), 1)
        row["terminal_p95_seconds"] = round(percentile(lags, 0.95), 3)
        row["finish_cpu_seconds"] = round(operator.cpu_seconds() - cpu, 1)
        after = await operator.settled_requests()
        row["requests"] = {key: round((value - before.get(key, 0)) / count, 3) for key, value in after.items()}
        row["requests_per_job"] = round(sum(row["requests"].values()), 2)
        row["duplicate_jobs"] = await jobs_of(api) - count - len(single)
        row["peak_rss_mb"] = round(operator.peak_rss / 1e6)
        memory.cancel()
        await operator.stop()
        row |= await restart(operator, count)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await operator.stop()
    return row


async def jobs_of(api: Kube) -> int:
    """Count the Jobs of the namespace."""
    return sum([1 async for _ in api.list(kube.JOBS, NAMESPACE)])


async def restart(operator: Operator, count: int) -> dict[str, Any]:
    """Start the operator with everything in the cluster and wait until it has caught up."""
    began = time.monotonic()
    await operator.start()
    memory = asyncio.create_task(operator.sample_memory())
    while True:
        found = await operator.metrics()
        events = found.get('tunewright_watch_events_total{resource="finetunejobs"}', 0)
        if events >= count and found["tunewright_workqueue_depth"] == 0:
            break
        await asyncio.sleep(0.1)
    took = time.monotonic() - began
    await asyncio.sleep(2)
    memory.cancel()
    writes = sum(value for key, value in (await operator.requests()).items() if not key.startswith("get"))
    return {
        "restart_seconds": round(took, 1),
        "restart_writes": int(writes),
        "restart_peak_rss_mb": round(operator.peak_rss / 1e6),
    }


COLUMNS = (
    ("N", "finetunejobs"),
    ("and pods", "pods_meanwhile"),
    ("Jobs/s", "jobs_per_second"),
    ("p50 s", "create_p50_seconds"),
    ("p95 s", "create_p95_seconds"),
    ("p99 s", "create_p99_seconds"),
    ("1 CR p95", "single_create_p95_seconds"),
    ("ends/s", "completions_per_second"),
    ("end p95", "terminal_p95_seconds"),
    ("req/CR", "requests_per_job"),
    ("RSS MB", "peak_rss_mb"),
    ("restart s", "restart_seconds"),
    ("writes", "restart_writes"),
    ("twice", "duplicate_jobs"),
)


def print_table(rows: list[dict[str, Any]]) -> None:
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


def machine() -> dict[str, Any]:
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
