"""Plays the worker for tests of the supervisor: keeps to the protocol, trains nothing, starts in milliseconds.

FAKE_WORKER names what it does, FAKE_ADAPTER a folder with the adapter that it is to have trained. Written on the
standard library alone, so that it also shows what the protocol asks of a worker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORK = Path(sys.argv[sys.argv.index("--work") + 1])
BEHAVIOUR = os.environ.get("FAKE_WORKER", "succeed")


def say(**event: Any) -> None:
    """Append one event."""
    with (WORK / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def wait_for_task() -> dict[str, Any]:
    """Return the task once it is there."""
    while not (WORK / "task.json").exists():
        time.sleep(0.02)
    task: dict[str, Any] = json.loads((WORK / "task.json").read_text())
    return task


def steps(count: int) -> None:
    """Report `count` steps of ten."""
    say(event="stage", stage="Loading")
    say(event="plan", totalSteps=10, dtype="float32", trainableParameters=8, totalParameters=100, trainRows=3)
    say(event="evaluation", step=0, loss=2.5)
    for step in range(1, count + 1):
        numbers = {"loss": 2.0 - step / 10, "learningRate": 0.1, "tokensPerSecond": 99.5}
        further = {"metrics": {"reward": step / 10}, "details": {"reward_min": 0.0}}
        say(event="step", step=step, epoch=step / 10, **numbers, **further)


def stop_early(output: Path) -> None:
    """End after four of ten steps, with the weights of the second one."""
    steps(4)
    say(event="evaluation", step=2, loss=1.25)
    say(event="evaluation", step=4, loss=1.5)
    say(event="earlyStop", step=4, message="stopped early at step 4 of 10")
    say(event="best", step=2, loss=1.25)
    save(output, 4)


def succeed(output: Path) -> None:
    """Train to the end."""
    steps(10)
    say(event="evaluation", step=10, loss=1.25)
    save(output, 10)


def save(output: Path, count: int) -> None:
    """Write an adapter, some files that must not be published, and the result."""
    (output / "adapter").mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (output / "adapter/adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (output / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    if "FAKE_ADAPTER" in os.environ:
        shutil.copytree(os.environ["FAKE_ADAPTER"], output / "adapter", dirs_exist_ok=True)
    (output / "adapter/README.md").write_text("an empty form")
    (output / "adapter/training_args.bin").write_bytes(b"a pickle")
    (output / "adapter/optimizer.pt").write_bytes(b"a pickle")
    (output / "adapter/link.json").symlink_to("/etc/hostname")
    say(
        event="result",
        kind="Adapter",
        root="adapter",
        steps=count,
        trainLoss=1.5,
        reloadMaxDifference=0.0,
        trainSeconds=1.0,
        peakMemoryBytes=1000,
        versions={"torch": "0"},
    )


def main() -> int:
    """Do what FAKE_WORKER says."""
    (WORK / "pid").write_text(str(os.getpid()))
    print("importing the stack", flush=True)
    print(
        "leaking",
        os.environ.get("LEAK", "nothing"),
        sorted(n for n in os.environ if n.startswith(("AWS_", "HF_"))),
        flush=True,
    )
    if BEHAVIOUR == "broken import":
        print("ModuleNotFoundError: No module named 'torch'", flush=True)
        return 1
    if BEHAVIOUR == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if BEHAVIOUR == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (WORK / "child").write_text(str(child.pid))
    task = wait_for_task()
    match BEHAVIOUR:
        case "succeed":
            succeed(Path(task["outputPath"]))
        case "early stop":
            stop_early(Path(task["outputPath"]))
        case "child" | "deaf" | "stall":
            steps(3)
            time.sleep(600)
        case "killed":
            steps(3)
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            print("Fatal Python error: Segmentation fault", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "give up":
            steps(3)
            say(event="error", exitCode=22, reason="GpuOutOfMemory", message="the GPU is full: lower batchSize")
            return 22
        case "diverge":
            steps(3)
            say(event="step", step=4, loss=float("nan"))
            say(event="error", exitCode=24, reason="Diverged", message="the loss became NaN at step 4")
            return 24
        case "nothing":
            return 0
        case "nonsense":
            (WORK / "events.jsonl").write_text("nonsense\n")
            time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
