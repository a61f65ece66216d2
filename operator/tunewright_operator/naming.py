"""Names of child objects: deterministic, so that creating one twice is refused by the API server itself."""

from __future__ import annotations

from tunewright_operator.kinds import Kind


def job_name(kind: Kind, name: str, attempt: int) -> str:
    """Return the name of an attempt's Job, such as `support-bot-train-2` or `support-bot-merge-1`.

    At most 45 + 7 + 3 characters: the pod's suffix of six, or `-63` of the last of 64 nodes, fits the 63 of a host
    name.
    """
    return f"{name}-{kind.stage}-{attempt}"


def service_name(job: str) -> str:
    """Return the name of the Service by which the pods of a Job find each other, such as `ftj-support-bot-train-2`.

    A Service's name begins with a letter, which a FineTuneJob's need not.
    """
    return f"ftj-{job}"
