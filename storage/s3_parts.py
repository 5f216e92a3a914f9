"""A large object in S3: uploaded in parts, several at once, and there only when all of them are.

A part that fails is sent again by itself. What was uploaded of an object that is never completed is no object; it costs room
until it is given up: by the writer, or after its death by garbage collection (`storage.retention`).
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final
from xml.sax.saxutils import escape

from tidemill.storage.errors import StorageError
from tidemill.storage.parallel import concurrently
from tidemill.storage.pieces import Buffers, Pieces, in_parts

MOST_PARTS: Final = 10_000
"""S3 takes no more."""

Call = Callable[..., dict[str, Any]]
"""(method, key, parameters by botocore's names) to the answer; retried while failures are transient."""


def upload_in_parts(call: Call, key: str, data: Pieces, calls: int, part: int) -> dict[str, Any]:
    """Upload an object in parts of so many bytes, with so many requests under way. Returns the last answer, as that to a PUT.

    Raises:
        NotFound: somebody has given the upload up.
        StorageError: a request failed, or `data` ended with it. Nothing is there, and no parts are left if the store can be
            asked to remove them.
    """
    size = max(part, -(-len(data) // MOST_PARTS))
    begun = call("create_multipart_upload", key, ChecksumAlgorithm="CRC32")["UploadId"]
    try:
        parts = _sent(call, key, begun, data, size, calls)
        return call("complete_multipart_upload", key, UploadId=begun, MultipartUpload={"Parts": parts})
    except BaseException:
        with suppress(StorageError):
            call("abort_multipart_upload", key, UploadId=begun)
        raise


def _sent(call: Call, key: str, begun: str, data: Pieces, size: int, calls: int) -> list[dict[str, Any]]:
    """Send all parts. Returns what completing the upload names of each. After an error no further request begins."""

    def send(numbered: tuple[int, Buffers]) -> dict[str, Any]:
        number, part = numbered
        answer = call("upload_part", key, UploadId=begun, PartNumber=number, Body=part)
        checksum = {"ChecksumCRC32": answer["ChecksumCRC32"]} if "ChecksumCRC32" in answer else {}
        return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

    return concurrently(send, enumerate(in_parts(data, size), 1), calls)


def completion(told: dict[str, Any]) -> bytes:
    """The body of the request that completes an upload."""
    parts = "".join(
        f"<Part>{''.join(f'<{name}>{escape(str(value))}</{name}>' for name, value in part.items())}</Part>"
        for part in told["Parts"]
    )
    return f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{parts}</CompleteMultipartUpload>'.encode()
