"""Errors of the operator; each class has a fixed fate.

OperatorError
+-- ApiError                  the API server refused: retried with backoff
|   +-- NotFound              the object is gone: another look
|   +-- Conflict              exists already, or changed meanwhile: another look at once
|   +-- Forbidden             quota, admission or RBAC: shown in a condition, retried with backoff
|   +-- Invalid               the server will never take it: the FineTuneJob fails with InvalidSpec
+-- ApiUnreachable            no answer: retried with backoff
+-- RunTooLarge               the run document exceeds its limit: the FineTuneJob fails with InvalidSpec
+-- NoCluster                 no credentials at start: the process ends
"""

from __future__ import annotations


class OperatorError(Exception):
    """Root of the tree."""


class ApiError(OperatorError):
    """The API server answered with an error.

    Attributes:
        status: HTTP status.
        reason: The server's machine-readable reason, such as `AlreadyExists`.
        message: The server's message.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        self.status = status
        self.reason = reason
        self.message = message
        super().__init__(f"{status} {reason}: {message}")


class NotFound(ApiError):
    """404: the object is not there."""


class Conflict(ApiError):
    """409: the object exists already or has changed since it was read."""


class Forbidden(ApiError):
    """403: a quota, an admission plugin or missing permission."""


class Invalid(ApiError):
    """400, 413 or 422: the request can never succeed as it stands."""


class ApiUnreachable(OperatorError):
    """The API server gave no answer in time."""


class RunTooLarge(OperatorError):
    """The run document does not fit the environment variable that carries it."""


class NoCluster(OperatorError):
    """Neither a kubeconfig nor a service account was found."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: Invalid,
    422: Invalid,
}


def api_error(status: int, reason: str, message: str) -> ApiError:
    """Return the error that an HTTP status stands for."""
    return _BY_STATUS.get(status, ApiError)(status, reason, message)
