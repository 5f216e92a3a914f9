"""A small S3 server of one process, for what the real one of the tests cannot be: in another region, behind https, with
temporary credentials. It checks every signature by the rules of AWS Signature Version 4, written down here a second time.

Beside it, what hands out temporary credentials (STS, the metadata of a machine or a container), and a proxy.
"""

import hashlib
import hmac
import json
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

EMPTY = hashlib.sha256(b"").hexdigest()
UNSIGNED = "UNSIGNED-PAYLOAD"


@dataclass
class Asked:
    """One request, as the server has seen it."""

    method: str
    target: str
    """As it stands in the first line."""
    headers: dict[str, str]
    """Names in small letters."""
    body: bytes
    connection: tuple[str, int]
    """The client's end of it."""

    @property
    def access_key(self) -> str | None:
        """Whose signature it bears."""
        found = re.search("Credential=([^/]+)/", self.headers.get("authorization", ""))
        return found and found[1]

    @property
    def region(self) -> str:
        return self.headers["authorization"].split("/")[2]


class Handler(BaseHTTPRequestHandler):
    """Reads one request whole; the subclass answers it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.respond(Asked(self.command, self.path, headers, body, self.client_address))

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def respond(self, asked: Asked) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(handler: type[Handler], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of 127.0.0.1 where the handler answers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Bucket:
    """What the server holds and knows."""

    keys: dict[str, tuple[str, str | None]] = field(default_factory=lambda: {"AKID": ("secret", None)})
    """Secret key and session token by access key."""
    region: str = "us-east-1"
    anonymous: bool = False
    """Requests without a signature are answered."""
    malformed: bool = False
    """A request for another region is told so by 400, the region in the body alone, as AWS may; else by 301 and a header, as a
    HEAD of the bucket always is."""
    etag: Callable[[bytes], str] = lambda body: hashlib.md5(body).hexdigest()
    checksums: Callable[[bytes], dict[str, str]] = lambda body: {}
    """Headers that go with the body of a whole object."""
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def handler(self) -> type[Handler]:
        bucket = self

        class S3(Handler):
            def respond(self, asked: Asked) -> None:
                bucket.asked.append(asked)
                refusal = bucket.refusal(asked)
                if refusal is not None:
                    self.say(*refusal[:2], **refusal[2])
                else:
                    self.say_object(asked)

            def say_object(self, asked: Asked) -> None:
                url = urlsplit(asked.target)
                key = unquote(url.path).removeprefix("/bucket").removeprefix("/")
                if asked.method == "PUT":
                    bucket.objects[key] = asked.body
                    self.say(200, ETag=f'"{bucket.etag(asked.body)}"')
                elif not key and asked.method == "GET":
                    self.say(200, bucket.listing(parse_qs(url.query)["prefix"][0]), Content_Type="application/xml")
                elif key not in bucket.objects:
                    self.say(404, b"<Error><Code>NoSuchKey</Code></Error>")
                elif asked.method == "DELETE":
                    del bucket.objects[key]
                    self.say(204)
                else:
                    body, modified = bucket.objects[key], "Fri, 02 Jan 2026 03:04:05 GMT"
                    more = bucket.checksums(body) if "x-amz-checksum-mode" in asked.headers else {}
                    self.say(200, body, ETag=f'"{bucket.etag(body)}"', Last_Modified=modified, **more)

        return S3

    def listing(self, prefix: str) -> bytes:
        entries = "".join(
            f"<Contents><Key>{quote(key)}</Key><Size>{len(body)}</Size><ETag>&quot;{self.etag(body)}&quot;</ETag>"
            "<LastModified>2026-01-02T03:04:05.678Z</LastModified></Contents>"
            for key, body in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        return (
            "<?xml version='1.0'?><ListBucketResult xmlns='http://s3.amazonaws.com/doc/2006-03-01/'>"
            f"<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        ).encode()

    def refusal(self, asked: Asked) -> tuple[int, bytes, dict[str, str]] | None:
        """Why the request is not answered, or None."""
        if asked.access_key is None:
            return None if self.anonymous else error(403, "AccessDenied")
        if asked.access_key not in self.keys:
            return error(403, "InvalidAccessKeyId")
        secret, token = self.keys[asked.access_key]
        if asked.headers.get("x-amz-security-token") != token:
            return error(400, "InvalidToken")
        if asked.region != self.region:
            if self.malformed and (asked.method != "HEAD" or asked.target.count("/") > 1):
                return error(400, "AuthorizationHeaderMalformed", f"<Region>{self.region}</Region>")
            return error(301, "PermanentRedirect", x_amz_bucket_region=self.region)
        if signature(asked, secret) != asked.headers["authorization"].rpartition("Signature=")[2]:
            return error(403, "SignatureDoesNotMatch")
        told = asked.headers["x-amz-content-sha256"]
        if told not in (UNSIGNED, hashlib.sha256(asked.body).hexdigest()):
            return error(400, "XAmzContentSHA256Mismatch")
        return None


def error(status: int, code: str, more: str = "", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    return status, f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode(), headers


def signature(asked: Asked, secret: str) -> str:
    """Of AWS Signature Version 4, https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html."""
    by = re.compile(r"Credential=[^/]+/(\d+)/([^/]+)/s3/aws4_request, *SignedHeaders=([^,]+)")
    found = by.search(asked.headers["authorization"])
    assert found is not None
    day, region, names = found[1], found[2], found[3].split(";")
    url = urlsplit(asked.target)
    sent = {name for name in asked.headers if name == "host" or name.startswith("x-amz-")}
    assert sent <= {*names}, "all of these must be signed"
    lines = [
        *(asked.method, url.path or "/", "&".join(sorted(url.query.split("&")))),
        *(f"{name}:{asked.headers[name]}" for name in names),
        *("", ";".join(names), asked.headers["x-amz-content-sha256"]),
    ]
    scope = f"{day}/{region}/s3/aws4_request"
    hashed = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{asked.headers['x-amz-date']}\n{scope}\n{hashed}"
    return hmac.digest(key, text.encode(), "sha256").hex()


# ---- temporary credentials


@dataclass
class Issuer:
    """Hands out one set of temporary credentials after the other to whoever asks, by each way that AWS has for it."""

    bucket: Bucket
    """Where they are valid, from then on."""
    seconds: float = 3600
    """How long they last."""
    ways: list[str] = field(default_factory=list)
    """What was asked for."""

    def issue(self, way: str) -> dict[str, str]:
        self.ways.append(way)
        number = len(self.ways)
        key, secret, token = f"TEMP{number}", f"secret{number}", f"token/{number}+=="
        self.bucket.keys[key] = (secret, token)
        until = datetime.now(UTC) + timedelta(seconds=self.seconds)
        return {"key": key, "secret": secret, "token": token, "until": f"{until:%Y-%m-%dT%H:%M:%SZ}"}

    def handler(self) -> type[Handler]:
        issuer = self

        class Credentials(Handler):
            def respond(self, asked: Asked) -> None:
                if asked.method == "POST":  # STS
                    action = parse_qs(asked.body.decode())["Action"][0]
                    self.say(200, sts_answer(action, issuer.issue(action)), Content_Type="text/xml")
                elif asked.target == "/latest/api/token":  # a machine's metadata, version 2
                    self.say(200, b"metadata-token", X_aws_ec2_metadata_token_ttl_seconds="21600")
                elif asked.target == "/latest/meta-data/iam/security-credentials/":
                    self.say(200, b"role")
                else:
                    found = issuer.issue(asked.target)
                    about = {"Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-02T03:04:05Z"}
                    self.say(200, json.dumps(about | as_json(found)).encode(), Content_Type="application/json")

        return Credentials


def as_json(found: dict[str, str]) -> dict[str, Any]:
    """As a machine's or container's metadata tell it; a `credential_process` says SessionToken, with a version."""
    return {
        **{"AccessKeyId": found["key"], "SecretAccessKey": found["secret"]},
        **{"Token": found["token"], "SessionToken": found["token"], "Expiration": found["until"], "Version": 1},
    }


def sts_answer(action: str, found: dict[str, str]) -> bytes:
    return f"""<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result>
