"""S3 as seen from the user's own machine: options first, then AWS_* variables, then the job's own settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tunewright_api.exit_codes import ExitCode
from tunewright_api.run_config import StorageSettings
from tunewright_cli.errors import MissingPackage, TrainerFailure

_CREDENTIALS_HINT = " (on this machine the credentials are those of the AWS_* variables)"
INSTALL = "pip install 'tunewright[cli,trainer]'"


def storage_settings(
    job: StorageSettings | None = None, *, endpoint: str | None, region: str | None
) -> StorageSettings:
    """Return how to reach S3 from here.

    Args:
        job: Settings of the FineTuneJob; an endpoint inside the cluster may not be reachable from here, so both
            option and environment win over it.
        endpoint: Value of --endpoint.
        region: Value of --region.
    """
    environment = os.environ
    job = job or StorageSettings()
    own = endpoint or environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    return StorageSettings(
        endpoint=own or job.endpoint,
        region=region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or job.region,
        # S3 services of one's own rarely have a host name per bucket.
        path_style=True if own else job.path_style,
    )


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn the trainer's errors into the command line's, with the same exit code.

    Raises:
        TrainerFailure: Storage, data or result are not as they should be.
        MissingPackage: A package of the trainer is not installed.
    """
    try:
        from tunewright_trainer.errors import TrainerError, fate_of
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}: {INSTALL}") from None
    try:
        yield
    except TrainerError as error:
        code = fate_of(error)[0]
        hint = _CREDENTIALS_HINT if code is ExitCode.ACCESS_DENIED else ""
        raise TrainerFailure(f"{error}{hint}", int(code)) from None
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}: {INSTALL}") from None
