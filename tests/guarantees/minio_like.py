"""The tests' proxy in a mode that answers as MinIO does, where MinIO differs from the server behind it.

No MinIO can be started from a package here. Measured on its last public source of 2026-02-11, request by request:

- a DELETE compares nothing: with a stale If-Match it removes the object, and of nothing it succeeds;
- a COPY with If-None-Match overwrites what is there;
- a PUT with If-Match where nothing is: 404, not 412;
- a listing tells times in milliseconds, a HEAD in whole seconds;
- a segment of more than 255 bytes, or an empty one: 400 to every verb; so is a listing by a prefix with such a segment, or `..`;
- `o/p` beside an object `o` can be put and read, and is not listed.
"""

import html
import re
import time
from datetime import UTC, datetime
from urllib.parse import unquote

from aiohttp import hdrs, web
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from multidict import CIMultiDict

from tests.guarantees.proxy import Answer, FaultProxy
from tests.s3_server import REGION, S3


class MinioLike(FaultProxy):
    """What a request may not say here is taken out of it, so it is signed again, as admin."""

    def __init__(self, s3: S3) -> None:
        super().__init__(s3.endpoint)
        self._credentials = Credentials(s3.admin.access_key, s3.admin.secret_key)
        self._put: dict[str, float] = {}
        """When each object was put through this proxy, by /bucket/key."""

    async def _forward(self, request: web.Request, data: bytes) -> Answer:
        key = request.path[1:].partition("/")[2]
        is_listing = request.method == hdrs.METH_GET and not key and "list-type" in request.query
        name = request.query.get("prefix", "").removesuffix("/") if is_listing else key
        if name and any(not part or part == ".." or len(part.encode()) > 255 for part in name.split("/")):
            return _error(request, 400, "XMinioInvalidObjectName", "Object name contains unsupported characters.")
        headers = request.headers.copy()
        ignored = hdrs.IF_MATCH if request.method == hdrs.METH_DELETE else None
        if "x-amz-copy-source" in headers:
            ignored = hdrs.IF_NONE_MATCH
        if ignored in headers:
            headers = self._signed(request.method, request, data)
        began = time.time()
        answer = await self._send(request.method, request, headers, data)
        if request.method == hdrs.METH_PUT and hdrs.IF_MATCH in headers and answer.status == 412:
            found = await self._send(
                hdrs.METH_HEAD, request, self._signed(hdrs.METH_HEAD, request, b""), b"", query=False
            )
            if found.status == 404:
                return _error(request, 404, "NoSuchKey", "The specified key does not exist.")
        if is_listing and answer.status == 200:
            return self._listing(request, answer)
        if answer.status < 300 and request.method == hdrs.METH_PUT:
            self._put[request.path] = began
        elif answer.status < 300 and request.method == hdrs.METH_DELETE:
            self._put.pop(request.path, None)
        return answer

    def _signed(self, method: str, request: web.Request, data: bytes) -> CIMultiDict[str]:
        """Headers of the request without its conditions."""
        url = self.upstream(request, query=method == request.method)
        kept = {name: value for name, value in request.headers.items() if name.lower().startswith("x-amz-")}
        again = AWSRequest(method=method, url=str(url), headers=kept, data=data)
        S3SigV4Auth(self._credentials, "s3", REGION).add_auth(again)
        return CIMultiDict(again.headers.items())

    def _listing(self, request: web.Request, answer: Answer) -> Answer:
        """Times in milliseconds, and without objects that lie below an object."""
        left_out = 0

        def one(found: re.Match[str]) -> str:
            nonlocal left_out
            text = found[0]
            key = html.unescape(re.search("<Key>(.*?)</Key>", text, re.DOTALL)[1])
            if request.query.get("encoding-type") == "url":
                key = unquote(key)
            path, parts = f"{request.path.rstrip('/')}/{key}", key.split("/")
            above = ("/".join(parts[:count]) for count in range(1, len(parts)))
            if any(f"{request.path.rstrip('/')}/{folder}" in self._put for folder in above):
                left_out += 1
                return ""
            return re.sub("<LastModified>(.*?)</LastModified>", lambda at: self._in_milliseconds(at[1], path), text)

        text = re.sub("<Contents>.*?</Contents>", one, answer.body.decode(), flags=re.DOTALL)
        text = re.sub("<KeyCount>([0-9]+)</KeyCount>", lambda n: f"<KeyCount>{int(n[1]) - left_out}</KeyCount>", text)
        return Answer(answer.status, answer.headers, text.encode())

    def _in_milliseconds(self, listed: str, path: str) -> str:
        """When the object was put, within the second that the server tells."""
        second = datetime.fromisoformat(listed).astimezone(UTC).replace(microsecond=0)
        later = self._put.get(path, 0.0) - second.timestamp()
        return (
            f"<LastModified>{second:%Y-%m-%dT%H:%M:%S}.{round(1000 * min(max(later, 0.0), 0.999)):03}Z</LastModified>"
        )


def _error(request: web.Request, status: int, code: str, message: str) -> Answer:
    """As S3 tells it; a HEAD has no body."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    headers = CIMultiDict({hdrs.CONTENT_TYPE: "application/xml"})
    return Answer(status, headers, b"" if request.method == hdrs.METH_HEAD else body)


def denied(request: web.Request) -> Answer:
    """Who asks may not do this."""
    return _error(request, 403, "AccessDenied", "Access Denied")
