"""An S3 bucket or a prefix of one, request by request: every call names the exact key.

s3fs's file API cannot keep the contract of `tidemill.storage.store`: paths lose `?versionId=` and `//`, large reads are not
pinned to one etag, and a refused precondition looks like any other error. What is asked all the time goes through
`s3_client`, everything else through s3fs's client.
"""

import hashlib
import logging
import os
import re
from collections.abc import Hashable, Iterator
from contextlib import suppress
from datetime import UTC
from typing import Any, Final

from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    on_one_line,
)
from tidemill.storage.pieces import Pieces
from tidemill.storage.remote import is_ambiguous, retried
from tidemill.storage.s3_client import ask, knows
from tidemill.storage.s3_errors import FAILURES, Unexplained, translated
from tidemill.storage.s3_parts import upload_in_parts
from tidemill.storage.s3_session import sending_seconds, session_of
from tidemill.storage.store import ObjectInfo, PassedOver, Store, Upload

logger = logging.getLogger("tidemill.storage")

_REMEDY: Final = "the store is up and that AWS_ENDPOINT_URL_S3 names it"


class _Requests:
    """Requests for the objects of a bucket, or of a prefix of one."""

    retry_seconds: float = 90.0
    """For how long a verb goes on trying; SeaweedFS takes 12 to 17 s to restart. Tests shorten it."""

    stall_seconds: float = 30.0
    """How long one attempt may wait for an answer, beyond the time that uploading may take."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._bucket = bucket
        self._root = f"{prefix}/" if prefix else ""
        self._aws_variables = frozenset(item for item in os.environ.items() if item[0].startswith("AWS_"))
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def _call(self, method: str, key: str | None, **params: Any) -> dict[str, Any]:
        """One request, retried while failures are transient. The `Body` of an answer is bytes."""
        where = self.url
        params["Bucket"] = self._bucket
        if key is not None:
            where = f"{self.url}/{key}"
            if is_ambiguous(key):
                raise InvalidKey(
                    f"{where!r}: stores disagree about keys with empty, '.' or '..' segments, or such characters"
                )
            params["Key"] = self._root + key

        def attempt() -> dict[str, Any]:
            try:
                return self._asked(method, params)
            except FAILURES as error:
                told = translated(error, method, where, key)
                raise told from (None if isinstance(error, ValueError) else error)

        def what() -> str:
            return f"{method} of {where} at {session_of(self._aws_variables).endpoint}"

        return retried(attempt, what, self.retry_seconds, _REMEDY)

    def _asked(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        session = session_of(self._aws_variables)
        address = session.address(self._bucket)
        if address is not None and knows(method, params):
            return ask(session, address, method, params, self.stall_seconds)
        from tidemill.storage import s3_others  # here, because s3fs takes most of a second to import

        seconds = sending_seconds(body := params.get("Body", b""), self.stall_seconds)
        if isinstance(body, Pieces):
            params = params | {"Body": body.joined()}
        return s3_others.ask(self._aws_variables, method, params, seconds, anonymous=session.anonymous)


class S3Store(_Requests, Store):
    """`s3://bucket/prefix`. Endpoint, credentials and region come from the standard AWS variables and profiles alone.

    Transient failures (no connection, time-outs, 5xx, throttling, broken bodies) are retried with exponential,
    jittered waits for `retry_seconds`; then `Unavailable` is raised. Nothing below tries again.
    Without any credentials requests are not signed, which is enough for a public bucket.

    Etags are the store's, without quotes. S3 makes them from the content: identical bytes have equal etags.

    Keys on which servers disagree raise `InvalidKey`: an empty, `.` or `..` segment, a backslash, NUL, half a
    surrogate pair. A listing skips such objects and warns once.
    """

    in_parts_above: int = 64 * 2**20
    """Bytes of an object above which it is uploaded in parts; up to that, one PUT is as fast, and two requests fewer."""

    part_bytes: int = 32 * 2**20
    """Bytes of a part: at 30 ms a request the requests themselves are a small share of the time. S3 takes 5 MiB or more."""

    concurrency = 8
    readers = 3  # at 30 ms a request 2.7 times the rate of one; two have 1.9 times, four 3.1

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    @property
    def keeper(self) -> Hashable:
        """The bucket at the server that these variables name."""
        return "s3", self._bucket, self._aws_variables

    @property
    def one_call_below(self) -> int:
        return self.in_parts_above

    def list(
        self, prefix: str = "", *, after: str = "", passed_over: PassedOver | None = None, inside: bool = False
    ) -> Iterator[ObjectInfo]:
        """One request for each 1000 objects, as they are consumed.

        Folder markers (empty, key ends in `/`) are skipped.
        """
        if is_ambiguous(f"{prefix}x"):
            return  # no key of ours starts like that; MinIO would answer 400
        params = {"Prefix": self._root + prefix} | ({"StartAfter": self._root + after} if after else {})
        while True:
            page = self._call("list_objects_v2", None, **params)
            for entry in page.get("Contents", ()):
                if not entry["Key"].startswith(params["Prefix"]):
                    continue  # SeaweedFS answers `a//` as if it were `a/`
                key = entry["Key"].removeprefix(self._root)
                if not is_ambiguous(key):
                    yield ObjectInfo(
                        key, entry["Size"], _unquoted(entry["ETag"]), entry["LastModified"].astimezone(UTC)
                    )
                elif entry["Size"] or not entry["Key"].endswith("/"):
                    (passed_over or self._warn_of)(key, "stores disagree about such keys")
            if not page["IsTruncated"]:
                return
            params["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, key: str) -> ObjectInfo:
        try:
            answer = self._call("head_object", key)
        except NotFound:
            with suppress(PermissionDenied):
                self._call("head_bucket", None)  # a HEAD has no body to say whether the key or the bucket is missing
            raise
        except Unexplained:
            self._call("get_object", key, Range="bytes=0-0")  # the body of its refusal tells the reason
            raise
        return ObjectInfo(
            key, answer["ContentLength"], _unquoted(answer["ETag"]), answer["LastModified"].astimezone(UTC)
        )

    def read(self, key: str, *, if_match: str | None = None, start: int = 0, length: int | None = None) -> bytes:
        """One GET; the body is checked against its length, and against the checksum that the store sent.

        If it sent none that the client can check, the etag of a whole object is, where it is an MD5, as good. If that differs
        (some encryption makes other etags of that form), the object is read until two answers in a row agree.
        """
        end = None if length is None else start + length
        if length == 0:
            if start > self._stat_if_match(key, if_match).size:
                raise CorruptObject(f"{self.url}/{key} has no byte {start}")
            return b""
        params = {} if if_match is None else {"IfMatch": _quoted(if_match)}
        if start or end is not None:
            params["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        try:
            answer = self._call("get_object", key, **params)
        except CorruptObject:
            if start and end is None and start == self._stat_if_match(key, if_match).size:
                return b""  # nothing follows the last byte, which HTTP has no range for
            raise
        data: bytes = answer["Body"]
        if "Range" not in params and not _vouched(answer):
            data = self._agreed(key, data, {**params, "IfMatch": answer["ETag"]})
        if "Range" in params and not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
            raise CorruptObject(f"{self.url}/{key}: the store sent another range than the one asked for")
        if length is not None and len(data) != length:
            raise CorruptObject(f"{self.url}/{key} has {start + len(data)} bytes, not bytes {start} to {end}")
        return data

    def _agreed(self, key: str, data: bytes, params: dict[str, str]) -> bytes:
        """The bytes of two answers in a row, of the size that the store tells; `data` is of the first answer."""
        size = self._stat_if_match(key, _unquoted(params["IfMatch"])).size
        for _ in range(5):
            answer = self._call("get_object", key, **params)
            body: bytes = answer["Body"]
            if _vouched(answer) or (body == data and len(body) == size):
                return body
            data = body
        raise CorruptObject(f"{self.url}/{key}: the store sends other bytes each time, none of them those of its etag")

    def write(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """One PUT, never multipart: 5 GiB at most.

        SeaweedFS makes a missing bucket unless `-s3.autoCreateBucket=false`.
        """
        return self._put(key, data)

    def write_pieces(self, key: str, data: Pieces) -> ObjectInfo:
        """One PUT, whose body is sent piece by piece; above `in_parts_above` in parts, `concurrency` of them at once."""
        if len(data) <= self.in_parts_above:
            return self._put(key, data)
        try:
            answer = upload_in_parts(self._call, key, data, self.concurrency, self.part_bytes)
        except (
            NotFound
        ):  # the answer to the last request was lost, and then there was no such upload any more: or it is gone
            if (found := self.stat(key)).size != len(data):
                raise
            return found
        return ObjectInfo(key, len(data), _unquoted(answer["ETag"]), answer["Date"].astimezone(UTC))

    def unfinished(self, prefix: str = "") -> Iterator[Upload]:
        params: dict[str, str] = {"Prefix": self._root + prefix}
        while True:
            page = self._call("list_multipart_uploads", None, **params)
            for entry in page.get("Uploads", ()):
                if entry["Key"].startswith(params["Prefix"]):
                    key = entry["Key"].removeprefix(self._root)
                    yield Upload(key, entry["UploadId"], entry["Initiated"].astimezone(UTC))
            if not page["IsTruncated"]:
                return
            params |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abandon(self, upload: Upload) -> None:
        with suppress(NotFound):
            self._call("abort_multipart_upload", upload.key, UploadId=upload.id)

    def create(self, key: str, data: bytes, *, mode: int | None = None) -> ObjectInfo:
        """One PUT with `If-None-Match: *`. SeaweedFS says "exists" also of a folder of other keys."""
        try:
            return self._put(key, data, IfNoneMatch="*")
        except PreconditionFailed as error:
            raise AlreadyExists(f"{self.url}/{key} exists") from error

    def replace(self, key: str, data: bytes, *, if_match: str) -> ObjectInfo:
        """One PUT with `If-Match`."""
        try:
            return self._put(key, data, IfMatch=_quoted(if_match))
        except PreconditionFailed:
            self.stat(key)  # SeaweedFS answers 412 too where nothing is: raise NotFound then
            raise

    def delete(self, key: str, *, if_match: str | None = None, sha256: str | None = None) -> None:
        """One DELETE with `If-Match`; a stat, then a DELETE, without it or where the server ignores it.

        In the latter case an object that is put between the two requests is lost, unless the bucket keeps versions: then it
        is put back. The etags are of the bytes, so that `sha256` has nothing to add.
        """
        if if_match is not None and self.promises.compares_on_delete:
            try:
                self._call("delete_object", key, IfMatch=_quoted(if_match))
            except PreconditionFailed:
                self.stat(key)  # as in replace
                raise
            return
        self._stat_if_match(key, if_match)  # a DELETE of nothing succeeds
        answer = self._call("delete_object", key)
        if if_match is not None and answer.get("DeleteMarker") and "VersionId" in answer:
            _take_back_if_other(self, key, if_match, answer["VersionId"])

    def _put(self, key: str, data: bytes | Pieces, **conditions: str) -> ObjectInfo:
        answer = self._call("put_object", key, Body=data, **conditions)
        # The answer to a PUT has no LastModified; its Date is by the same clock and at most the request younger
        return ObjectInfo(key, len(data), _unquoted(answer["ETag"]), answer["Date"].astimezone(UTC))

    def _stat_if_match(self, key: str, if_match: str | None) -> ObjectInfo:
        found = self.stat(key)
        if if_match is not None and found.etag != if_match:
            raise PreconditionFailed(f"{self.url}/{key} has etag {found.etag}, not {if_match}")
        return found


def _take_back_if_other(store: S3Store, key: str, etag: str, marker: str) -> None:
    """After a DELETE that nothing was compared for: show a version with another etag again that its marker has hidden."""
    try:
        full = store._root + key
        below = store._call(
            "list_object_versions", None, Prefix=full, KeyMarker=full, VersionIdMarker=marker, MaxKeys=1
        )
        hidden = [v for v in below.get("Versions", ()) if v["Key"] == full and _unquoted(v["ETag"]) != etag]
        if not hidden:
            return
        store._call("delete_object", key, VersionId=marker)
    except PermissionDenied as error:
        logger.warning(
            "%s/%s was deleted without knowing whether it was replaced in that moment: %s. If it was, delete the marker %s",
            *(store.url, on_one_line(key), error, marker),
        )
    else:
        raise PreconditionFailed(f"{store.url}/{key} was replaced while being deleted; the new object is back")


_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


def _vouched(answer: dict[str, Any]) -> bool:
    """False if no checksum of the body was compared although the etag, the MD5 of a whole object, says other bytes.

    True too where there is nothing to compare, as of multipart uploads.
    """
    etag = _MD5.fullmatch(answer["ETag"])
    if etag is None or answer["Compared"]:
        return True
    return hashlib.md5(answer["Body"], usedforsecurity=False).hexdigest() == etag[1]


def _quoted(etag: str) -> str:
    return f'"{etag}"'


def _unquoted(etag: str) -> str:
    return etag.strip('"')
