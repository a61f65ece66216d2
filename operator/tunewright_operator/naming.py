"""Names of child objects: deterministic, so that creating one twice is refused by the API server itself."""

from __future__ import annotations

from tunewright_operator.constants import STAGE_TRAIN


def job_name(finetunejob: str, attempt: int) -> str:
    """Return the name of an attempt's Job, such as `support-bot-train-2`.

    At most 45 + 7 + 3 characters: the pod's suffix of six fits the 63 of a host name.
    """
    return f"{finetunejob}-{STAGE_TRAIN}-{attempt}"
