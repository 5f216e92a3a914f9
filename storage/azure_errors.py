"""What a failed request to Azure Blob Storage means: worth another attempt, or an error with its remedy."""

from typing import Final

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    DecodeError,
    HttpResponseError,
    IncompleteReadError,
    ServiceRequestError,
    ServiceResponseError,
)

from tidemill.storage.errors import (
    InvalidKey,
    InvalidURL,
    PermissionDenied,
    StorageError,
    StoreFull,
)
from tidemill.storage.remote import Transient, usual

FAILURES: Final = (AzureError, OSError, ValueError)

_NETWORK: Final = (ServiceRequestError, ServiceResponseError, IncompleteReadError, DecodeError, OSError)
_BUSY: Final = {"Md5Mismatch", "ServerBusy", "OperationTimedOut", "InternalError", "ContainerBeingDeleted"}
"""Codes that go away, whatever their status."""
_LOST: Final = {
    "BlobAlreadyExists",
    "ConditionNotMet",
    "TargetConditionNotMet",
    "BlobOverwritten",
    "UnauthorizedBlobOverwrite",
}
"""The object is another than the one that was named, or there is one."""
_IN_THE_WAY: Final = {"PathConflict", "ResourceTypeMismatch", "DirectoryIsNotEmpty"}
"""Of accounts with folders."""
_HELD: Final = {
    "LeaseIdMissing": "a lease holds it: wait until it ends, or break it",
    "LeaseIdMismatchWithBlobOperation": "a lease holds it: wait until it ends, or break it",
    "BlobImmutableDueToPolicy": "an immutability policy or legal hold holds it: wait until it ends, or use another place",
    "BlobArchived": "it is archived: move it to another tier first",
    "SnapshotsPresent": "it has snapshots: delete them first",
}
_DENIED: Final = {
    "AccountIsDisabled": "the account is disabled: ask who owns it",
    "AuthenticationFailed": "the key, token or clock is wrong: check AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN or "
    "AZURE_STORAGE_CONNECTION_STRING, and this machine's clock",
    "AuthorizationFailure": "the key or token is wrong or may not do this, or the firewall of the account keeps this machine out",
    "AuthorizationPermissionMismatch": "grant the role Storage Blob Data Contributor, or use other credentials",
    "InsufficientAccountPermissions": "the token may not do this: make one with more permissions",
    "AuthorizationProtocolMismatch": "the token asks for https",
    "NoAuthenticationInformation": "no credentials were sent: set AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, or sign in",
    "PublicAccessNotPermitted": "the account is not public: set AZURE_STORAGE_KEY, AZURE_STORAGE_SAS_TOKEN, or sign in",
}


def translated(error: BaseException, verb: str, where: str, key: str | None) -> StorageError | Transient:
    """What to raise for a failed request. `where` names its object, or its place if there is no `key`."""
    if (
        not isinstance(error, HttpResponseError)
        or isinstance(error, DecodeError)
        or not (error.status_code or 0) >= 300
    ):
        return _without_answer(error, where)
    status, code = error.status_code or 0, _code(error)
    said = f"{code} ({status})"
    if code in _LOST:
        status = 412  # some come with 409
    if code in _HELD:
        return PermissionDenied(f"{where}: {code}: {_HELD[code]}")
    if code in _IN_THE_WAY:
        return InvalidKey(f"{where}: {code}: an object and a folder would need the same name")
    no_container = key is None or code == "ContainerNotFound"
    missing = "container. Check the URL and the account, or make the container" if no_container else ""
    if (found := usual(status, verb, where, missing=missing)) is not None:
        return found
    if code == "AccountLimitExceeded" or status == 507:
        return StoreFull(f"{where}: {said}. Nothing was written. Make room, or raise the quota, and start again")
    if status >= 500 or status in (408, 409, 429) or code in _BUSY:
        return Transient(f"{said}: {_message(error)}")
    if status == 400 and key is None and code in ("InvalidResourceName", "OutOfRangeInput", "InvalidUri"):
        return InvalidURL(f"{where}: no container can have this name: check the URL")
    if (
        status in (400, 414)
        and key is not None
        and code in ("InvalidUri", "OutOfRangeInput", "InvalidInput", "InvalidResourceName")
    ):
        return InvalidKey(
            f"{where}: {code}: Azure takes no such key: it has more than 1,024 characters, or too many segments"
        )
    if status in (401, 403):
        remedy = _DENIED.get(code, f"these credentials may not {verb}: grant it, or use others")
        return PermissionDenied(f"{where}: {said}: {remedy}")
    return StorageError(f"{where}: the store refused {verb}: {said}: {_message(error)}")


def _without_answer(error: BaseException, where: str) -> StorageError | Transient:
    if isinstance(error, ClientAuthenticationError):
        return PermissionDenied(
            f"{where}: no credentials for Azure ({_message(error)}): set AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN, or "
            "sign in by `az login` or the AZURE_CLIENT_... variables"
        )
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(
            f"{where}: the store's certificate is not trusted: set REQUESTS_CA_BUNDLE to a file with its authority's"
        )
    if isinstance(error, ValueError) and "Content-Range" in str(error):
        return Transient("an answer without a Content-Range came, unlike any of Azure: the port of a web server?")
    if isinstance(error, ValueError):  # of a setting; not repeated, since a secret may stand in it
        return StorageError(
            f"{where}: the Azure settings cannot be used: check AZURE_STORAGE_CONNECTION_STRING, AZURE_STORAGE_KEY (it is "
            "base64), and the name of the container"
        )
    if isinstance(error, (*_NETWORK, HttpResponseError)):
        return Transient(f"{type(error).__name__}: {_message(error)}")
    return StorageError(f"{where}: {_message(error)}. Check the URL and the Azure settings")


def _code(error: HttpResponseError) -> str:
    code = getattr(error, "error_code", None) or ""
    if not code and error.response is not None:
        code = getattr(error.response, "headers", {}).get("x-ms-error-code", "")
    return str(getattr(code, "value", code)) or str(error.status_code)


def _message(error: BaseException) -> str:
    """The first line, without the request's number and time."""
    text = getattr(error, "message", None) or str(error)
    return str(text).split("\n", 1)[0].rstrip(". ")
