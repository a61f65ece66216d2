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
NAME, MERGE = "docstrings-lora", "docstrings-merged"
EXAMPLES = ("sft-lora", "merge-gguf")
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
    platform.kubectl("delete", "ftj,am", "--all", "-n", NAMESPACE)
    forget_results(platform)
    files = [f"examples/{name}.yaml" for name in EXAMPLES]
    say(f"kubectl apply {' '.join(f'-f {file}' for file in files)}")
    platform.kubectl("apply", "-n", NAMESPACE, *(part for file in files for part in ("-f", str(ROOT / file))))
    for name in (f"ftj/{NAME}", f"am/{MERGE}"):
        code = watch(platform, name)
        if code != 0:
            console.print(platform.kubectl("describe", name, "-n", NAMESPACE))
            return code
    console.print(platform.kubectl("get", "ftj,am", "-n", NAMESPACE, "-o", "wide"))
    show_result(platform)
    say(f"done. The cluster is still there: KUBECONFIG={platform.cluster.kubeconfig}; `make clean` removes it")
    return 0


def forget_results(platform: Platform) -> None:
    """Remove the results of an earlier demo: a run that is published already would not be trained again."""
    client = platform.s3()
    for name in (NAME, MERGE):
        for key in platform.keys(MODELS, f"{name}/"):
            client.delete_object(Bucket=MODELS, Key=key)


def watch(platform: Platform, name: str) -> int:
    """Show an object's progress until its end, with the command a user would use."""
    environment = {"KUBECONFIG": str(platform.cluster.kubeconfig), "PATH": "/usr/bin:/bin", "TERM": "xterm"}
    command = [CLI, "watch", name, "-n", NAMESPACE]
    return subprocess.run(command, env=environment, check=False).returncode


def show_result(platform: Platform) -> None:
    """Print the manifests, the losses, what was proved, and an answer of base, adapter and merged model."""
    status = platform.get("ftj", NAME, NAMESPACE)["status"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter"
        say(f"tunewright get-adapter {status['output']['manifestUri']}")
        fetched = platform.run(CLI, "get-adapter", status["output"]["manifestUri"], str(target))
        console.print(fetched.stdout)
    console.print(manifest_table(platform, status))
    evaluation = status["evaluation"]
    console.print(f"evaluation loss: base {evaluation['base']:.3f} -> tuned {evaluation['tuned']:.3f}")
    merged = platform.get("am", MERGE, NAMESPACE)["status"]
    console.print(manifest_table(platform, merged))
    proof = merged["verification"]
    console.print(
        f"merged: {proof['changedTensors']} tensors changed, {proof['copiedTensors']} are the base's; logits are "
        f"{proof['maxDivergence']:.3g} from base with adapter (allowed {proof['allowedDivergence']:.3g})"
    )
    sample = samples(platform, status)[0]
    say(f"tunewright chat {merged['output']['uri']}")
    console.print(f"\n[bold]{sample['prompt']}[/bold]")
    answers = Table.grid(expand=True, padding=(0, 1))
    answers.add_row(
        Panel(sample["base"], title="base model"),
        Panel(sample["tuned"], title="base with adapter", border_style="green"),
        Panel(answer(platform, merged["output"]["uri"], sample["prompt"]), title="merged model", border_style="green"),
    )
    console.print(answers)


def answer(platform: Platform, uri: str, prompt: str) -> str:
    """Return a model's answer, got with the command a user would use."""
    return platform.run(CLI, "chat", uri, "--prompt", prompt, "--max-tokens", "64").stdout.strip()


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
