"""A bucket of Google Cloud Storage, or a prefix of one, through Google's own client."""

import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from datetime import UTC
from functools import lru_cache
from typing import Any, Final, TypeVar

from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud.storage import Blob, Client
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.exceptions import RequestException
from urllib3.exceptions import HTTPError  # bodies are read without requests, which would wrap it

from tidemill.storage.errors import NotFound, StorageError
from tidemill.storage.gcs_errors import KNOWN_MISSING, translated
from tidemill.storage.pieces import Buffers, Pieces, in_parts
from tidemill.storage.remote import AMBIGUOUS, RemoteStore, Transient
from tidemill.storage.store import ObjectInfo

R = TypeVar("R")

_TIMEOUT: Final = (5.0, 30.0)
"""Seconds for connecting, and for which a connection may be silent."""
_ONCE: Final[dict[str, Any]] = {"retry": None, "timeout": _TIMEOUT}
"""Of each request but a part of an upload: GCSStore retries; layers would multiply."""
_TYPE: Final = "application/octet-stream"
_FIELDS: Final = "items(name,size,generation,timeCreated),nextPageToken"
_NEVER: Final = 1
"""A generation that no object has: they count microseconds since 1970. 0 would mean that nothing is there."""


class GCSStore(RemoteStore):
    """`gs://bucket/prefix`. Credentials are those that Google's clients find (Application Default Credentials); without any,
    requests are not signed, which is enough for a public bucket.

    An etag is the generation. What is sent and read whole is compared with its CRC32C. The service takes about one write a second
    of one key; more are retried.
    """

    part_bytes = 32 * 2**20  # parts go up one after the other; a multiple of 256 KiB, by the service's rule

    _refused = re.compile(rf"{AMBIGUOUS.pattern}|[\r\n]|^\.well-known/acme-challenge/")
    _failures = (GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse, HTTPError, OSError, ValueError)
    _remedy = "the network is up, and that STORAGE_EMULATOR_HOST, if it is set, names a server"

    def __init__(self, bucket: str, prefix: str = "") -> None:
        super().__init__(f"gs://{bucket}", prefix)
        self._bucket, self._variables = bucket, _variables()

    @property
    def keeper(self) -> Hashable:
        """The bucket at the server that these variables name."""
        return "gs", self._bucket, self._variables

    def stat(self, key: str) -> ObjectInfo:
        def look() -> Blob:
            blob = self._blob(key)
            blob.reload(**_ONCE)
            return blob

        return _info(key, self._call("stat", key, look))

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        """A large object is there with the last request of its (resumable) upload; what is begun and not completed goes by itself
        within a week."""
        if len(data) <= self.part_bytes:
            return super().write_pieces(key, data)

        def upload() -> Blob:
            blob, parts = self._blob(key), _File(in_parts(data, self.part_bytes))
            blob.chunk_size = self.part_bytes
            try:
                again = DEFAULT_RETRY.with_timeout(self.retry_seconds)
                blob.upload_from_file(
                    parts, size=len(data), content_type=_TYPE, checksum="crc32c", retry=again, timeout=_TIMEOUT
                )
            except ValueError as error:  # how its client says that not all bytes of a part have been taken
                if not parts.tell() or isinstance(error, RequestException):
                    raise
                raise Transient(f"a part was not taken whole: {error}") from error
            return blob

        return _info(key, self._call("write", key, upload))

    # ---- requests ----------------------------------------------------------------------------------------------------------
    def _page(self, prefix: str, after: str, token: str | None) -> tuple[Sequence[ObjectInfo], str | None]:
        client = _client(os.getpid(), self._variables)
        pages = client.list_blobs(
            self._bucket, prefix=prefix, start_offset=after or None, page_token=token, fields=_FIELDS, **_ONCE
        )
        return [_info(blob.name, blob) for blob in next(pages.pages)], pages.next_page_token

    def _get(self, key: str, if_match: str | None, start: int, length: int | None) -> bytes:
        part = {"start": start or None, "end": None if length is None else start + length - 1}

        def request() -> bytes:
            found: bytes = self._blob(key).download_as_bytes(
                **part, **_if(if_match), raw_download=True, single_shot_download=True, **_ONCE
            )
            return found

        return self._call("read", key, request)

    def _put(
        self, verb: str, key: str, data: bytes, *, if_match: str | None = None, absent: bool = False
    ) -> ObjectInfo:
        """One request up to 8 MiB, a resumable upload above it."""
        condition = {"if_generation_match": 0} if absent else _if(if_match)

        def request() -> Blob:
            blob = self._blob(key)
            blob.upload_from_string(data, content_type=_TYPE, checksum="crc32c", **condition, **_ONCE)
            return blob

        return _info(key, self._call(verb, key, request))

    def _delete(self, key: str, if_match: str | None) -> None:
        self._call("delete", key, lambda: self._blob(key).delete(**_if(if_match), **_ONCE))

    def _blob(self, key: str) -> Blob:
        return _client(os.getpid(), self._variables).bucket(self._bucket).blob(self._root + key)

    def _call(self, verb: str, key: str | None, request: Callable[[], R]) -> R:
        try:
            return super()._call(verb, key, request)
        except NotFound as error:
            if KNOWN_MISSING not in str(error.__cause__):  # the object, or its bucket?
                super()._call("list", None, lambda: self._page(self._root, "", None))
            raise

    def _translated(self, error: BaseException, verb: str, where: str, key: str | None) -> StorageError | Transient:
        return translated(error, verb, where, key)


class _File:
    """Parts as the client reads them: each call takes the next one, whose size it asks for."""

    def __init__(self, parts: Iterator[Buffers]) -> None:
        self._parts, self._at = parts, 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        data = next(self._parts).joined()
        self._at += len(data)
        return data


def _if(etag: str | None) -> dict[str, int]:
    """Arguments by which a request is refused unless the object has this generation; one of another store is of no object."""
    if etag is None:
        return {}
    return {"if_generation_match": int(etag) if re.fullmatch("[1-9][0-9]{0,18}", etag) else _NEVER}


def _info(key: str, blob: Blob) -> ObjectInfo:
    return ObjectInfo(key, blob.size, str(blob.generation), blob.time_created.astimezone(UTC))


def _variables() -> frozenset[tuple[str, str]]:
    return frozenset(
        item for item in os.environ.items() if item[0].startswith(("GOOGLE_", "STORAGE_EMULATOR_", "CLOUDSDK_"))
    )


@lru_cache(maxsize=8)
def _client(pid: int, variables: frozenset[tuple[str, str]]) -> Client:
    """One for each process, as connections do not survive a fork, and each set of variables, which it reads itself."""
    # Else it asks for the bucket in a thread of its own, for traces that nobody has asked for, and by a right that nobody needs
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    try:
        return Client()
    except DefaultCredentialsError as error:
        if dict(variables).get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise  # they are named, and cannot be used
        del error
        return Client.create_anonymous_client()
