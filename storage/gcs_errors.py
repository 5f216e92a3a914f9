"""What a failed request to Google Cloud Storage means: worth another attempt, or an error with its remedy."""

import re
from typing import Final

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.exceptions import InvalidSchema, MissingSchema, RequestException
from requests.exceptions import InvalidURL as NoURL

from tidemill.storage.errors import (
    CorruptObject,
    InvalidKey,
    InvalidURL,
    PermissionDenied,
    StorageError,
)
from tidemill.storage.remote import Transient, usual

KNOWN_MISSING: Final = "No such object"
"""What the service says where the bucket is there, and the object is not."""

_SIGN_IN: Final = (
    "set GOOGLE_APPLICATION_CREDENTIALS to a file of credentials, or run `gcloud auth application-default login`"
)
_URL: Final = re.compile(r"https?://\S+ ?")


def translated(error: BaseException, verb: str, where: str, key: str | None) -> StorageError | Transient:
    """What to raise for a failed request. `where` names its object, or its place if there is no `key`."""
    if isinstance(error, DataCorruption):
        return Transient(f"a body came whose checksum is another: {_message(error)}", CorruptObject)
    status = _status(error)
    if status is None:
        return _without_answer(error, where)
    said = f"{_reason(error)} ({status})"
    no_bucket = key is None or "bucket does not exist" in str(error)
    missing = "bucket. Check the URL, or make the bucket" if no_bucket else ""
    if (found := usual(status, verb, where, missing=missing)) is not None:
        return found
    if status >= 500 or status in (408, 409, 429) or not status >= 300:
        return Transient(f"{said}: {_message(error)}")
    if status == 400 and key is None:
        return InvalidURL(f"{where}: {said}: {_message(error)}: check the name of the bucket")
    if status in (400, 414) and key is not None and len(key.encode()) > 900:
        return InvalidKey(f"{where}: Google takes no key of more than 1,024 bytes, with the prefix of the URL")
    if status == 401:
        return PermissionDenied(f"{where}: {said}: no valid credentials for Google Cloud Storage: {_SIGN_IN}")
    if status == 403 and "retention" in str(error).lower():
        return PermissionDenied(
            f"{where}: {said}: a retention policy or a hold keeps it: wait until it ends, or use another place"
        )
    if status == 403:
        return PermissionDenied(
            f"{where}: {said}: these credentials may not {verb}: grant the role Storage Object Admin (to read alone: Storage "
            "Object Viewer), or use others"
        )
    return StorageError(f"{where}: the store refused {verb}: {said}: {_message(error)}")


def _status(error: BaseException) -> int | None:
    """Of the answer behind an error; None if there was none."""
    if isinstance(error, InvalidResponse):
        return int(error.response.status_code)
    if isinstance(error, GoogleAPICallError) and error.code is not None:
        return int(error.code)
    return None


def _without_answer(error: BaseException, where: str) -> StorageError | Transient:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(
            f"{where}: the store's certificate is not trusted: set REQUESTS_CA_BUNDLE to a file with its authority's"
        )
    if isinstance(error, DefaultCredentialsError) or (
        isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)
    ):
        return PermissionDenied(f"{where}: the credentials for Google cannot be used ({_message(error)}): {_SIGN_IN}")
    unusable = isinstance(error, ValueError) and not isinstance(error, RequestException)
    if unusable or isinstance(error, MissingSchema | InvalidSchema | NoURL):
        return StorageError(
            f"{where}: {_message(error)}. Check the URL, STORAGE_EMULATOR_HOST and GOOGLE_APPLICATION_CREDENTIALS"
        )
    return Transient(f"{type(error).__name__}: {_message(error)}")


def _reason(error: BaseException) -> str:
    errors = getattr(error, "errors", None) or [{}]
    first = errors[0] if isinstance(errors[0], dict) else {}
    return str(first.get("reason") or type(error).__name__)


def _message(error: BaseException) -> str:
    """The first line, without the address of the request, which repeats key and query."""
    text = str(getattr(error, "message", None) or error)
    return _URL.sub("", text.split("\n", 1)[0]).rstrip(". ")
