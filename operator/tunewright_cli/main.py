"""The command line: `tunewright`, also installed as `kubectl-tunewright` (`kubectl tunewright ...`).

Every command lives in a module of its own that is imported when it runs, so that help and completion stay fast.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tunewright_cli.errors import CliError


class Output(enum.StrEnum):
    """For people or for scripts."""

    TEXT = "text"
    JSON = "json"


class PlanOutput(enum.StrEnum):
    """For people or for scripts."""

    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


class Device(enum.StrEnum):
    """Where a model answers."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class _Commands(TyperGroup):
    """Ends a failed command with one line on stderr and the exit code of its error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CliError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing frames costs half a second of imports
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLM fine-tuning on Kubernetes: check, plan, run, watch and fetch FineTuneJobs and AdapterMerges, talk to "
    "results.",
)

Files = Annotated[
    list[str],
    typer.Option("--filename", "-f", metavar="FILE", help="YAML or JSON file, folder of such files, or - for stdin."),
]
OneFile = Annotated[
    str,
    typer.Option(
        "--filename", "-f", metavar="FILE", help="YAML or JSON file with a FineTuneJob or AdapterMerge, or - for stdin."
    ),
]
OneName = Annotated[
    str | None, typer.Option("--name", help="Which one of the file, where it holds several: NAME or KIND/NAME.")
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", help="Namespace. Default: that of the kubeconfig's context.")
]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig. Default: the current one.")]
Endpoint = Annotated[
    str | None, typer.Option(help="URL of the S3 service. Default: AWS_ENDPOINT_URL, else the job's own, else AWS.")
]
Region = Annotated[str | None, typer.Option(help="S3 region. Default: AWS_REGION, else the job's own, else us-east-1.")]


@app.command(short_help="Check FineTuneJobs and AdapterMerges without a cluster.")
def validate(filename: Files, output: Output = Output.TEXT) -> None:
    """Check FineTuneJobs and AdapterMerges without a cluster: every problem at once, with its place.

    Exit code 0 when all are valid, 20 when not.
    """
    from tunewright_cli import validate as command

    raise typer.Exit(command.run(filename, as_json=output is Output.JSON))


@app.command(short_help="Show defaults, steps and the rendered Job.")
def plan(
    filename: OneFile,
    name: OneName = None,
    output: PlanOutput = PlanOutput.TEXT,
    endpoint: Endpoint = None,
    region: Region = None,
) -> None:
    """Show what a FineTuneJob or AdapterMerge comes to: every default filled in, the steps, the Job in the cluster.

    Rows are counted where the data can be read from here: local files, or S3 with your own AWS_* credentials.
    Platform defaults are read from TUNEWRIGHT_* variables, as the operator reads them.
    """
    from tunewright_cli import plan as command

    command.run(filename, name, output.value, endpoint=endpoint, region=region)


@app.command(short_help="Turn an Axolotl configuration into a FineTuneJob.")
def convert(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="Axolotl's YAML file, or - for stdin.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the FineTuneJob. Default: made of the file's name.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write to. Default: stdout.")
    ] = None,
) -> None:
    """Turn an Axolotl configuration into a FineTuneJob.

    What is left to do, what differs, and every key that is not converted or not needed stands on stderr with its
    place. A key without which the result would be another one is an error: exit code 20, and nothing is written.
    """
    from tunewright_cli import convert as command

    command.run(config, name, output)


@app.command(short_help="Train or merge on this machine, without Kubernetes.")
def run(
    filename: OneFile,
    name: OneName = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for model, data and results while running. Default: a temporary one.")
    ] = None,
    endpoint: Endpoint = None,
    region: Region = None,
    output: Output = Output.TEXT,
) -> None:
    """Train or merge on this machine, without Kubernetes; models, adapters, data and output may be local paths.

    S3 credentials come from the AWS_* variables. The exit code is the run's own.
    """
    from tunewright_cli import run as command

    raise typer.Exit(command.run(filename, name, work, endpoint=endpoint, region=region, as_json=output is Output.JSON))


@app.command(short_help="Follow a FineTuneJob or AdapterMerge to its end.")
def watch(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Name of a FineTuneJob, or KIND/NAME such as adaptermerge/bot or am/bot."),
    ],
    namespace: Namespace = None,
    context: Context = None,
    output: Output = Output.TEXT,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Follow a FineTuneJob or AdapterMerge in the cluster until it ends.

    Exit code 0 when it is Complete; when it Failed, the trainer's exit code, or 1 where there is none.
    """
    from tunewright_cli import watch as command

    raise typer.Exit(command.run(name, namespace, context, as_json=output is Output.JSON, interval_seconds=interval))


