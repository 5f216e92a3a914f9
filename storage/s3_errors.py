"""What a failed request to an S3 server means: worth another attempt, or an error with its remedy."""

import ssl
from typing import Any, Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3 import exceptions as http

from tidemill.storage.errors import (
    CorruptObject,
    InvalidKey,
    InvalidURL,
    PermissionDenied,
    StorageError,
    StoreFull,
    UnsupportedStore,
)
from tidemill.storage.remote import Transient, usual


class Refused(Exception):
    """An answer that is no success. `about` is what its body tells, and its `headers`, whatever the case of their names."""

    def __init__(self, status: int, code: str, about: dict[str, Any]) -> None:
        super().__init__(f"{code} ({status})")
        self.status, self.code, self.about = status, code, about


class NoS3Server(Exception):
    """The answer of something that does not speak S3."""


FAILURES: Final = (
    *(Refused, NoS3Server, http.HTTPError, OSError, ValueError),
    *(boto.BotoCoreError, boto.ClientError, ResponseParserError),
)
"""All that is raised when the store, the network or the configuration is at fault. A ClientError is the cause of an OSError."""

_NETWORK: Final = (
    OSError,
    http.HTTPError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.CredentialRetrievalError,  # the metadata service did not answer
    ResponseParserError,  # half an answer, or a proxy's error page
)
_NO_CREDENTIALS: Final = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound)

# Codes that come with a 4xx status but go away
_BUSY: Final = {
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout", "SlowDown"),
    *("Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"),
}

