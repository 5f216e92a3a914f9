"""The requests to S3 that Tidemill makes all the time, built by hand, signed by botocore's signer, sent by urllib3."""

import zlib
from base64 import b64encode
from typing import Any, Final
from urllib.parse import quote, urlencode

from botocore.exceptions import NoCredentialsError
from urllib3 import BaseHTTPResponse

from tidemill.storage.pieces import Pieces
from tidemill.storage.s3_answers import check_body, understood
from tidemill.storage.s3_errors import Refused, region_told
from tidemill.storage.s3_parts import completion
from tidemill.storage.s3_session import CHECKSUM, Address, Session

_VERBS: Final = {
    "get_object": "GET",
    "head_object": "HEAD",
    "put_object": "PUT",
    "delete_object": "DELETE",
    "list_objects_v2": "GET",
    "head_bucket": "HEAD",  # after each HEAD that finds nothing
    "create_multipart_upload": "POST",
    "upload_part": "PUT",
    "complete_multipart_upload": "POST",
    "abort_multipart_upload": "DELETE",
    "list_multipart_uploads": "GET",
}
_HEADERS: Final = {
    **{"IfMatch": "if-match", "IfNoneMatch": "if-none-match", "Range": "range"},
    "ChecksumAlgorithm": "x-amz-checksum-algorithm",
}
_QUERY: Final = {
    **{"Prefix": "prefix", "StartAfter": "start-after", "ContinuationToken": "continuation-token"},
    **{"KeyMarker": "key-marker", "UploadIdMarker": "upload-id-marker"},
    **{"UploadId": "uploadId", "PartNumber": "partNumber"},
}
_KNOWN: Final = frozenset({"Bucket", "Key", "Body", "MultipartUpload", *_HEADERS, *_QUERY})
_LISTS: Final = {"list_objects_v2": {"list-type": "2"}, "list_multipart_uploads": {"uploads": ""}}
"""What the query of a request for a page begins with."""


def knows(method: str, params: dict[str, Any]) -> bool:
    """Whether `ask` can ask for this, where the bucket's requests are signed in the usual way."""
    return method in _VERBS and params.keys() <= _KNOWN


def ask(
    session: Session, address: Address, method: str, params: dict[str, Any], stall_seconds: float
) -> dict[str, Any]:
    """One request, or two if the bucket turns out to be in another region, which is then remembered.

    `method`, `params` and the fields of the answer have botocore's names; the `Body` of an answer is bytes, and checked.

    Raises:
        FAILURES, Transient: see `s3_errors`.
    """
    try:
        answer = understood(method, _sent(session, address, method, params, stall_seconds))
    except Refused as refused:
        region = _elsewhere(session, address, refused, method)
        if region in (None, address.region):
            if refused.status in (401, 403) and session.anonymous:
                raise NoCredentialsError from refused
            raise
        moved = session.move(params["Bucket"], region)
        assert moved is not None  # the signer does not depend on the region
        answer = understood(method, _sent(session, moved, method, params, stall_seconds))
    if "Body" in answer:
        check_body(answer)
    return answer


def _sent(
    session: Session, address: Address, method: str, params: dict[str, Any], stall_seconds: float
) -> BaseHTTPResponse:
    headers = {header: params[name] for name, header in _HEADERS.items() if name in params}
    if not session.sends_checksums:
        headers.pop(_HEADERS["ChecksumAlgorithm"], None)
    body: bytes | Pieces | None = params.get("Body")
    if body is not None and session.sends_checksums:
        checksum = body.crc32() if isinstance(body, Pieces) else zlib.crc32(body)
        headers[CHECKSUM] = b64encode(checksum.to_bytes(4, "big")).decode()
    if method == "complete_multipart_upload":
        body = completion(params["MultipartUpload"])
    if method == "get_object" and "Range" not in params and session.asks_checksums:
        headers["x-amz-checksum-mode"] = "ENABLED"
    query = {name: str(params[key]) for key, name in _QUERY.items() if key in params}
    if method in _LISTS:
        query = _LISTS[method] | {"encoding-type": "url"} | query
    if method == "create_multipart_upload":
        query = {"uploads": ""}
    resource = f"/{quote(params['Key'], safe='/-_.~')}" if "Key" in params else address.root
    if query:
        resource += f"?{urlencode(query, safe='-_.~', quote_via=quote)}"
    return session.send(address, _VERBS[method], resource, headers, body, stall_seconds)


def _elsewhere(session: Session, address: Address, refused: Refused, method: str) -> str | None:
    """The region that the store names because the request went to another; the answer to a HEAD may leave that to be asked."""
    if refused.status not in (301, 302, 307, 400):
        return None
    told = region_told(refused)
    if told is None and method in ("head_object", "head_bucket"):
        told = session.send(address, "HEAD", address.root, {}).headers.get("x-amz-bucket-region")
    return told
