"""`make demo`: from nothing to a tuned model, with every part real."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from tests.platform import MODELS, ROOT, Platform, bring_up

NAMESPACE = "demo"
NAME = "docstrings-lora"
CLI = str(Path(sys.executable).parent / "tunewright")
console = Console()
started = time.monotonic()


def say(text: str) -> None:
    """Print a step with the seconds since the start."""
    console.print(f"[dim]{time.monotonic() - started:5.0f} s[/dim]  {text}")


def main() -> int:
    """Run the demo; the cluster stays for a look around and is taken down by `make clean`."""
    platform = bring_up(say)
    platform.add_namespace(NAMESPACE)
    platform.kubectl("delete", "ftj", NAME, "-n", NAMESPACE, "--ignore-not-found")
    forget_results(platform)
    say("kubectl apply -f examples/sft-lora.yaml")
    platform.kubectl("apply", "-n", NAMESPACE, "-f", str(ROOT / "examples" / "sft-lora.yaml"))
    code = watch(platform)
    if code != 0:
        console.print(platform.kubectl("describe", "ftj", NAME, "-n", NAMESPACE))
        return code
    console.print(platform.kubectl("get", "ftj", NAME, "-n", NAMESPACE, "-o", "wide"))
    show_result(platform)
    say(f"done. The cluster is still there: KUBECONFIG={platform.cluster.kubeconfig}; `make clean` removes it")
    return 0


def forget_results(platform: Platform) -> None:
    """Remove the results of an earlier demo: a run that is published already would not be trained again."""
    client = platform.s3()
    for key in platform.keys(MODELS, f"{NAME}/"):
        client.delete_object(Bucket=MODELS, Key=key)


def watch(platform: Platform) -> int:
    """Show the run's progress until its end, with the command a user would use."""
    environment = {"KUBECONFIG": str(platform.cluster.kubeconfig), "PATH": "/usr/bin:/bin", "TERM": "xterm"}
    command = [CLI, "watch", NAME, "-n", NAMESPACE]
    return subprocess.run(command, env=environment, check=False).returncode


def show_result(platform: Platform) -> None:
    """Print the verified manifest, the losses, and one answer of the base and of the tuned model."""
    status = platform.get("ftj", NAME, NAMESPACE)["status"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter"
        say(f"tunewright get-adapter {status['output']['manifestUri']}")
        fetched = platform.run(CLI, "get-adapter", status["output"]["manifestUri"], str(target))
        console.print(fetched.stdout)
    console.print(manifest_table(platform, status))
    evaluation = status["evaluation"]
    console.print(f"evaluation loss: base {evaluation['base']:.3f} -> tuned {evaluation['tuned']:.3f}")
    sample = samples(platform, status)[0]
    console.print(f"\n[bold]{sample['prompt']}[/bold]")
    answers = Table.grid(expand=True, padding=(0, 1))
    answers.add_row(
        Panel(sample["base"], title="base model"), Panel(sample["tuned"], title="tuned model", border_style="green")
    )
    console.print(answers)


def manifest_table(platform: Platform, status: dict[str, Any]) -> Table:
    """Lay out the files of the manifest."""
    table = Table("file", "bytes", "sha256", title=status["output"]["manifestUri"])
    for file in read_json(platform, status["output"]["manifestUri"])["files"]:
        table.add_row(file["path"], f"{file['bytes']:,}", file["sha256"][:16])
    return table


def samples(platform: Platform, status: dict[str, Any]) -> list[dict[str, str]]:
    """Return the sample answers that the run recorded."""
    folder = status["output"]["uri"].rsplit("/", 1)[0]
    found: list[dict[str, str]] = read_json(platform, f"{folder}/samples.json")
    return found


def read_json(platform: Platform, uri: str) -> Any:
    """Return a JSON document from S3."""
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    return json.loads(platform.s3().get_object(Bucket=bucket, Key=key)["Body"].read())


if __name__ == "__main__":
    sys.exit(main())
