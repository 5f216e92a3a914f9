"""What only an S3 server can do: refuse, vanish, restart, answer nonsense. Half of it needs answers that no real server gives
on demand, so a scripted one gives them."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote
from zlib import crc32

import pytest
from botocore.client import BaseClient
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import BUCKET
from tests.s3_server import S3, running_server
from tidemill.storage.errors import (
    AlreadyExists,
    CorruptObject,
    InvalidKey,
    InvalidURL,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    StorageError,
    StoreFull,
    StoreNotFound,
    Unavailable,
    UnsupportedStore,
)
from tidemill.storage.probe import check_inbox, check_preconditions
from tidemill.storage.remote import AMBIGUOUS, is_ambiguous
from tidemill.storage.s3 import S3Store
from tidemill.storage.store import ObjectInfo, Promises

pytestmark = pytest.mark.slow  # servers of its own

ETAG = '"0123456789abcdef0123456789abcdef-1"'  # of a multipart upload: no MD5 of the scripted bodies


@pytest.fixture
def store(s3_server: S3) -> S3Store:
    return S3Store(BUCKET, uuid.uuid4().hex)


# ---- keys and listings


def test_no_other_key_is_touched(store: S3Store, s3_client: BaseClient):
    """Through s3fs's file API these would become `a`, `a/b` or another version."""
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    for key in ["a", "a/b", "a?versionId=1"]:
        s3_client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=key.encode())

    store.delete("a?versionId=1")

    assert {info.key for info in store.list()} - {"a/b"} == {"a"}  # some servers do not list it beside `a`
    assert store.read("a") == b"a"
    assert store.read("a/b") == b"a/b"


def test_the_markers_of_folders_are_no_objects(store: S3Store, s3_client: BaseClient, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    for key in ["", "folder/"]:
        s3_client.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=b"")
    store.write("folder/object", b"data")

    assert [info.key for info in store.list()] == ["folder/object"]
    assert not caplog.records


def test_a_key_may_be_too_long_for_the_server(store: S3Store):
    with pytest.raises(InvalidKey, match="too long"):
        store.write("x" * 1100, b"")


def test_the_etag_of_a_multipart_upload_pins_like_any_other(store: S3Store, s3_client: BaseClient):
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    target = {"Bucket": BUCKET, "Key": f"{prefix}/key"}
    upload = s3_client.create_multipart_upload(**target)["UploadId"]
    parts = [os.urandom(5 << 20), b"the end"]
    tags = [
        s3_client.upload_part(**target, UploadId=upload, PartNumber=i, Body=part)["ETag"]
        for i, part in enumerate(parts, 1)
    ]
    finished = {"Parts": [{"PartNumber": i, "ETag": tag} for i, tag in enumerate(tags, 1)]}
    assert [*store.list()] == []  # unfinished, so invisible
    s3_client.complete_multipart_upload(**target, UploadId=upload, MultipartUpload=finished)

    [info] = store.list()
    assert store.stat("key").etag == info.etag
    assert store.read("key", if_match=info.etag) == b"".join(parts)
    store.delete("key", if_match=info.etag)


# ---- who may do what