@app.command("get-adapter", short_help="Download a result and verify every file.")
def get_adapter(
    source: Annotated[
        str,
        typer.Argument(
            metavar="URI|NAME",
            help="s3:// URI of a manifest, of a run's folder or of an output folder, or the name of a FineTuneJob, or "
            "KIND/NAME such as adaptermerge/bot or am/bot.",
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Folder to put the files into; must be empty or not exist.")
    ],
    namespace: Namespace = None,
    context: Context = None,
    endpoint: Endpoint = None,
    region: Region = None,
    output: Output = Output.TEXT,
) -> None:
    """Download a published adapter or model and verify every file against its manifest.

    S3 credentials come from the AWS_* variables.
    """
    from tunewright_cli import get_adapter as command

    command.run(
        source,
        target,
        namespace=namespace,
        context=context,
        endpoint=endpoint,
        region=region,
        as_json=output is Output.JSON,
    )


@app.command(short_help="Talk to a model, an adapter or a merged model.")
def chat(
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="hf://ORGANISATION/NAME, an s3:// URI or a path: a model, an adapter, or whatever get-adapter takes.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Answer this and end; several are answered one by one. Default: the lines of stdin."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, for models with a chat template.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="URI", help="Base model of an adapter. Default: the one it was trained on.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of hf:// models.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token every time; above, tokens are drawn.")
    ] = 0.0,
    device: Annotated[Device, typer.Option(help="auto is the GPU where there is one.")] = Device.AUTO,
    endpoint: Endpoint = None,
    region: Region = None,
) -> None:
    """Talk to a model, an adapter on its base, or a merged model, on this machine.

    The chat template is applied where there is one, else the text is continued. Answers go to stdout, all else to
    stderr. S3 credentials come from the AWS_* variables, the Hub's token from HF_TOKEN.
    """
    from tunewright_cli import chat as command

    command.run(
        uri,
        prompt or [],
        command.Settings(system=system, max_tokens=max_tokens, temperature=temperature, device=device.value),
        base=base,
        revision=revision,
        endpoint=endpoint,
        region=region,
    )


@app.command(short_help="Check a published result, and a merged model against its parts.")
def verify(
    uri: Annotated[
        str,
        typer.Argument(metavar="URI", help="URI or path of a manifest, of a run's folder or of an output folder."),
    ],
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Compare sizes and hashes with the manifest, and nothing else.")
    ] = False,
    logits: Annotated[
        bool, typer.Option("--logits", help="Also compare logits of a merged model with those of base and adapter.")
    ] = False,
    endpoint: Endpoint = None,
    region: Region = None,
    output: Output = Output.TEXT,
) -> None:
    """Check a published result: every file against its manifest, and a merged model against what it was made of.

    Base and adapters are looked up in the versions that were merged, and merged again into nothing but hashes: every
    file must come out the same, bit by bit. Nothing large is stored on this machine but bases of the Hub. Exit code 0
    when all is as it should be, 1 when something differs.
    """
    from tunewright_cli import verify as command

    raise typer.Exit(
        command.run(
            uri,
            files_only=files_only,
            logits=logits,
            endpoint=endpoint,
            region=region,
            as_json=output is Output.JSON,
        )
    )


def main() -> None:
    """Run the command line."""
    app()
