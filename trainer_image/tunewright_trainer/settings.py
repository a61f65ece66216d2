"""How the supervisor works on this machine; what it trains is in the TrainRun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tunewright_api.run_config import PVC_MOUNT_ROOT
from tunewright_api.run_report import Progress
from tunewright_trainer.transfer import Stop


@dataclass(frozen=True)
class SupervisorSettings:
    """Places and hooks of one supervisor."""

    work: Path
    """Folder for model, data and result; needs room for all three."""
    writer: str
    """8 hex digits that no other attempt has: the result's folder is named after them."""
    port: int | None = None
    """Port of /progress, /metrics and /healthz; 0 takes a free one, None serves nothing."""
    termination_log: Path | None = None
    """Where the report goes at the end; Kubernetes shows it as the termination message."""
    on_progress: Callable[[Progress], None] | None = None
    """Called with every change of the progress, from any thread."""
    local: bool = False
    """A local run: model, data and output may be plain paths."""
    echo: bool = True
    """Print the log's lines to stdout as well."""
    worker_command: tuple[str, ...] = (sys.executable, "-m", "tunewright_trainer.worker")
    """`--work DIR` is added."""
    pvc_root: Path = Path(PVC_MOUNT_ROOT)
    """pvc://claim/path is pvc_root/claim/path."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """Environment of the worker, less credentials; secrets in it are blotted out of every line and message."""
    stop: Stop = field(default_factory=Stop)
    """Ends the run when it is requested."""