@pytest.mark.parametrize(
    ("variable", "code"),
    [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")],
)
def test_wrong_credentials(s3_server: S3, monkeypatch: pytest.MonkeyPatch, variable: str, code: str):
    monkeypatch.setenv(variable, "wr0ng")
    store = S3Store(BUCKET, "x")

    for verb in (lambda: [*store.list()], lambda: store.read("a"), lambda: store.write("a", b"")):
        with pytest.raises(PermissionDenied, match=rf"s3://{BUCKET}/x.*{code}.*{variable}") as caught:
            verb()
        assert s3_server.admin.secret_key not in str(caught.value)
    with pytest.raises(PermissionDenied):
        store.stat("a")
    assert s3_server.admin.secret_key not in repr(store)


def test_no_credentials(s3_server: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")

    with pytest.raises(PermissionDenied, match=r"set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        S3Store(BUCKET).read("a")


def test_a_profile_brings_endpoint_and_credentials(s3_server: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "config").write_text(f"[profile tests]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\n")
    (tmp_path / "credentials").write_text(
        f"[tests]\naws_access_key_id = {s3_server.admin.access_key}\naws_secret_access_key = {s3_server.admin.secret_key}\n"
    )
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "tests")

    with pytest.raises(NotFound):
        S3Store(BUCKET, "x").read("missing")
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    with pytest.raises(PermissionDenied, match="unknown"):
        S3Store(BUCKET, "x").read("missing")


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_either_endpoint_variable_will_do_and_the_region_may_be_missing(
    s3_server: S3, monkeypatch: pytest.MonkeyPatch, variable: str
):
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, s3_server.endpoint)

    with pytest.raises(NotFound):
        S3Store(BUCKET, "x").read("missing")


def test_a_reader_may_not_write_or_delete(store: S3Store, s3_server: S3, monkeypatch: pytest.MonkeyPatch):
    if s3_server.read_only is None:
        pytest.skip("this server has no read-only identity")
    info = store.write("a", b"data")
    for name, value in s3_server.read_only.environment().items():
        monkeypatch.setenv(name, value)
    reader = S3Store(BUCKET, store.url.removeprefix(f"s3://{BUCKET}/"))

    assert reader.read("a", if_match=info.etag) == b"data"
    assert [listed.key for listed in reader.list()] == ["a"]
    for verb in (
        lambda: reader.write("a", b""),
        lambda: reader.create("b", b""),
        lambda: reader.replace("a", b"", if_match=info.etag),
        lambda: reader.delete("a"),
        lambda: reader.delete("a", if_match=info.etag),
    ):
        with pytest.raises(PermissionDenied, match=r"these credentials may not (put|delete)_object"):
            verb()
    assert store.read("a") == b"data"


def test_writing_into_a_bucket_that_does_not_exist(s3_server: S3):
    store = S3Store("no-such-bucket")
    with pytest.raises(StoreNotFound, match="no such bucket"):
        store.write("a", b"")
    with pytest.raises(StoreNotFound, match="no such bucket"):
        store.create("a", b"")


def test_an_impossible_bucket_name(s3_server: S3):
    with pytest.raises(StorageError, match=r"Check the URL"):
        S3Store("no bucket").read("a")


# ---- a server that is away


def test_nobody_listens(s3_server: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:s3cr3t@127.0.0.1:1")
    store = S3Store(BUCKET)
    store.retry_seconds = 0.5

    started = time.monotonic()
    with pytest.raises(Unavailable, match=r"at http://127\.0\.0\.1:1 failed for") as caught:
        store.read("a")
    assert 0.5 <= time.monotonic() - started < 5
    assert "Check that the store is up" in str(caught.value)


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running_server(tmp_path) as server:
        for name, value in server.s3.environment().items():
            monkeypatch.setenv(name, value)
        store = S3Store("ready", "x")
        store.write("a", b"before")
        server.kill()

        tried = threading.Event()

        class Tried(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                tried.set()

        answers: list[bytes] = []
        reader = threading.Thread(target=lambda: answers.append(store.read("a")))
        handler = Tried()
        logger = logging.getLogger("tidemill.storage")
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            reader.start()
            assert tried.wait(10)
            server.start()
            reader.join(60)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

        assert answers == [b"before"]
        store.replace("a", b"after", if_match=store.stat("a").etag)
        assert store.read("a") == b"after"


def test_a_forked_process_opens_its_own(store: S3Store):
    """The client of the parent does not work in the child; a new store does."""
    store.write("a", b"data")
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    code = f"""
import os
from tidemill.storage.s3 import S3Store
assert S3Store({BUCKET!r}, {prefix!r}).read("a") == b"data"
child = os.fork()
if not child:
    data = S3Store({BUCKET!r}, {prefix!r}).read("a")
    os._exit(data != b"data")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


# ---- answers that no real server gives on demand


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def error(cls, status: int, code: str, message: str = "no", more: str = "", **headers: str) -> "Answer":
        body = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
        return cls(status, body.encode(), headers)


@dataclass
class Scripted:
    """Gives one answer after the other, the last one for ever, and remembers what it was asked."""

    answers: list[Answer]
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def next(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> Iterator[tuple[S3Store, Scripted]]:
    script = Scripted([*answers])
    always = {"ETag": ETAG, "Connection": "close"}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # sends "100 Continue", for which an upload waits

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.requests.append((self.command, unquote(self.path), {k.lower(): v for k, v in self.headers.items()}))
            answer = script.next()
            self.send_response(answer.status)
            for name, value in {**always, "Content-Length": str(len(answer.body)), **answer.headers}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_PUT = do_HEAD = do_DELETE = answer

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        store = S3Store("bucket", "prefix")
        store.retry_seconds = 0.3
        try:
            yield store, script
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "trouble",
    [
        Answer.error(500, "InternalError"),
        Answer.error(503, "SlowDown"),
        Answer.error(429, "TooManyRequests"),
        Answer.error(400, "RequestTimeout"),
        Answer(502, b"<html>Bad gateway</html>"),
        Answer(200, b"short", {"Content-Length": "10"}),
        Answer(200, b"fl1pped", {"x-amz-checksum-crc32": "AAAAAA=="}),
    ],
    ids=["500", "503", "429", "400", "502", "cut", "flipped"],
)
def test_a_transient_failure_is_retried(trouble: Answer, monkeypatch: pytest.MonkeyPatch):
    with scripted(monkeypatch, trouble, trouble, Answer(200, b"data")) as (store, script):
        store.retry_seconds = 20
        assert store.read("a", if_match=ETAG.strip('"')) == b"data"
        assert len(script.requests) == 3
        for method, path, headers in script.requests:
            assert (method, path.partition("?")[0], headers["if-match"]) == ("GET", "/bucket/prefix/a", ETAG)


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (Answer.error(503, "SlowDown"), Unavailable),
        (Answer(200, b"short", {"Content-Length": "10"}), Unavailable),
        (Answer(200, b"flipped", {"x-amz-checksum-crc32": "AAAAAA=="}), CorruptObject),
    ],
    ids=["503", "cut", "flipped"],
)
def test_what_never_goes_away_is_told_in_the_end(
    trouble: Answer, error: type[StorageError], monkeypatch: pytest.MonkeyPatch
):
    with (
        scripted(monkeypatch, trouble) as (store, _),
        pytest.raises(error, match=r"get_object of s3://bucket/prefix/a at http://127.0.0.1:\d+ failed for \d+ s: "),
    ):
        store.read("a")


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (Answer.error(403, "RequestTimeTooSkewed"), PermissionDenied, "set this machine's clock"),
        (Answer.error(400, "ExpiredToken"), PermissionDenied, "expired"),
        (Answer.error(403, "AccessDenied"), PermissionDenied, "may not get_object"),
        (Answer.error(501, "NotImplemented"), UnsupportedStore, "lacks"),
        (Answer.error(400, "AuthorizationHeaderMalformed"), StorageError, "set AWS_REGION"),
        (Answer.error(403, "InvalidObjectState"), PermissionDenied, "archived .* restore it"),
        (Answer.error(400, "TokenRefreshRequired"), PermissionDenied, "renew it"),
        (Answer.error(400, "InvalidToken"), PermissionDenied, "renew it"),
        (Answer.error(403, "AllAccessDisabled"), PermissionDenied, "the bucket's owner"),
        (
            Answer.error(403, "AccessDenied", "not authorized to perform: kms:Decrypt"),
            PermissionDenied,
            "grant kms:Decrypt",
        ),
        (Answer.error(400, "KMS.DisabledException"), PermissionDenied, "enable the key"),
        (
            Answer.error(400, "InvalidRequest", "The object was stored using a form of Server Side Encryption."),
            PermissionDenied,
            "SSE-C",
        ),
        (Answer.error(403, "AccessDenied", "Object is WORM protected"), PermissionDenied, "object lock"),
        (Answer.error(403, "QuotaExceeded"), StoreFull, "raise the quota"),
        (Answer.error(507, "XMinioStorageFull"), StoreFull, "Make room"),
        (Answer.error(400, "InvalidBucketName"), InvalidURL, "no bucket can have this name"),
        (Answer.error(400, "KeyTooLongError"), InvalidKey, "too long"),
        (Answer.error(400, "XMinioInvalidObjectName"), InvalidKey, "too long"),
        (Answer.error(400, "InvalidArgument"), StorageError, "InvalidArgument"),
        (Answer.error(404, "NoSuchKey"), NotFound, "does not exist"),
        (Answer.error(404, "NoSuchBucket"), StoreNotFound, "no such bucket"),
    ],
    ids=lambda value: value.body.decode()[13:50] if isinstance(value, Answer) else "",
)
def test_what_will_not_go_away_is_told_at_once(
    answer: Answer, error: type[StorageError], told: str, monkeypatch: pytest.MonkeyPatch
):
    with scripted(monkeypatch, answer) as (store, script), pytest.raises(error, match=told):
        store.read("a")
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer.error(400, "AuthorizationHeaderMalformed", more="<Region>eu-west-1</Region>"),
        Answer.error(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-1"}),
    ],
    ids=["body", "header"],
)
def test_the_region_that_the_store_tells_is_named(monkeypatch: pytest.MonkeyPatch, answer: Answer):
    with scripted(monkeypatch, answer) as (store, _), pytest.raises(StorageError, match="set AWS_REGION=eu-west-1 "):
        store.read("a")


@pytest.mark.parametrize("status", [400, 403])
def test_the_reason_of_a_refused_head_is_asked_for(monkeypatch: pytest.MonkeyPatch, status: int):
    """The answer to a HEAD has no body."""
    with scripted(monkeypatch, Answer.error(status, "ExpiredToken")) as (store, script):
        with pytest.raises(PermissionDenied, match="renew it"):
            store.stat("a")
        assert script.requests[-1][0] == "GET"
    answers = Answer(status), Answer(206, b"x", {"Content-Range": "bytes 0-0/1"})
    with scripted(monkeypatch, *answers) as (store, _), pytest.raises(StorageError, match=r"AWS_"):
        store.stat("a")


def test_a_long_segment_that_a_server_refuses_without_a_reason_is_an_invalid_key(monkeypatch: pytest.MonkeyPatch):
    """As MinIO and versitygw do."""
    with scripted(monkeypatch, Answer(400)) as (store, _), pytest.raises(InvalidKey, match="too long"):
        store.stat("folder/" + "ä" * 128)


WEB_PAGE = Answer(200, b"<!doctype html><html>Console</html>", {"Content-Type": "text/html", "ETag": ""})
EVERY_VERB: list[Callable[[S3Store], object]] = [
    lambda store: [*store.list()],
    lambda store: store.write("a", b""),
    lambda store: store.read("a"),
    lambda store: store.stat("a"),
    lambda store: store.delete("a", if_match="0"),
]


@pytest.mark.parametrize("verb", EVERY_VERB)
def test_a_web_server_is_told_at_once(monkeypatch: pytest.MonkeyPatch, verb: Callable[[S3Store], object]):
    """The console of a server, mostly."""
    with scripted(monkeypatch, WEB_PAGE) as (store, script), pytest.raises(InvalidURL, match=r"no S3 server.*console"):
        verb(store)
    assert len(script.requests) == 1


@pytest.mark.parametrize(("body", "told"), [(b"<rss></rss>", "<rss> came"), (WEB_PAGE.body, "a web page came")])
def test_what_says_that_it_is_xml_may_be_no_listing(monkeypatch: pytest.MonkeyPatch, body: bytes, told: str):
    answer = Answer(200, body, {"Content-Type": "application/xml"})
    with scripted(monkeypatch, answer) as (store, script), pytest.raises(InvalidURL, match=told):
        [*store.list()]
    assert len(script.requests) == 1


def test_the_error_page_of_a_proxy_may_go_away(monkeypatch: pytest.MonkeyPatch):
    page = Answer(502, b"<html>Bad gateway</html>", {"Content-Type": "text/html", "ETag": ""})
    for verb in EVERY_VERB:
        with scripted(monkeypatch, page) as (store, _), pytest.raises(Unavailable, match="a web page"):
            verb(store)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<ListBucketResult><IsTruncated>false",
        b"<ListBucketResult></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>prefix/a</Key></Contents></ListBucketResult>",
        b"<Error><Code>InternalError</Code><Message>late</Message></Error>",
    ],
    ids=["empty", "cut", "no end", "no token", "no size", "an error after 200"],
)
def test_a_page_that_is_not_whole_ends_no_listing(monkeypatch: pytest.MonkeyPatch, body: bytes):
    with scripted(monkeypatch, Answer(200, body), page({"prefix/a": 1})) as (store, script):
        store.retry_seconds = 20
        assert [info.key for info in store.list()] == ["a"]
        assert len(script.requests) == 2


def test_keys_are_decoded_where_the_server_encodes_them(monkeypatch: pytest.MonkeyPatch):
    """AWS and MinIO write `+` for a space there."""
    encoded = page({"prefix/a+b%2Bc%C3%A4%01": 1})
    encoded.body = encoded.body.replace(b"<IsTruncated>", b"<EncodingType>url</EncodingType><IsTruncated>")
    with scripted(monkeypatch, encoded, page({"prefix/a+b%2B": 1})) as (store, script):
        assert [info.key for info in store.list()] == ["a b+c\u00e4\x01"]
        assert [info.key for info in store.list()] == ["a+b%2B"]
        assert "encoding-type=url" in script.requests[0][1]


def test_nothing_at_the_endpoint_is_told_within_seconds_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:s3cr3t@127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    store = S3Store(BUCKET)
    store.retry_seconds = 8
    with pytest.raises(Unavailable):
        store.read("a")

    [warning] = [record for record in caplog.records if record.name == "tidemill.storage"]
    assert "http://127.0.0.1:1" in warning.getMessage()
    assert "AWS_ENDPOINT_URL_S3 names it" in warning.getMessage()
    assert "s3cr3t" not in caplog.text


def test_a_conflict_is_asked_again_until_it_is_answered(monkeypatch: pytest.MonkeyPatch):
    conflict = Answer.error(409, "ConditionalRequestConflict")
    with scripted(monkeypatch, conflict, conflict, Answer()) as (store, script):
        store.retry_seconds = 20
        store.create("a", b"data")
        assert [headers["if-none-match"] for _, _, headers in script.requests] == ["*"] * 3
    with scripted(monkeypatch, conflict, Answer.error(412, "PreconditionFailed")) as (store, _):
        store.retry_seconds = 20
        with pytest.raises(AlreadyExists):
            store.create("a", b"data")


def test_a_server_that_accepts_and_says_nothing(s3_server: S3, monkeypatch: pytest.MonkeyPatch):
    """An upload waits for "100 Continue" without any limit of the client's own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = S3Store(BUCKET)
        store.retry_seconds, store.stall_seconds = 0.5, 0.5
        for verb in (lambda: store.write("a", b"data"), lambda: store.read("a"), lambda: [*store.list()]):
            with pytest.raises(Unavailable, match=r"no answer within"):
                verb()


@pytest.mark.parametrize("length", [3, None])
def test_a_range_that_the_server_ignores(monkeypatch: pytest.MonkeyPatch, length: int | None):
    with scripted(monkeypatch, Answer(200, b"012")) as (store, _), pytest.raises(CorruptObject, match="another range"):
        store.read("a", start=2, length=length)


def test_a_broken_body_is_never_taken_for_the_end(monkeypatch: pytest.MonkeyPatch):
    flipped = Answer(206, b"56789", {"Content-Range": "bytes 5-9/10", "x-amz-checksum-crc32": "AAAAAA=="})
    with scripted(monkeypatch, flipped, head(**{"Content-Length": "10"})) as (store, _):
        store.retry_seconds = 0
        with pytest.raises(CorruptObject):
            store.read("a", start=5)


def test_the_body_is_checked_against_its_checksum(monkeypatch: pytest.MonkeyPatch):
    checksum = b64encode(crc32(b"data").to_bytes(4, "big")).decode()
    with scripted(monkeypatch, Answer(200, b"data", {"x-amz-checksum-crc32": checksum})) as (store, script):
        assert store.read("a") == b"data"
        assert script.requests[0][2]["x-amz-checksum-mode"] == "ENABLED"


def page(keys: dict[str, int], more: str = "") -> Answer:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><ETag>{ETAG}</ETag><LastModified>2026-01-02T03:04:05Z</LastModified></Contents>"
        for key, size in keys.items()
    )
    token = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{more}</NextContinuationToken>" if more else ""
    end = "" if more else "<IsTruncated>false</IsTruncated>"
    return Answer(body=f"<ListBucketResult>{token}{end}{contents}</ListBucketResult>".encode())


def test_listing_is_lazy_and_survives_trouble_between_pages(monkeypatch: pytest.MonkeyPatch):
    pages = [page({"prefix/a": 1}, "next"), Answer.error(503, "SlowDown"), page({"prefix/b": 2})]
    with scripted(monkeypatch, *pages) as (store, script):
        store.retry_seconds = 20
        listing = store.list()
        assert next(listing).key == "a"
        assert len(script.requests) == 1
        assert [info.size for info in listing] == [2]
        assert "continuation-token=next" in script.requests[2][1]


def test_keys_that_servers_disagree_about_are_skipped_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """They can exist on AWS."""
    caplog.set_level(logging.WARNING, "tidemill.storage")
    keys = dict.fromkeys(["prefix/a//b", "prefix/../c", "prefix//d", "prefix/e\\f", "prefix/g/", "prefix/good"], 1)
    with scripted(monkeypatch, page(keys)) as (store, _):
        assert [info.key for info in store.list()] == ["good"]
    [warning] = [record for record in caplog.records if record.name == "tidemill.storage"]
    assert "a//b" in warning.getMessage()


def test_such_keys_are_told_one_by_one_to_who_asks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "tidemill.storage")
    told: dict[str, str] = {}
    with scripted(monkeypatch, page(dict.fromkeys(["prefix/a//b", "prefix/../c", "prefix/good"], 1))) as (store, _):
        assert [info.key for info in store.list(passed_over=told.__setitem__)] == ["good"]
    assert set(told) == {"a//b", "../c"}
    assert not [record for record in caplog.records if record.name == "tidemill.storage"]


@settings(max_examples=500)
@given(st.text(st.sampled_from("a0_.=- /\\\0\n\u00e9\ud800"), max_size=9))
def test_the_short_cut_finds_the_same_keys_ambiguous(key: str):
    assert is_ambiguous(key) == (AMBIGUOUS.search(key) is not None)


@pytest.mark.parametrize("prefix", ["a//", "../", "/", "a/../b", "a\\"])
def test_a_prefix_that_no_key_can_have_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, prefix: str):
    """MinIO answers 400."""
    with scripted(monkeypatch, Answer.error(400, "XMinioInvalidObjectName")) as (store, script):
        assert [*store.list(prefix)] == []
        assert script.requests == []