_TOKEN: Final = "the session token has expired, or is not valid: renew it (AWS_SESSION_TOKEN, or `aws sso login`)"
_DENIED: Final = {
    "AccountProblem": "there is a problem with the account: ask who pays for it",
    "AllAccessDisabled": "all access to this bucket has been switched off: check the URL, and ask the bucket's owner",
    "ExpiredToken": _TOKEN,
    "ExpiredTokenException": _TOKEN,
    "InvalidAccessKeyId": "the store does not know this access key: check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "InvalidObjectState": "the object is archived (Glacier): restore it first, or move it away",
    "InvalidToken": _TOKEN,
    "NotSignedUp": "the account may not use S3: sign it up",
    "RequestExpired": "the clocks of this machine and the store differ: set this machine's clock",
    "RequestTimeTooSkewed": "the clocks of this machine and the store differ: set this machine's clock",
    "SignatureDoesNotMatch": "the secret key is wrong, or a proxy changed the request: check AWS_SECRET_ACCESS_KEY",
    "TokenRefreshRequired": _TOKEN,
}
_FULL: Final = {"QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
_REGION: Final = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_TOO_LONG: Final = {"KeyTooLongError", "XMinioInvalidObjectName", "XMinioInvalidResourceName"}
_LONGEST_SEGMENT: Final = 255
"""Bytes: what MinIO and versitygw take, whose answer to a HEAD does not say why it is refused."""


class Unexplained(StorageError):
    """The answer to a HEAD, which has no body, refuses without a reason; another request may be told."""


class _UnexplainedDenial(Unexplained, PermissionDenied):
    pass


def translated(error: BaseException, method: str, where: str, key: str | None) -> StorageError | Transient:
    """What to raise for a failed request. `where` names its object, or its place if there is no `key`."""
    if isinstance(error, NoS3Server):
        return InvalidURL(
            f"{where}: what answers is no S3 server: {error}. Check AWS_ENDPOINT_URL_S3: is it the port of a console?"
        )
    answer = _answer(error)
    if answer is None:
        return _without_answer(error, where)
    status, code, about = answer
    message = (about.get("Message") or "").rstrip(".")
    if status == 507 or code in _FULL:
        return StoreFull(
            f"{where}: {code}: {message}. Nothing was written. Make room, or raise the quota, and start again"
        )
    if about["headers"].get("content-type", "").startswith("text/html") and (status >= 500 or code == str(status)):
        return Transient(
            f"a web page came in place of S3's answer ({status}): the port of a console, or a proxy's error page?"
        )
    if (status >= 500 and status != 501) or status in (307, 408, 409, 429) or code in _BUSY:
        return Transient(f"{code} ({status}): {message}")
    no_bucket = key is None or code == "NoSuchBucket"
    missing = "bucket. Check the URL and AWS_ENDPOINT_URL_S3, or make the bucket" if no_bucket else ""
    if (found := usual(status, method, where, missing=missing)) is not None:
        return found
    if status == 501:
        return UnsupportedStore(f"{where}: the store lacks what Tidemill needs for {method}: {message}")
    if status == 301 or code in _REGION:
        region = _region(about)
        remedy = f"set AWS_REGION={region}" if region else "set AWS_REGION"
        return StorageError(f"{where}: the bucket is in another region: {remedy} ({message})")
    if code == "InvalidBucketName":
        return InvalidURL(f"{where}: no bucket can have this name ({message}): check the URL")
    if code in _TOO_LONG or (status == 400 and key is not None and _has_long_segment(key)):
        return InvalidKey(f"{where}: the key, or a part of it between slashes, is too long for this store")
    return _refused(status, code, message, method, where)


def region_told(refused: Refused) -> str | None:
    """Where the bucket is, if the refusal says so."""
    return _region(refused.about)


def _region(about: dict[str, Any]) -> str | None:
    region: str | None = about.get("Region") or about["headers"].get("x-amz-bucket-region")
    return region


def _refused(status: int, code: str, message: str, method: str, where: str) -> StorageError:
    """Who may not do what, as far as the answer tells."""
    code = code or str(status)
    said = f"{code}: {message}" if message and code != str(status) else code
    if code in _DENIED:
        return PermissionDenied(f"{where}: {code}: {_DENIED[code]}")
    if code.startswith("KMS.") or "kms:" in message:
        return PermissionDenied(
            f"{where}: {said}: its key (KMS) may not be used: grant kms:Decrypt (and kms:GenerateDataKey to write) to these "
            "credentials, or enable the key"
        )
    if status in (400, 403) and (
        "Server Side Encryption" in message or "SSE" in message or "encryption" in message.lower()
    ):
        return PermissionDenied(
            f"{where}: {said}: it was encrypted with a key of its writer (SSE-C), which the store does not keep: write it "
            "with the store's own encryption (SSE-S3 or SSE-KMS), or with none"
        )
    if "WORM" in message or "ObjectLock" in code or "object lock" in message.lower():
        return PermissionDenied(f"{where}: {said}: an object lock holds it: wait until it ends, or use another place")
    grant = f"these credentials may not {method}: grant it, or use others (AWS_PROFILE, AWS_ACCESS_KEY_ID)"
    if method == "head_object" and status in (400, 403) and code in ("", str(status)):
        if status == 403:
            return _UnexplainedDenial(
                f"{where}: {grant}. Who may not list the bucket is told so of missing objects too"
            )
        return Unexplained(
            f"{where}: the store refused head_object without a reason (400): check AWS_SESSION_TOKEN, AWS_REGION"
        )
    if status in (401, 403):
        return PermissionDenied(f"{where}: {said}: {grant}")
    return StorageError(f"{where}: the store refused {method}: {code} ({status}): {message}")


def _without_answer(error: BaseException, where: str) -> StorageError | Transient:
    if isinstance(error, _NO_CREDENTIALS):
        remedy = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return PermissionDenied(f"{where}: no credentials for S3 ({error}): {remedy}")
    if isinstance(error, boto.FlexibleChecksumError):
        return Transient(str(error), CorruptObject)
    if isinstance(error, boto.SSLError | ssl.SSLError | http.SSLError):
        if "Hostname mismatch" in str(error) or "IP address mismatch" in str(error):
            return StorageError(
                f"{where}: the store's certificate is for another host: name it in AWS_ENDPOINT_URL_S3 as it does ({error})"
            )
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StorageError(
                f"{where}: the store's certificate is not trusted: set AWS_CA_BUNDLE to a file with its authority's ({error})"
            )
        if "WRONG_VERSION_NUMBER" in str(error) or "record layer failure" in str(error).lower():
            return StorageError(
                f"{where}: the endpoint does not speak https: set AWS_ENDPOINT_URL_S3 to http://host:port"
            )
    if isinstance(error, _NETWORK) and not isinstance(error, http.LocationValueError):
        return Transient(f"{type(error).__name__}: {error}")
    if isinstance(error, ValueError):  # of the endpoint; botocore repeats it, with whatever secrets stand in it
        return StorageError(
            f"{where}: the endpoint is no URL: set AWS_ENDPOINT_URL_S3 to http://host:port or https://host (and HTTP_PROXY or "
            "HTTPS_PROXY, if set, to such a URL)"
        )
    return StorageError(f"{where}: {error}. Check the URL and the AWS configuration")


def _answer(error: BaseException | None) -> tuple[int, str, dict[str, Any]] | None:
    """(HTTP status, S3's error code, body and `headers`) of the answer behind `error`, None if there was no answer."""
    if isinstance(error, Refused):
        return error.status, error.code, error.about
    while error is not None:
        if isinstance(error, boto.ClientError):
            metadata = error.response["ResponseMetadata"]
            about = {**error.response["Error"], "headers": metadata.get("HTTPHeaders", {})}
            return metadata["HTTPStatusCode"], about.get("Code") or "", about
        error = error.__cause__
    return None


def _has_long_segment(key: str) -> bool:
    return any(len(part.encode(errors="surrogatepass")) > _LONGEST_SEGMENT for part in key.split("/"))
