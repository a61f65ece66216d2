"""Errors of the command line, each with a fixed exit code.

CliError                 1    anything below, printed as one line without a traceback
├── InvalidFile          20   a file cannot be read as YAML, or holds no FineTuneJob
├── InvalidArgument      20   an argument cannot work: the message says which one would
├── AccessDenied         21   storage or the API server refused the credentials
├── NotFound             1    the FineTuneJob, manifest or file named is not there
├── Unavailable          23   storage or the API server does not answer
├── CorruptArtifact      1    a downloaded file differs from its manifest
├── MissingPackage       1    the command needs an extra that is not installed
└── RunFailed            *    the watched FineTuneJob or the local run failed; carries the run's own code
"""

from __future__ import annotations

from tunewright_api.exit_codes import ExitCode


class CliError(Exception):
    """The command cannot do what was asked; the message says why and what to do."""

    exit_code: int = ExitCode.INTERNAL_ERROR


class InvalidFile(CliError):
    """A file cannot be read as YAML, or holds no FineTuneJob."""

    exit_code = ExitCode.INVALID_INPUT


class InvalidArgument(CliError):
    """An argument cannot work."""

    exit_code = ExitCode.INVALID_INPUT


class AccessDenied(CliError):
    """Storage or the API server refused the credentials."""

    exit_code = ExitCode.ACCESS_DENIED


class NotFound(CliError):
    """The FineTuneJob, manifest or file named is not there."""


class Unavailable(CliError):
    """Storage or the API server does not answer."""

    exit_code = ExitCode.UNAVAILABLE


class CorruptArtifact(CliError):
    """A downloaded file differs from its manifest."""


class MissingPackage(CliError):
    """The command needs an extra that is not installed."""


class RunFailed(CliError):
    """The watched FineTuneJob or the local run failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