<AssumedRoleUser><AssumedRoleId>id:name</AssumedRoleId><Arn>arn:aws:sts::123456789012:assumed-role/role/name</Arn></AssumedRoleUser>
<Credentials><AccessKeyId>{found["key"]}</AccessKeyId><SecretAccessKey>{found["secret"]}</SecretAccessKey>
<SessionToken>{found["token"]}</SessionToken><Expiration>{found["until"]}</Expiration></Credentials>
</{action}Result></{action}Response>""".encode()


# ---- a proxy


@dataclass
class Proxy:
    """Forwards requests that name a whole URL, and connections by CONNECT."""

    seen: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, target and `Proxy-Authorization` of each request to the proxy itself."""

    def handler(self) -> type[Handler]:
        proxy = self

        class Forwarding(Handler):
            def do_CONNECT(self) -> None:
                proxy.seen.append(("CONNECT", self.path, self.headers.get("Proxy-Authorization")))
                host, _, port = self.path.partition(":")
                with socket.create_connection((host, int(port))) as upstream:
                    self.send_response(200)
                    self.end_headers()
                    between(self.connection, upstream)
                self.close_connection = True

            def respond(self, asked: Asked) -> None:
                proxy.seen.append((asked.method, asked.target, asked.headers.get("proxy-authorization")))
                url = urlsplit(asked.target)
                assert url.hostname, "a proxy is asked for whole URLs"
                assert url.port
                kept = {n: v for n, v in asked.headers.items() if not n.startswith(("proxy-", "connection"))}
                lines = [f"{asked.method} {url._replace(scheme='', netloc='').geturl()} HTTP/1.1"]
                lines += [*(f"{name}: {value}" for name, value in kept.items()), "connection: close", "", ""]
                with socket.create_connection((url.hostname, url.port)) as upstream:
                    upstream.sendall("\r\n".join(lines).encode() + asked.body)
                    while data := upstream.recv(1 << 16):
                        self.wfile.write(data)
                self.close_connection = True

        return Forwarding


def between(one: socket.socket, other: socket.socket) -> None:
    """Carry bytes both ways until either end closes."""
    while True:
        for ready in select.select([one, other], [], [])[0]:
            data = ready.recv(1 << 16)
            if not data:
                return
            (other if ready is one else one).sendall(data)
