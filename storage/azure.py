"""A container of Azure Blob Storage, or a prefix of one, through Microsoft's own client."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from datetime import UTC
from functools import partial
from typing import Any

from azure.core import MatchConditions
from azure.storage.blob import BlobClient, BlobProperties

from tidemill.storage.azure_account import account, of_container
from tidemill.storage.azure_errors import FAILURES, translated
from tidemill.storage.errors import AlreadyExists, CorruptObject, PreconditionFailed, StorageError
from tidemill.storage.remote import AMBIGUOUS, RemoteStore, Transient
from tidemill.storage.store import ObjectInfo, PassedOver

logger = logging.getLogger("tidemill.storage")


class AzureStore(RemoteStore):
    """`az://container/prefix`, in the account that the standard Azure variables name (see `azure_account`).

    Etags are the service's, without quotes: each write makes another, also of the same bytes. An object is one block blob, put by
    one request up to 5,000 MiB, whose MD5 the service compares.
    """

    # By the naming rules of the service: no control characters, and no segment that ends in a dot, which some clients cut off
    _refused = re.compile(rf"{AMBIGUOUS.pattern}|[\x01-\x1f\x7f-\x9f\ufffe\uffff]|\.(/|$)")
    _failures = FAILURES
    _remedy = "the account is up and that AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING names it"

    def __init__(self, container: str, prefix: str = "") -> None:
        super().__init__(f"az://{container}", prefix)
        self._container, self._account = container, account()

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """One request for each 5,000 objects, as they are consumed; those up to `after` are asked for too, and passed over.

        What accounts with folders (hierarchical namespaces) list for a folder is skipped.
        """
        if self._refused.search(f"{prefix}x"):
            return  # no key of ours starts like that
        token: str | None = None
        while True:
            blobs, token = self._call("list", None, partial(self._page, self._root + prefix, token))
            for blob in blobs:
                key = blob.name.removeprefix(self._root)
                if (blob.metadata or {}).get("hdi_isfolder") == "true" or not blob.name.startswith(self._root + prefix):
                    continue
                if not self._refused.search(key):
                    if key > after:
                        yield _info(key, blob)
                elif blob.size or not blob.name.endswith("/"):
                    (passed_over or self._warn_of)(key, "stores disagree about such keys")
            if not token:
                return

    def _page(self, prefix: str, token: str | None) -> tuple[Sequence[BlobProperties], str | None]:
        container = of_container(self._account, self._container)
        pages = container.list_blobs(name_starts_with=prefix, include=["metadata"]).by_page(token)
        blobs = [*next(pages)]
        return blobs, pages.continuation_token  # type: ignore[attr-defined]  # of ItemPaged's iterator

    def stat(self, key: str) -> ObjectInfo:
        return _info(key, self._call("stat", key, lambda: self._blob(key).get_blob_properties()))

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """One GET. All of an object is compared with its MD5, where it has one.

        If that differs (whoever puts a blob may claim any), the object is read until two answers in a row agree.
        """
        if length == 0:
            if start > self._stat_if_match(key, if_match).size:
                raise CorruptObject(f"{self.url}/{key} has no byte {start}")
            return b""
        try:
            data, found = self._get(key, if_match, start, length)
        except CorruptObject:
            if start and length is None and start == self._stat_if_match(key, if_match).size:
                return b""  # nothing follows the last byte, which HTTP has no range for
            raise
        except PreconditionFailed:
            self.stat(key)  # as in replace
            raise
        if length is not None and len(data) != length:
            raise CorruptObject(
                f"{self.url}/{key} has {start + len(data)} bytes, not bytes {start} to {start + length}"
            )
        if start or length is not None or _vouched(data, found):
            return data
        for _ in range(5):
            again, found = self._get(key, _unquoted(found.etag), 0, None)
            if _vouched(again, found) or again == data:
                return again
            data = again
        raise CorruptObject(f"{self.url}/{key}: the store sends other bytes each time, none of them those of its MD5")

    def _get(self, key: str, if_match: str | None, start: int, length: int | None) -> tuple[bytes, BlobProperties]:
        def request() -> tuple[bytes, BlobProperties]:
            # Without a range for all of it, since an empty blob has none
            part: dict[str, Any] = {} if not start and length is None else {"offset": start, "length": length}
            answer = self._blob(key).download_blob(**part, **_if(if_match), max_concurrency=1)
            data = answer.readall()
            if len(data) != answer.size:
                raise Transient(f"{len(data)} bytes of {answer.size} came", CorruptObject)
            return data, answer.properties

        return self._call("read", key, request)

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """One PUT of up to 5,000 MiB; a larger object is put in blocks, and is there with the last request."""
        return self._put("write", key, data, {"overwrite": True})

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """One PUT with `If-None-Match: *`."""
        try:
            return self._put("create", key, data, {"overwrite": False})
        except PreconditionFailed as error:
            raise AlreadyExists(f"{self.url}/{key} exists") from error

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        """One PUT with `If-Match`."""
        try:
            return self._put("replace", key, data, {"overwrite": True, **_if(if_match)})
        except PreconditionFailed:
            self.stat(key)  # Azure answers 412 too where nothing is: raise NotFound then
            raise

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """One DELETE with `If-Match`. An etag is of one write, so that `sha256` has nothing to add."""
        try:
            self._call("delete", key, lambda: self._blob(key).delete_blob(**_if(if_match)))
        except PreconditionFailed:
            self.stat(key)  # as in replace
            raise

    def _put(self, verb: str, key: str, data: bytes, options: dict[str, Any]) -> ObjectInfo:
        answer = self._call(
            verb, key, lambda: self._blob(key).upload_blob(data, validate_content=True, max_concurrency=1, **options)
        )
        return ObjectInfo(key, len(data), _unquoted(answer["etag"]), answer["last_modified"].astimezone(UTC))

    def _blob(self, key: str) -> BlobClient:
        return of_container(self._account, self._container).get_blob_client(self._root + key)

    def _translated(self, error: BaseException, verb: str, where: str, key: str | None) -> StorageError | Transient:
        return translated(error, verb, where, key)


def _if(etag: str | None) -> dict[str, Any]:
    """Arguments by which a request is refused unless the object has this etag."""
    return {} if etag is None else {"etag": f'"{etag}"', "match_condition": MatchConditions.IfNotModified}


def _info(key: str, found: BlobProperties) -> ObjectInfo:
    return ObjectInfo(key, found.size, _unquoted(found.etag), found.last_modified.astimezone(UTC))


def _vouched(data: bytes, found: BlobProperties) -> bool:
    """False if the blob's MD5 is of other bytes; True too where it has none, as blobs that were put in blocks."""
    md5 = found.content_settings.content_md5
    return not md5 or hashlib.md5(data, usedforsecurity=False).digest() == bytes(md5)


def _unquoted(etag: Any) -> str:
    return str(etag).strip('"')
