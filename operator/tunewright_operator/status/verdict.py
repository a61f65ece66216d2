"""Why an attempt ended, and what follows from it. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunewright_api.conditions import Reason
from tunewright_api.exit_codes import ExitCode, Fate, outcome_of
from tunewright_api.run_report import RunReport
from tunewright_operator.observed import ObservedJob, ObservedPod, parse_report, parse_time

PEER_LOST = "PeerLost"
"""A pod lost the connection to another one: what happened to that one says more."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Cause of an attempt's end."""

    cause: str
    fate: Fate
    message: str
    exit_code: int | None = None
    report: RunReport | None = None
    pod: ObservedPod | None = None
    """The pod that it is about, where there are several."""


_DISRUPTION_TEXT = {
    Reason.PREEMPTED: "the pod was preempted by one of higher priority",
    Reason.EVICTED: "the pod was evicted",
    Reason.NODE_LOST: "the node of the pod is gone or does not answer",
}


def judge_success(pod: ObservedPod | None) -> Verdict:
    """Judge an attempt whose Job is complete: without a report of a published result it has failed after all."""
    report = parse_report(pod.report) if pod else None
    if report is None or report.exit_code != 0 or report.output is None or report.run_key is None:
        message = (
            "the pod ended with code 0 but left no valid report of a published result in its termination message; "
            "does pod.image contain the trainer of this version?"
        )
        return Verdict(Reason.OUTPUT_MISSING, Fate.COUNTED_RETRY, message, 0)
    return Verdict(_success_reason(report), Fate.SUCCEEDED, report.message, 0, report)


def _success_reason(report: RunReport) -> Reason:
    if report.cached:
        return Reason.CACHED
    return Reason.EARLY_STOPPED if report.reason == Reason.EARLY_STOPPED else Reason.SUCCEEDED


def judge_failure(
    job: ObservedJob, pods: Sequence[ObservedPod], over_memory: str, lost: ObservedPod | None = None
) -> Verdict:
    """Judge an attempt whose Job has failed: of several pods, by the one that failed first for a reason of its own.

    Args:
        job: The Job.
        pods: Its pods.
        over_memory: What to say of a pod that went over its memory limit.
        lost: One of the pods that should be gone but is not: nobody carries the deletion out.
    """
    if job.completions == 1:
        pod = pods[0] if pods else None
        return judge_lost_node(lost) if lost is not None else _judge_pod(job, pod, over_memory)
    rulings = []
    for pod in _to_blame(job, pods, lost):
        ruling = judge_lost_node(pod) if pod == lost else _judge_pod(job, pod, over_memory)
        message = f"node {pod.index}: {ruling.message}"
        rulings.append(replace(ruling, message=message, pod=pod))
    return min(rulings, key=lambda ruling: _precedence(job, ruling), default=_judge_pod(job, None, over_memory))


def _to_blame(job: ObservedJob, pods: Sequence[ObservedPod], lost: ObservedPod | None) -> list[ObservedPod]:
    """Return the pods that did not end well, without those that were only removed because another one had failed.

    A pod that was asked to go then, but says why it failed itself or had ended before, is judged by that. Where all the
    others only lost a connection, the removal is why: a pod whose peers failed first would have lost it as well.
    """
    failed = [pod for pod in pods if pod.exit_code != 0 and (pod.ended or pod == lost)]
    first_end = min((parse_time(pod.ended_at) for pod in failed if pod.ended_at is not None), default=None)
    found, removed = [], []
    for pod in failed:
        asked = _asked_to_go(pod)
        # Times are whole seconds: what happened in the same one may be the cause, and ends of causes come first anyway.
        if pod == lost or asked is None or first_end is None or asked <= first_end or _named(job, pod):
            found.append(pod)
        elif _says_why(pod) or (pod.exit_code != ExitCode.PREEMPTED and _ended_before(pod, asked)):
            found.append(replace(pod, deletion_time=None))
        else:
            removed.append(pod)
    return found if any(not _lost_peer(pod) for pod in found) else found + removed


def _named(job: ObservedJob, pod: ObservedPod) -> bool:
    """Whether the Job says that it failed by the end of this pod: "for pod NAMESPACE/NAME failed with ..."."""
    return f"/{pod.name} " in job.message


def _lost_peer(pod: ObservedPod) -> bool:
    report = parse_report(pod.report)
    return report is not None and report.reason == PEER_LOST


