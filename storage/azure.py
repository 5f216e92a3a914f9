"""A container of Azure Blob Storage, or a prefix of one, through Microsoft's own client."""

import hashlib
import re
import uuid
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC
from typing import Any, Final

from azure.core import MatchConditions
from azure.storage.blob import BlobBlock, BlobClient, BlobProperties

from tidemill.storage.azure_account import account, of_container
from tidemill.storage.azure_errors import FAILURES, translated
from tidemill.storage.errors import CorruptObject, StorageError
from tidemill.storage.parallel import concurrently
from tidemill.storage.pieces import Buffers, Pieces, in_parts
from tidemill.storage.remote import AMBIGUOUS, RemoteStore, Transient
from tidemill.storage.store import ObjectInfo

_MOST_BLOCKS: Final = 50_000
"""The service takes no more."""


class AzureStore(RemoteStore):
    """`az://container/prefix`, in the account that the standard Azure variables name (see `azure_account`).

    Etags are the service's, without quotes. An object is one block blob, put by one request up to 5,000 MiB, whose MD5 the
    service compares.
    """

    part_bytes = 8 * 2**20  # several go up at once, each a copy; above 4 MiB the service takes them at its full rate

    # By the naming rules of the service: no control characters, and no segment that ends in a dot, which some clients cut off
    _refused = re.compile(rf"{AMBIGUOUS.pattern}|[\x01-\x1f\x7f-\x9f\ufffe\uffff]|\.(/|$)")
    _failures = FAILURES
    _remedy = "the account is up and that AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING names it"

    def __init__(self, container: str, prefix: str = "") -> None:
        super().__init__(f"az://{container}", prefix)
        self._container, self._account = container, account()

    @property
    def keeper(self) -> Hashable:
        """The container in the account that the environment names."""
        return "az", self._container, self._account

    def stat(self, key: str) -> ObjectInfo:
        return _info(key, self._call("stat", key, lambda: self._blob(key).get_blob_properties()))

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        """A large object goes up in blocks, `concurrency` of them at once, and is there with the request that lists them. Blocks
        of which there is no such list go by themselves within a week."""
        if len(data) <= self.part_bytes:
            return super().write_pieces(key, data)
        size, attempt = max(self.part_bytes, -(-len(data) // _MOST_BLOCKS)), uuid.uuid4().hex

        def stage(numbered: tuple[int, Buffers]) -> BlobBlock:
            number, part = numbered
            block = f"{attempt}-{number:05d}"
            self._call("write", key, lambda: self._blob(key).stage_block(block, part.joined(), validate_content=True))
            return BlobBlock(block)

        blocks = concurrently(stage, enumerate(in_parts(data, size)), self.concurrency)
        return self._written("write", key, len(data), lambda: self._blob(key).commit_block_list(blocks))

    # ---- requests ----------------------------------------------------------------------------------------------------------
    def _page(self, prefix: str, after: str, token: str | None) -> tuple[Sequence[ObjectInfo], str | None]:
        """5,000 objects; no listing begins in its middle. What accounts with folders (hierarchical namespaces) list for a folder
        is left out."""
        container = of_container(self._account, self._container)
        pages = container.list_blobs(name_starts_with=prefix, include=["metadata"]).by_page(token)
        found = [
            _info(blob.name, blob)
            for blob in next(pages)
            if (blob.metadata or {}).get("hdi_isfolder") != "true" and blob.name.startswith(prefix)
        ]
        return found, pages.continuation_token  # type: ignore[attr-defined]  # of ItemPaged's iterator

    def _get(self, key: str, if_match: str | None, start: int, length: int | None) -> bytes:
        """All of an object is compared with its MD5, where it has one.

        If that differs (whoever puts a blob may claim any), the object is read until two answers in a row agree.
        """
        data, found = self._download(key, if_match, start, length)
        if start or length is not None or _vouched(data, found):
            return data
        for _ in range(5):
            again, found = self._download(key, _unquoted(found.etag), 0, None)
            if _vouched(again, found) or again == data:
                return again
            data = again
        raise CorruptObject(f"{self.url}/{key}: the store sends other bytes each time, none of them those of its MD5")

    def _download(self, key: str, if_match: str | None, start: int, length: int | None) -> tuple[bytes, BlobProperties]:
        def request() -> tuple[bytes, BlobProperties]:
            # Without a range for all of it, since an empty blob has none
            part: dict[str, Any] = {} if not start and length is None else {"offset": start, "length": length}
            answer = self._blob(key).download_blob(**part, **_if(if_match), max_concurrency=1)
            data = answer.readall()
            if len(data) != answer.size:
                raise Transient(f"{len(data)} bytes of {answer.size} came", CorruptObject)
            return data, answer.properties

        return self._call("read", key, request)

    def _put(
        self, verb: str, key: str, data: bytes, *, if_match: str | None = None, absent: bool = False
    ) -> ObjectInfo:
        """Above 5,000 MiB it is put in blocks."""
        options = {"overwrite": not absent, **_if(if_match), "validate_content": True, "max_concurrency": 1}
        return self._written(verb, key, len(data), lambda: self._blob(key).upload_blob(data, **options))

    def _written(self, verb: str, key: str, size: int, request: Callable[[], dict[str, Any]]) -> ObjectInfo:
        answer = self._call(verb, key, request)
        return ObjectInfo(key, size, _unquoted(answer["etag"]), answer["last_modified"].astimezone(UTC))

    def _delete(self, key: str, if_match: str | None) -> None:
        self._call("delete", key, lambda: self._blob(key).delete_blob(**_if(if_match)))

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
