"""What an S3 server's answer holds: an object, a page of a listing, a refusal. The names of its fields are botocore's."""

import hashlib
import zlib
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from re import compile as pattern
from typing import Any, Final
from urllib.parse import unquote_plus
from xml.etree import ElementTree

import anycrc
from urllib3 import BaseHTTPResponse

from tidemill.storage.errors import CorruptObject
from tidemill.storage.remote import Transient
from tidemill.storage.s3_errors import NoS3Server, Refused

_RANGE: Final = pattern(r"bytes (\d+)-(\d+)/")

_FIELDS: Final = {
    "get_object": {
        **{"ETag": "etag", "ContentRange": "content-range", "ContentLength": "content-length"},
        **{
            f"Checksum{name}": f"x-amz-checksum-{name.lower()}"
            for name in ("CRC32", "CRC64NVME", "CRC32C", "SHA256", "SHA1")
        },
    },
    "head_object": {"ETag": "etag", "ContentLength": "content-length", "LastModified": "last-modified"},
    "put_object": {"ETag": "etag", "Date": "date"},
    "upload_part": {"ETag": "etag", "ChecksumCRC32": "x-amz-checksum-crc32"},
    "delete_object": {"DeleteMarker": "x-amz-delete-marker", "VersionId": "x-amz-version-id"},
}
"""Headers, by method and field."""

_date = lru_cache(maxsize=64)(parsedate_to_datetime)  # many answers come in one second
_CRC64NVME: Final = anycrc.Model("CRC64-NVME")
_CRC32C: Final = anycrc.Model("CRC32-ISCSI")
_CHECKSUMS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "ChecksumCRC32": lambda data: zlib.crc32(data).to_bytes(4, "big"),
    "ChecksumCRC64NVME": lambda data: _CRC64NVME.calc(data).to_bytes(8, "big"),
    "ChecksumCRC32C": lambda data: _CRC32C.calc(data).to_bytes(4, "big"),
    "ChecksumSHA256": lambda data: hashlib.sha256(data).digest(),
    "ChecksumSHA1": lambda data: hashlib.sha1(data, usedforsecurity=False).digest(),
}
"""The cheapest first: one that agrees is enough."""


def understood(method: str, answer: BaseHTTPResponse) -> dict[str, Any]:
    """The fields of the answer to `method`, a name of botocore's such as `get_object`.

    Raises:
        Refused: the store says no.
        NoS3Server: whatever answers there, it does not speak S3.
        Transient: half an answer, or one that no S3 server gives on purpose.
    """
    if not 200 <= answer.status < 300:
        raise _refusal(answer)
    headers = answer.headers
    if method in ("head_bucket", "abort_multipart_upload"):
        return {}
    if "etag" not in headers and headers.get("content-type", "").startswith("text/html"):
        raise NoS3Server(f"a web page came ({answer.status})")
    if method == "list_objects_v2":
        return _page(answer.data)
    if method == "list_multipart_uploads":
        return _uploads(answer.data)
    if method == "create_multipart_upload":
        begun = _root(answer.data, "InitiateMultipartUploadResult", "the number of an upload")
        return {"UploadId": _text(begun, "UploadId")}
    if method == "complete_multipart_upload":
        done = _root(answer.data, "CompleteMultipartUploadResult", "the end of an upload")
        return {"ETag": _text(done, "ETag"), "Date": _date(headers["date"]) if "date" in headers else datetime.now(UTC)}
    found: dict[str, Any] = {name: headers[field] for name, field in _FIELDS[method].items() if field in headers}
    if method == "delete_object":
        return found | {"DeleteMarker": found.get("DeleteMarker") == "true"}
    if "ETag" not in found:
        raise Transient("an answer without an ETag came, unlike any of S3: the port of a web server?")
    try:
        if "ContentLength" in found:
            found["ContentLength"] = int(found["ContentLength"])
        if method == "get_object":
            found["Body"] = answer.data
        elif method == "put_object":
            found["Date"] = _date(found["Date"]) if "Date" in found else datetime.now(UTC)
        elif method == "head_object":
            found["LastModified"] = _date(found["LastModified"])
            found["ContentLength"]  # an object has one
    except (KeyError, TypeError, ValueError) as error:
        raise Transient(f"an answer came that says nothing usable of {error}") from error
    return found


def check_body(answer: dict[str, Any]) -> None:
    """Compare the body of an answer with its length, and with a checksum of all of it if the store sent one.

    Notes down in `Compared` whether there was such a checksum.

    Raises:
        Transient: the body is another; in the end that is a `CorruptObject`.
    """
    body: bytes = answer["Body"]
    expected = answer.get("ContentLength", len(body))
    if (sent := _RANGE.match(answer.get("ContentRange", ""))) is not None:
        expected = int(sent[2]) - int(sent[1]) + 1
    if len(body) != expected:
        raise Transient(f"{len(body)} bytes of {expected} came", CorruptObject)
    answer["Compared"] = False
    for name, digest in _CHECKSUMS.items():
        told = answer.get(name, "-")
        if "-" in told:  # of the parts of a multipart upload
            continue
        found = b64encode(digest(body)).decode()
        if found != told:
            raise Transient(f"a body came whose {name.removeprefix('Checksum')} is {found}, not {told}", CorruptObject)
        answer["Compared"] = True
        return