def head(**headers: str) -> Answer:
    return Answer(headers={"Last-Modified": "Fri, 02 Jan 2026 03:04:05 GMT", **headers})


def test_a_server_that_ignores_if_match_on_delete_is_asked_first(monkeypatch: pytest.MonkeyPatch):
    with scripted(monkeypatch, head(), Answer(204), head()) as (store, script):
        store.promises = Promises(compares_on_delete=False)
        store.delete("a", if_match=ETAG.strip('"'))
        with pytest.raises(PreconditionFailed):
            store.delete("a", if_match="another")
    assert [method for method, _, _ in script.requests] == ["HEAD", "DELETE", "HEAD"]


class PutsBetween(S3Store):
    """A producer puts an object between the two requests of a delete that the server does not compare."""

    put: bytes | None = None

    def stat(self, key: str) -> ObjectInfo:
        found = super().stat(key)
        if self.put is not None:
            S3Store(self._bucket, self._root.rstrip("/")).write(key, self.put)
        return found


@pytest.fixture
def versioned(s3_client: BaseClient) -> PutsBetween:
    bucket = f"versioned-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=bucket)
    s3_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    store = PutsBetween(bucket, "inbox")
    store.promises = Promises(compares_on_delete=False)
    return store


def test_a_version_that_an_uncompared_delete_has_hidden_is_put_back(versioned: PutsBetween):
    old = versioned.write("a", b"old")
    versioned.put = b"new"

    with pytest.raises(PreconditionFailed, match="the new object is back"):
        versioned.delete("a", if_match=old.etag)

    assert versioned.read("a") == b"new"
    assert [info.key for info in versioned.list()] == ["a"]


@pytest.mark.parametrize("between", [None, b"old"], ids=["nothing", "the same bytes"])
def test_a_version_that_was_meant_stays_deleted(versioned: PutsBetween, between: bytes | None):
    versioned.write("a", b"older")
    old = versioned.write("a", b"old")
    versioned.put = between

    versioned.delete("a", if_match=old.etag)

    assert [*versioned.list()] == []


def test_the_probe_finds_such_a_server_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """A registry needs no compared deletes: the warning comes for the inbox."""
    caplog.set_level(logging.WARNING, "tidemill.storage")
    refused = Answer.error(412, "PreconditionFailed")
    with scripted(monkeypatch, page({}), Answer(), refused, Answer(204), head(), head(), Answer(204)) as (store, _):
        store.url = f"s3://{uuid.uuid4().hex}/prefix"  # results are remembered by URL
        check_preconditions(store)
        assert not store.promises.compares_on_delete
        assert not caplog.records
        check_inbox(store)
    assert "ignores If-Match on DELETE" in caplog.text
