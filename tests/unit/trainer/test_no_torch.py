"""The supervisor is light: no training stack, and no slow import before the worker was started."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")
LATER = ("boto3", "botocore", "huggingface_hub", "pyarrow", "prometheus_client")

CODE = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import {modules}
"""


def imports(blocked: tuple[str, ...], modules: str) -> None:
    """Import modules in a fresh interpreter in which others cannot be imported."""
    code = CODE.format(blocked=blocked, modules=modules)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_everything_of_the_supervisor_imports_without_torch() -> None:
    """Access and input errors come out in seconds because the training stack is never loaded."""
    names = [
        *("__main__", "artifact", "supervisor", "s3", "hub", "http_server", "publish"),
        *("merge.attempt", "merge.after_training", "merge.audit", "merge.gguf", "merge.verification"),
    ]
    imports(HEAVY, ", ".join(f"tunewright_trainer.{name}" for name in names))


def test_nothing_slow_comes_before_the_worker() -> None:
    """What is imported before the worker starts leaves S3, hub, parquet and HTTP for later."""
    imports(HEAVY + LATER, "tunewright_trainer.__main__")


def test_adapters_are_judged_without_torch() -> None:
    """What cannot be combined or served is told before any process is started for it."""
    names = ("child", "combination", "vllm")
    imports(HEAVY + LATER, ", ".join(f"tunewright_trainer.merge.{name}" for name in names))