def _root(data: bytes, name: str, what: str) -> ElementTree.Element:
    """The root of an answer whose root has this name; `what` such an answer is, in words."""
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        if data.lstrip()[:9].lower() == b"<!doctype":  # whatever its content type says; XML of S3 has none
            raise NoS3Server(f"a web page came in place of {what}") from error
        raise Transient(f"half of {what} came, or none ({error})") from error
    namespace = root.tag[: root.tag.rfind("}") + 1]
    if root.tag == f"{namespace}Error":  # S3 may begin a success and end it so
        about = _texts(root)
        raise Transient(f"{about.get('Code')} (200): {about.get('Message')}")
    if root.tag != f"{namespace}{name}":
        raise NoS3Server(f"<{root.tag.removeprefix(namespace)}> came in place of {what}")
    return root


def _text(root: ElementTree.Element, name: str) -> str:
    """The text of an element that an answer must have."""
    if not (found := _texts(root).get(name)):
        raise Transient(f"an answer came that says nothing of its {name}")
    return found


def _uploads(data: bytes) -> dict[str, Any]:
    """`Uploads`, `IsTruncated` and the two markers of what follows, of a page of unfinished uploads."""
    root = _root(data, "ListMultipartUploadsResult", "a listing")
    about = _texts(root)
    decoded = _decoded if about.get("EncodingType") == "url" else str
    namespace = root.tag[: root.tag.rfind("}") + 1]
    try:
        uploads = [_upload(_texts(element), decoded) for element in root.findall(f"{namespace}Upload")]
        page: dict[str, Any] = {"Uploads": uploads, "IsTruncated": about.get("IsTruncated") == "true"}
        if page["IsTruncated"]:
            page["NextKeyMarker"] = decoded(about["NextKeyMarker"])
            page["NextUploadIdMarker"] = about["NextUploadIdMarker"]
    except (KeyError, ValueError) as error:
        raise Transient(f"a page of a listing came that says nothing usable of {error}") from error
    return page


def _upload(texts: dict[str, str], decoded: Callable[[str], str]) -> dict[str, Any]:
    return {
        "Key": decoded(texts["Key"]),
        "UploadId": texts["UploadId"],
        "Initiated": _moment(texts["Initiated"]),
    }


def _page(data: bytes) -> dict[str, Any]:
    """`Contents`, `IsTruncated` and `NextContinuationToken` of a page of a listing."""
    root = _root(data, "ListBucketResult", "a listing")
    namespace, about = root.tag[: root.tag.rfind("}") + 1], _texts(root)
    entry = _entry_of(namespace, _decoded if about.get("EncodingType") == "url" else str)
    try:
        entries = [entry(element) for element in root.findall(f"{namespace}Contents")]
        page: dict[str, Any] = {"Contents": entries, "IsTruncated": about["IsTruncated"] == "true"}
        if page["IsTruncated"]:
            page["NextContinuationToken"] = about["NextContinuationToken"]
    except (KeyError, ValueError) as error:
        raise Transient(f"a page of a listing came that says nothing usable of {error}") from error
    return page


def _entry_of(namespace: str, decoded: Callable[[str], str]) -> Callable[[ElementTree.Element], dict[str, Any]]:
    """Makes an entry of a page of its element: a listing has many, and each step of this takes time."""
    names = "Key", "Size", "ETag", "LastModified"
    tags = [f"{namespace}{name}" for name in names]

    def entry(element: ElementTree.Element) -> dict[str, Any]:
        key, size, etag, modified = map(element.findtext, tags)
        if key is None or size is None or etag is None or modified is None:
            raise KeyError(" or ".join(names))
        return {"Key": decoded(key), "Size": int(size), "ETag": etag, "LastModified": _moment(modified)}

    return entry


def _decoded(text: str) -> str:
    """`text` without its URL encoding, of which most keys have the slashes alone."""
    plain = text.replace("%2F", "/")
    return unquote_plus(text) if "%" in plain or "+" in plain else plain


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _texts(element: ElementTree.Element) -> dict[str, str]:
    """The texts of the elements right below this one, by their names without a namespace."""
    return {child.tag[child.tag.rfind("}") + 1 :]: child.text or "" for child in element}


def _refusal(answer: BaseHTTPResponse) -> Refused:
    """As botocore tells it: where no body says more, the code is the status."""
    about = {"Code": str(answer.status), "Message": answer.reason or ""}
    try:
        root = ElementTree.fromstring(answer.data)
    except ElementTree.ParseError:
        pass
    else:
        if root.tag[root.tag.rfind("}") + 1 :] == "Error":
            about |= {name: text for name, text in _texts(root).items() if text}
    return Refused(answer.status, about["Code"], {**about, "headers": answer.headers})