def _ended_before(pod: ObservedPod, moment: datetime.datetime) -> bool:
    return pod.ended_at is not None and parse_time(pod.ended_at) < moment


def _asked_to_go(pod: ObservedPod) -> datetime.datetime | None:
    """Return when a pod's deletion was asked for by nobody that it names."""
    if pod.deletion_time is None or pod.disruption is not None:
        return None
    return parse_time(pod.deletion_time) - datetime.timedelta(seconds=pod.deletion_grace)


def _says_why(pod: ObservedPod) -> bool:
    if pod.termination_reason == "OOMKilled":
        return True
    report = parse_report(pod.report)
    return report is not None and report.exit_code == pod.exit_code and pod.exit_code != ExitCode.PREEMPTED


def _precedence(job: ObservedJob, ruling: Verdict) -> tuple[bool, str, bool]:
    """Order verdicts: causes before consequences, then by time, and of one second the one that the Job names."""
    assert ruling.pod is not None
    # A pod without an end comes after all that have one: RFC 3339 times begin with a digit.
    return ruling.cause == PEER_LOST, ruling.pod.ended_at or "~", not _named(job, ruling.pod)


def _judge_pod(job: ObservedJob, pod: ObservedPod | None, over_memory: str) -> Verdict:
    """Judge the end of one pod.

    What the trainer itself called final stays final, whatever happened to the pod. Then comes what the platform did
    to the pod, and only then the exit code, because a pod that is being taken away may end with any.
    """
    if pod is None:
        return Verdict(Reason.POD_DELETED, Fate.FREE_RETRY, job.message or "the pod was deleted")
    report = parse_report(pod.report)
    if pod.exit_code is not None and outcome_of(pod.exit_code).fate is Fate.FATAL:
        return _by_exit_code(pod, pod.exit_code, report)
    if pod.disruption is not None:
        text = _DISRUPTION_TEXT[Reason(pod.disruption)]
        return Verdict(pod.disruption, Fate.FREE_RETRY, _joined(text, pod.disruption_message), pod.exit_code, report)
    if pod.status_reason == "Evicted":
        # Evicted without being a disruption's target: it went over a limit of its own and would do so again.
        text = "the pod was evicted for using more than its limits; raise resources.ephemeralStorage or .memory"
        return Verdict(Reason.EVICTED, Fate.COUNTED_RETRY, _joined(text, pod.status_message), pod.exit_code, report)
    if pod.termination_reason == "OOMKilled":
        return Verdict(Reason.OUT_OF_MEMORY, Fate.COUNTED_RETRY, over_memory, pod.exit_code, report)
    if pod.deletion_time is not None or pod.exit_code is None:
        message = f"pod {pod.name} was deleted" if pod.deletion_time else job.message or "the pod never ran"
        return Verdict(Reason.POD_DELETED, Fate.FREE_RETRY, message, pod.exit_code, report)
    return _by_exit_code(pod, pod.exit_code, report)


def judge_lost_node(pod: ObservedPod) -> Verdict:
    """Judge an attempt whose pod should be gone but is not: nobody carries the deletion out."""
    if pod.node is None:
        return Verdict(Reason.POD_DELETED, Fate.FREE_RETRY, f"pod {pod.name} was deleted before it had a node")
    message = f"pod {pod.name} was deleted, but node {pod.node} does not answer"
    return Verdict(Reason.NODE_LOST, Fate.FREE_RETRY, message)


def judge_missing_job(name: str) -> Verdict:
    """Judge an attempt whose Job somebody deleted."""
    return Verdict(Reason.JOB_DELETED, Fate.FREE_RETRY, f"Job {name} was deleted")


def _by_exit_code(pod: ObservedPod, exit_code: int, report: RunReport | None) -> Verdict:
    outcome = outcome_of(exit_code)
    reason = outcome.reason
    message = f"pod {pod.name} ended with exit code {exit_code} and no report; see its log"
    if report is not None and report.exit_code == exit_code and report.message:
        reason, message = report.reason, report.message
    # 0 under a failed Job: the trainer did not fail, so it cannot have succeeded either.
    fate = Fate.COUNTED_RETRY if outcome.fate is Fate.SUCCEEDED else outcome.fate
    return Verdict(reason, fate, message, exit_code, report)


def _joined(text: str, detail: str) -> str:
    return f"{text}: {detail}" if detail else text
