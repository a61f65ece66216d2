"""What an S3 error means for the run: a pure translation, so that every message can be tested without a service."""

from __future__ import annotations

from dataclasses import dataclass

from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)

from tunewright_api.run_config import StorageSettings
from tunewright_trainer.errors import (
    AccessDenied,
    EndpointUnreachable,
    InvalidConfiguration,
    MissingBucket,
    MissingFile,
    StorageUnavailable,
    TrainerError,
)

_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "RequestLimitExceeded", "Throttling", "TooManyRequests"}
_CREDENTIAL_CODES = {
    "InvalidAccessKeyId": "the service does not know the access key in AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "AWS_SESSION_TOKEN has expired",
    "InvalidToken": "AWS_SESSION_TOKEN is not valid",
    "RequestTimeTooSkewed": "the node's clock is wrong, so the service refuses the signature",
}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError, TokenRetrievalError)


class Outage(Exception):
    """A transfer ended early; asking again may help."""


@dataclass
class Contact:
    """What is known of the service behind `settings.endpoint`."""

    settings: StorageSettings
    answered: bool
    """It has answered as an S3 service does."""

    @property
    def address(self) -> str:
        """The endpoint, for messages."""
        return self.settings.endpoint or f"https://s3.{self.settings.region}.amazonaws.com"

    @property
    def credentials(self) -> str:
        """Where the credentials come from, for messages."""
        if self.settings.secret_name is None:
            return "the credentials of the environment (no storage.secretName is set)"
        return f"the credentials in Secret {self.settings.secret_name!r}"


def translate(error: Exception, bucket: str, key: str, contact: Contact, *, out_of_time: bool) -> TrainerError | None:
    """Return what ends the run, or None for what is worth another try.

    Args:
        error: What boto3 raised.
        bucket: Where to.
        key: Object or prefix, for messages.
        contact: What is known of the service; noted down here when the error shows it to be one.
        out_of_time: The time for further tries is over.
    """
    place = f"s3://{bucket}/{key}"
    if isinstance(error, _NO_CREDENTIALS):
        return AccessDenied(
            f"{place}: no S3 credentials: create a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY and name it "
            "in storage.secretName"
        )
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, ClientError):
        error = error.__context__
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        # A service of another kind (a web console) gives no S3 error document: the code is then the status, and 500 for
        # a page with status 200. The other 5xx come from a load balancer whose S3 service is away.
        contact.answered = contact.answered or not code.isdigit() or status > 500
        if contact.answered and status < 500 and code not in _TRANSIENT_CODES:
            return _answer(code, error.response["Error"].get("Message", ""), place, bucket, contact)
        text = f"{status} {code}"
    else:
        text = _text(error)
    if not out_of_time:
        return None
    if contact.answered:
        return StorageUnavailable(f"{place}: {contact.address} did not serve the request, all retries included: {text}")
    return EndpointUnreachable(f"no S3 service answers at {contact.address} (storage.endpoint): {text}")


def _answer(code: str, message: str, place: str, bucket: str, contact: Contact) -> TrainerError:
    """Translate an error that the service itself gave and that stays."""
    if code in ("NoSuchBucket", "InvalidBucketName"):
        return MissingBucket(f"{place}: there is no bucket {bucket!r} at {contact.address}")
    if code in ("NoSuchKey", "404"):
        return MissingFile(f"{place}: no such object")
    if code in _CREDENTIAL_CODES:
        return AccessDenied(f"{place}: {_CREDENTIAL_CODES[code]}; look at {contact.credentials}")
    if code in ("AccessDenied", "403", "AllAccessDisabled", "Forbidden"):
        return AccessDenied(
            f"{place}: {contact.credentials} may not do this: allow them to list, read and (for the output) write here"
        )
    if code in _REGION_CODES:
        return InvalidConfiguration(
            f"{place}: the bucket is not in region {contact.settings.region!r}: set storage.region ({message})"
        )
    if code == "PreconditionFailed":
        return StorageUnavailable(f"{place}: the object changed while it was read")
    return StorageUnavailable(f"{place}: {contact.address} refused the request: {code} {message}")


def _text(error: Exception) -> str:
    # botocore puts the whole URL with its query into some messages; the class says enough together with the address.
    if isinstance(error, BotoCoreError):
        return f"{type(error).__name__}: {str(error).partition('?')[0][:200]}"
    return str(error)
