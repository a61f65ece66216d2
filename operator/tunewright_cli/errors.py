"""Errors of the command line, each with a fixed exit code.

CliError                 1    anything below, printed as one line without a traceback
├── InvalidFile          20   a file cannot be read as YAML, or holds no valid FineTuneJob
├── InvalidArgument      20   an argument cannot work: the message says which one would
├── NotFound             1    the FineTuneJob, or a result of it, is not there
├── AccessDenied         21   the API server refused the credentials
├── Unavailable          23   the API server does not answer
├── MissingPackage       1    the command needs an extra that is not installed
└── TrainerFailure       *    the trainer's code said no (storage, data, manifest): its own exit code
"""

from __future__ import annotations

from tunewright_api.exit_codes import ExitCode


class CliError(Exception):
    """The command cannot do what was asked; the message says why and what to do."""

    exit_code: int = ExitCode.INTERNAL_ERROR


class InvalidFile(CliError):
    """A file cannot be read as YAML, or holds no valid FineTuneJob."""

    exit_code = ExitCode.INVALID_INPUT


class InvalidArgument(CliError):
    """An argument cannot work."""

    exit_code = ExitCode.INVALID_INPUT


class NotFound(CliError):
    """The FineTuneJob, or a result of it, is not there."""


class AccessDenied(CliError):
    """The API server refused the credentials."""

    exit_code = ExitCode.ACCESS_DENIED


class Unavailable(CliError):
    """The API server does not answer."""

    exit_code = ExitCode.UNAVAILABLE


class MissingPackage(CliError):
    """The command needs an extra that is not installed."""


class TrainerFailure(CliError):
    """The trainer's code said no: storage, data or manifest are not as they should be."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
