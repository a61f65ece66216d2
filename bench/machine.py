"""What a recorded number depends on: the machine, what else runs on it, and the versions."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = (
    "tunewright", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers",
)  # fmt: skip


def conditions() -> dict[str, Any]:
    """Return machine, load and versions as they are now: to be called before the measurement."""
    return {
        "recorded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def cpu_name() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_bytes(process: int | str = "self") -> int:
    """Return the peak of a process's resident memory; getrusage would count the parent's at the fork as well."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
