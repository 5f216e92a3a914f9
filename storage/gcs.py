"""A bucket of Google Cloud Storage, or a prefix of one, through Google's own client."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC
from functools import lru_cache, partial
from typing import Any, Final, TypeVar

from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud.storage import Blob, Client
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from urllib3.exceptions import HTTPError  # bodies are read without requests, which would wrap it

from tidemill.storage.errors import AlreadyExists, CorruptObject, NotFound, PreconditionFailed, StorageError
from tidemill.storage.gcs_errors import KNOWN_MISSING, translated
from tidemill.storage.remote import AMBIGUOUS, RemoteStore, Transient
from tidemill.storage.store import ObjectInfo, PassedOver

R = TypeVar("R")

_TIMEOUT: Final = (5.0, 30.0)
"""Seconds for connecting, and for which a connection may be silent."""
_ONCE: Final[dict[str, Any]] = {"retry": None, "timeout": _TIMEOUT}
"""Of each request: GCSStore retries; layers would multiply."""
_FIELDS: Final = "items(name,size,generation,timeCreated),nextPageToken"
_NEVER: Final = 1
"""A generation that no object has: they count microseconds since 1970. 0 would mean that nothing is there."""


class GCSStore(RemoteStore):
    """`gs://bucket/prefix`. Credentials are those that Google's clients find (Application Default Credentials); without any,
    requests are not signed, which is enough for a public bucket.

    An etag is the generation: each write makes another, also of the same bytes. What is sent and read whole is compared with its
    CRC32C. The service takes about one write a second of one key; more are retried.
    """

    _refused = re.compile(rf"{AMBIGUOUS.pattern}|[\r\n]|^\.well-known/acme-challenge/")
    _failures = (GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse, HTTPError, OSError, ValueError)
    _remedy = "the network is up, and that STORAGE_EMULATOR_HOST, if it is set, names a server"

    def __init__(self, bucket: str, prefix: str = "") -> None:
        super().__init__(f"gs://{bucket}", prefix)
        self._bucket, self._variables = bucket, _variables()

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """One request for each 1,000 objects, as they are consumed. Folder markers (empty, key ends in `/`) are skipped."""
        if self._refused.search(f"{prefix}x"):
            return  # no key of ours starts like that
        token: str | None = None
        while True:
            blobs, token = self._call("list", None, partial(self._page, self._root + prefix, after, token))
            for blob in blobs:
                key = blob.name.removeprefix(self._root)
                if not self._refused.search(key):
                    if key > after:  # the service begins at `after` itself
                        yield _info(key, blob)
                elif blob.size or not blob.name.endswith("/"):
                    (passed_over or self._warn_of)(key, "stores disagree about such keys")
            if not token:
                return

    def _page(self, prefix: str, after: str, token: str | None) -> tuple[Sequence[Blob], str | None]:
        client = _client(os.getpid(), self._variables)
        start = self._root + after if after else None
        pages = client.list_blobs(
            self._bucket, prefix=prefix, start_offset=start, page_token=token, fields=_FIELDS, **_ONCE
        )
        blobs = [*next(pages.pages)]
        return blobs, pages.next_page_token

    def stat(self, key: str) -> ObjectInfo:
        blob = self._blob(key)
        self._call("stat", key, lambda: blob.reload(**_ONCE))
        return _info(key, blob)

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """One GET; all of an object is compared with its CRC32C."""
        end = None if length is None else start + length
        if length == 0:
            if start > self._stat_if_match(key, if_match).size:
                raise CorruptObject(f"{self.url}/{key} has no byte {start}")
            return b""
        part = {"start": start or None, "end": None if end is None else end - 1}
        try:
            data: bytes = self._call(
                "read",
                key,
                lambda: self._blob(key).download_as_bytes(
                    **part, **_if(if_match), raw_download=True, single_shot_download=True, **_ONCE
                ),
            )
        except CorruptObject:
            if start and end is None and start == self._stat_if_match(key, if_match).size:
                return b""  # nothing follows the last byte, which HTTP has no range for
            raise
        except PreconditionFailed:
            self.stat(key)  # as in replace
            raise
        if length is not None and len(data) != length:
            raise CorruptObject(f"{self.url}/{key} has {start + len(data)} bytes, not bytes {start} to {end}")
        return data

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """One request up to 8 MiB, a resumable upload above it: the object is there with its last request."""
        return self._put("write", key, data, {})

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """An upload on the condition that no generation is there."""
        try:
            return self._put("create", key, data, {"if_generation_match": 0})
        except PreconditionFailed as error:
            raise AlreadyExists(f"{self.url}/{key} exists") from error

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        """An upload on the condition that this generation is there."""
        try:
            return self._put("replace", key, data, _if(if_match))
        except PreconditionFailed:
            self.stat(key)  # the service answers 412 too where nothing is: raise NotFound then
            raise

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """One DELETE with the condition. An etag is of one write, so that `sha256` has nothing to add."""
        try:
            self._call("delete", key, lambda: self._blob(key).delete(**_if(if_match), **_ONCE))
        except PreconditionFailed:
            self.stat(key)  # as in replace
            raise

    def _put(self, verb: str, key: str, data: bytes, condition: dict[str, int]) -> ObjectInfo:
        def request() -> Blob:
            blob = self._blob(key)
            blob.upload_from_string(
                data, content_type="application/octet-stream", checksum="crc32c", **condition, **_ONCE
            )
            return blob

        return _info(key, self._call(verb, key, request))

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
