"""`tunewright watch`: follow a FineTuneJob or AdapterMerge until it ends.

Polling rather than a watch stream: one object, one cheap GET every two seconds, and nothing to repair after a broken
connection.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.live import Live

from tunewright_api.conditions import ConditionType, find_condition, is_true
from tunewright_api.exit_codes import ExitCode
from tunewright_api.v1alpha1.status import AdapterMergeStatus, FineTuneJobStatus, RunStatus
from tunewright_cli.cluster import Workloads, target_of
from tunewright_cli.errors import NotFound, Unavailable
from tunewright_cli.view import frame, result_lines, summary, verification_lines

PATIENCE_SECONDS = 300
"""How long an API server that had answered before may be away."""


def run(name: str, namespace: str | None, context: str | None, *, as_json: bool, interval_seconds: float) -> int:
    """Show every change and return 0 when the run is Complete, else a code other than 0; `name` as for `target_of`.

    Raises:
        NotFound: There is no such object, or it was deleted meanwhile.
        AccessDenied, InvalidArgument, Unavailable: The cluster cannot be read.
    """
    target, workloads = target_of(name), Workloads(namespace, context)
    looks = changes(lambda: workloads.get(target), interval_seconds, kind=target.of.status)
    name = target.name
    console = Console(highlight=False)
    if as_json:
        status = _follow(looks, lambda status: typer.echo(json.dumps(report(name, status))))
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            status = _follow(looks, lambda s: live.update(frame(_title(name, s), s.progress, notes(s))))
    else:
        status = _follow(looks, lambda status: typer.echo(line(name, status)))
    if not as_json:
        _print_end(status)
    return exit_code(status)


def changes(
    get: Callable[[], dict[str, Any]],
    interval_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    *,
    kind: type[RunStatus] = FineTuneJobStatus,
) -> Iterator[RunStatus]:
    """Yield the status now, then whenever it changed, until it is terminal.

    Raises:
        NotFound: The object does not exist, or no more.
        Unavailable: No answer at first, or none for `PATIENCE_SECONDS`.
    """
    last: RunStatus | None = None
    answered = clock()
    while True:
        try:
            document = get()
            answered = clock()
        except NotFound as error:
            raise error if last is None else NotFound(f"{error}: it was deleted") from None
        except Unavailable:
            if last is None or clock() - answered > PATIENCE_SECONDS:
                raise
            sleep(interval_seconds)
            continue
        status = kind.model_validate(document.get("status") or {})
        if status != last:
            yield status
            last = status
        if is_terminal(status):
            return
        sleep(interval_seconds)


def is_terminal(status: RunStatus) -> bool:
    """Tell whether the run is Complete or Failed."""
    return any(is_true(status.conditions, kind) for kind in (ConditionType.COMPLETE, ConditionType.FAILED))


def exit_code(status: RunStatus) -> int:
    """Return 0 for a Complete run; for a Failed one the trainer's exit code, or 1 where there is none."""
    if is_true(status.conditions, ConditionType.COMPLETE):
        return ExitCode.SUCCESS
    return (status.failure.exit_code if status.failure else None) or ExitCode.INTERNAL_ERROR


def notes(status: RunStatus) -> list[str]:
    """Return what keeps the run from going on, in the operator's words."""
    found = []
    accepted = find_condition(status.conditions, ConditionType.ACCEPTED)
    if accepted is not None and accepted.status == "False":
        found.append(f"{accepted.reason}: {accepted.message}")
    if is_true(status.conditions, ConditionType.SUSPENDED):
        found.append("suspended: set spec.suspend to false to go on")
    pods = find_condition(status.conditions, ConditionType.PODS_READY)
    if pods is not None and pods.status == "False" and pods.message and not is_terminal(status):
        found.append(f"{pods.reason}: {pods.message}")
    return found


def line(name: str, status: RunStatus) -> str:
    """Return the status as one line."""
    parts = [_title(name, status)]
    if status.progress is not None:
        parts.append(summary(status.progress))
    return "  ".join([*parts, *notes(status)])


def report(name: str, status: RunStatus) -> dict[str, Any]:
    """Return the status as `--output json` prints it."""
    document = status.document()
    conditions = {c.type: {"status": c.status, "reason": c.reason, "message": c.message} for c in status.conditions}
    kept = ("phase", "attempt", "progress", "output", "evaluation", "verification", "failure")
    return {
        "name": name,
        **{key: document[key] for key in kept if key in document},
        "conditions": conditions,
    }


def _title(name: str, status: RunStatus) -> str:
    attempt = f", attempt {status.attempt}" if status.attempt > 1 else ""
    return f"{name}: {status.phase or 'Pending'}{attempt}"


def _follow(looks: Iterator[RunStatus], show: Callable[[RunStatus], None]) -> RunStatus:
    status = RunStatus()
    for status in looks:
        show(status)
    return status


def _print_end(status: RunStatus) -> None:
    if status.failure is not None:
        typer.echo(f"failed           {status.failure.reason}: {status.failure.message}")
    complete = find_condition(status.conditions, ConditionType.COMPLETE)
    if complete is not None and complete.status == "True":
        typer.echo(f"complete         {complete.reason}")
    evaluation = status.evaluation if isinstance(status, FineTuneJobStatus) else None
    verification = status.verification if isinstance(status, AdapterMergeStatus) else None
    for text in (*result_lines(status.output, evaluation), *verification_lines(verification)):
        typer.echo(text)
