"""Where requests to S3 go and who signs them: credentials of each kind, other regions, https, proxies, public buckets."""

import base64
import datetime as dt
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from zlib import crc32

import anycrc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.conftest import BUCKET
from tests.s3_server import S3
from tests.storage.s3_stand_in import UNSIGNED, Bucket, Handler, Issuer, Proxy, served
from tidemill.storage import s3_others, s3_session
from tidemill.storage.errors import NotFound, PermissionDenied, StorageError, Unavailable
from tidemill.storage.parallel import concurrently
from tidemill.storage.s3 import S3Store
from tidemill.storage.s3_session import Session, session_of

pytestmark = pytest.mark.slow  # servers of its own


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the machine, or of another test, decides anything."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@contextmanager
def bucket_at(monkeypatch: pytest.MonkeyPatch, bucket: Bucket, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serves the bucket; the AWS variables name it."""
    with served(bucket.handler(), tls) as port:
        endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        yield endpoint


def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def opened() -> S3Store:
    store = S3Store("bucket", "place")
    store.retry_seconds = 0.2
    return store


def use_all_verbs(store: S3Store) -> None:
    """Each of the five requests, on a key that has to be encoded."""
    key = "a b+c~ä%2F'(1)*=&"
    info = store.write(key, b"data")
    assert store.read(key, if_match=info.etag) == b"data"
    assert store.stat(key).size == 4
    assert [listed.key for listed in store.list("a b+")] == [key]
    store.delete(key, if_match=info.etag)
    with pytest.raises(NotFound):
        store.read(key)


# ---- credentials


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    with bucket_at(monkeypatch, Bucket()):
        use_all_verbs(opened())


def test_temporary_keys_of_the_environment_come_with_their_token(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token/+=")
    with bucket_at(monkeypatch, Bucket(keys={"AKID": ("secret", "token/+=")})):
        use_all_verbs(opened())


def test_keys_of_a_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKID\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    with bucket_at(monkeypatch, Bucket()):
        use_all_verbs(opened())


Configured = Callable[[pytest.MonkeyPatch, Path, str], None]
"""Writes what makes botocore ask the issuer at a URL."""


def by_process(monkeypatch: pytest.MonkeyPatch, folder: Path, issuer: str) -> None:
    script = folder / "issue.py"
    script.write_text(
        f"import urllib.request\nprint(urllib.request.urlopen({issuer + '/process'!r}).read().decode())\n"
    )
    (folder / "config").write_text(f"[default]\ncredential_process = {sys.executable} -IS {script}\n")


def by_role(monkeypatch: pytest.MonkeyPatch, folder: Path, issuer: str) -> None:
    role = "role_arn = arn:aws:iam::123456789012:role/role\nsource_profile = source\n"
    (folder / "config").write_text(f"[profile mine]\n{role}")
    (folder / "credentials").write_text("[source]\naws_access_key_id = AKID\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", issuer)


def by_web_identity(monkeypatch: pytest.MonkeyPatch, folder: Path, issuer: str) -> None:
    (folder / "token").write_text("identity")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/role")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", issuer)


def by_container(monkeypatch: pytest.MonkeyPatch, folder: Path, issuer: str) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{issuer}/container")


def by_machine(monkeypatch: pytest.MonkeyPatch, folder: Path, issuer: str) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", issuer)


WAYS = [by_process, by_role, by_web_identity, by_container, by_machine]


@pytest.mark.parametrize("configured", WAYS)
def test_temporary_keys_that_somebody_hands_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: Configured
):
    bucket = Bucket(keys={})
    issuer = Issuer(bucket)
    with bucket_at(monkeypatch, bucket), served(issuer.handler()) as port:
        configured(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
        use_all_verbs(opened())
    assert {asked.access_key for asked in bucket.asked} == {"TEMP1"}


@pytest.mark.parametrize("configured", [by_process, by_role, by_container])
def test_keys_that_expire_are_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: Configured):
    """botocore renews them in the last ten minutes of their life."""
    bucket = Bucket(keys={})
    issuer = Issuer(bucket, seconds=300)
    with bucket_at(monkeypatch, bucket), served(issuer.handler()) as port:
        configured(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
        store = opened()
        store.write("a", b"data")
        first = bucket.asked[-1].access_key
        issuer.seconds = 3600
        store.read("a")
        renewed = bucket.asked[-1].access_key
        store.read("a")
    assert first != renewed
    assert bucket.asked[-1].access_key == renewed


def test_keys_that_have_expired_when_they_come_are_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bucket = Bucket(keys={})
    with bucket_at(monkeypatch, bucket), served(Issuer(bucket, seconds=-60).handler()) as port:
        by_container(monkeypatch, tmp_path, f"http://127.0.0.1:{port}")
        with pytest.raises(Unavailable, match="expired"):
            opened().read("a")


# ---- public buckets


def test_a_public_bucket_needs_no_credentials(monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket(anonymous=True, objects={"place/a": b"data"})
    with bucket_at(monkeypatch, bucket):
        store = opened()
        assert store.read("a") == b"data"
        assert [info.key for info in store.list()] == ["a"]
    assert {asked.access_key for asked in bucket.asked} == {None}


def test_another_bucket_without_credentials_says_what_to_set(monkeypatch: pytest.MonkeyPatch):
    with bucket_at(monkeypatch, Bucket()):
        for verb in (lambda s: s.read("a"), lambda s: s.stat("a"), lambda s: s.write("a", b""), lambda s: [*s.list()]):
            with pytest.raises(PermissionDenied, match=r"no credentials .* set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
                verb(opened())


# ---- addresses


@pytest.mark.parametrize(
    ("bucket", "variables", "url"),
    [
        ("bucket", {}, "https://bucket.s3.eu-west-1.amazonaws.com"),
        ("bucket", {"AWS_REGION": "us-east-1"}, "https://bucket.s3.amazonaws.com"),
        ("bucket", {"AWS_REGION": "cn-north-1"}, "https://bucket.s3.cn-north-1.amazonaws.com.cn"),
        ("with.dots", {}, "https://s3.eu-west-1.amazonaws.com/with.dots"),
        (
            "bucket",
            {"AWS_USE_DUALSTACK_ENDPOINT": "true"},
            "https://bucket.s3.dualstack.eu-west-1.amazonaws.com",
        ),
        ("bucket", {"AWS_USE_FIPS_ENDPOINT": "true"}, "https://bucket.s3-fips.eu-west-1.amazonaws.com"),
        ("point-abc123-s3alias", {}, "https://point-abc123-s3alias.s3.eu-west-1.amazonaws.com"),
        ("bucket", {"AWS_ENDPOINT_URL": "https://s3.example.org"}, "https://s3.example.org/bucket"),
        ("bucket", {"AWS_ENDPOINT_URL_S3": "http://[::1]:9000/gate/"}, "http://[::1]:9000/gate/bucket"),
        ("bucket", {"AWS_ENDPOINT_URL_S3": "http://user:s3cr3t@10.0.0.1:9000"}, "http://10.0.0.1:9000/bucket"),
    ],
)
def test_a_bucket_is_where_botocore_says(
    monkeypatch: pytest.MonkeyPatch, bucket: str, variables: dict[str, str], url: str
):
    keys(monkeypatch)
    for name, value in {"AWS_REGION": "eu-west-1", **variables}.items():
        monkeypatch.setenv(name, value)
    address = Session().address(bucket)

    assert address is not None
    assert address.url == url
    assert address.region == variables.get("AWS_REGION", "eu-west-1")
    assert (address.root == "/") == (bucket in url.split("/")[2])


def test_a_bucket_with_another_signer_is_left_to_s3fs(monkeypatch: pytest.MonkeyPatch):
    """Directory buckets have sessions of their own (S3 Express)."""
    keys(monkeypatch)
    assert Session().address("bucket--use1-az4--x-s3") is None


@pytest.mark.parametrize("malformed", [False, True])
def test_a_bucket_in_another_region_is_found_once(monkeypatch: pytest.MonkeyPatch, malformed: bool):
    keys(monkeypatch)
    bucket = Bucket(region="eu-central-1", malformed=malformed)
    with bucket_at(monkeypatch, bucket):
        use_all_verbs(opened())
    assert [asked.region for asked in bucket.asked].count("us-east-1") == 1


@pytest.mark.parametrize(("malformed", "asked_wrongly"), [(False, 1), (True, 2)])
def test_a_bucket_in_another_region_is_found_by_a_head_too(
    monkeypatch: pytest.MonkeyPatch, malformed: bool, asked_wrongly: int
):
    """The answer to a HEAD has no body: where its headers say nothing, the bucket is asked."""
    keys(monkeypatch)
    bucket = Bucket(region="eu-central-1", malformed=malformed, objects={"place/a": b"data"})
    with bucket_at(monkeypatch, bucket):
        assert opened().stat("a").size == 4
    assert [asked.region for asked in bucket.asked] == ["us-east-1"] * asked_wrongly + ["eu-central-1"]


# ---- https


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody else vouches for, and its key with it; then the authority's."""
    folder = tmp_path_factory.mktemp("authority")
    begin, name = dt.datetime.now(dt.UTC) - dt.timedelta(days=1), x509.NameOID.COMMON_NAME
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = x509.Name([x509.NameAttribute(name, "an authority")])

    def certificate(subject: x509.Name, of: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(ca).public_key(of.public_key())
        built = built.serial_number(x509.random_serial_number()).not_valid_before(begin)
        return built.not_valid_after(begin + dt.timedelta(days=9))

    of_authority = certificate(ca, ca_key).add_extension(x509.BasicConstraints(True, None), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    of_server = certificate(x509.Name([x509.NameAttribute(name, "server")]), key).add_extension(names, critical=False)
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "server.pem").write_bytes(
        of_server.sign(ca_key, hashes.SHA256()).public_bytes(pem)
        + key.private_bytes(pem, private, serialization.NoEncryption())
    )
    (folder / "authority.pem").write_bytes(of_authority.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    return folder / "server.pem", folder / "authority.pem"


def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_https_with_an_authority_of_ones_own(monkeypatch: pytest.MonkeyPatch, authority: tuple[Path, Path]):
    keys(monkeypatch)
    bucket = Bucket()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority[1]))
    with bucket_at(monkeypatch, bucket, tls(authority[0])):
        use_all_verbs(opened())
    put = next(asked for asked in bucket.asked if asked.method == "PUT")
    assert put.headers["x-amz-content-sha256"] == UNSIGNED  # its CRC32 and TLS tell of every change
    assert put.headers["x-amz-checksum-crc32"] == base64.b64encode(crc32(b"data").to_bytes(4, "big")).decode()


def test_an_unknown_authority_is_told_of(monkeypatch: pytest.MonkeyPatch, authority: tuple[Path, Path]):
    keys(monkeypatch)
    with (
        bucket_at(monkeypatch, Bucket(), tls(authority[0])),
        pytest.raises(StorageError, match="not trusted: set AWS_CA_BUNDLE"),
    ):
        opened().read("a")


def test_a_certificate_of_another_host_is_refused(monkeypatch: pytest.MonkeyPatch, authority: tuple[Path, Path]):
    keys(monkeypatch)
    bucket = Bucket()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority[1]))
    with bucket_at(monkeypatch, bucket, tls(authority[0])) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(authority[0].with_name("config")))
        authority[0].with_name("config").write_text("[default]\ns3 =\n  addressing_style = path\n")
        with pytest.raises(StorageError, match="for another host"):
            opened().read("a")
    assert bucket.asked == []


def test_http_at_a_port_of_https_is_told_of(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    with bucket_at(monkeypatch, Bucket()) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint.replace("http:", "https:"))
        with pytest.raises(StorageError, match="does not speak https"):
            opened().read("a")


# ---- proxies


def test_a_proxy_is_asked_for_http(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    bucket, proxy = Bucket(), Proxy()
    with bucket_at(monkeypatch, bucket) as endpoint, served(proxy.handler()) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://user:s3cr3t@127.0.0.1:{port}")
        use_all_verbs(opened())
    assert len(proxy.seen) == len(bucket.asked)
    assert all(target.startswith(f"{endpoint}/bucket") for _, target, _ in proxy.seen)
    assert {told for *_, told in proxy.seen} == {"Basic " + base64.b64encode(b"user:s3cr3t").decode()}
    assert all("proxy-authorization" not in asked.headers for asked in bucket.asked)


def test_a_proxy_sees_nothing_of_https(monkeypatch: pytest.MonkeyPatch, authority: tuple[Path, Path]):
    keys(monkeypatch)
    bucket, proxy = Bucket(), Proxy()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority[1]))
    with bucket_at(monkeypatch, bucket, tls(authority[0])) as endpoint, served(proxy.handler()) as port:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        use_all_verbs(opened())
    assert [method for method, *_ in proxy.seen] == ["CONNECT"]
    assert proxy.seen[0][1] == endpoint.removeprefix("https://")
    assert all(asked.target.startswith("/bucket") for asked in bucket.asked)


def test_no_proxy_is_asked_for_what_no_proxy_names(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    proxy = Proxy()
    with bucket_at(monkeypatch, Bucket()), served(proxy.handler()) as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
        use_all_verbs(opened())
    assert proxy.seen == []


def test_a_proxy_that_is_away_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", "http://user:s3cr3t@127.0.0.1:1")
    with bucket_at(monkeypatch, Bucket()), pytest.raises(Unavailable, match="proxy") as caught:
        opened().read("a")
    assert "s3cr3t" not in str(caught.value)


# ---- bodies


def as_header(checksum: int, size: int) -> str:
    return base64.b64encode(checksum.to_bytes(size, "big")).decode()


CHECKSUMS: dict[str, Callable[[bytes], str]] = {
    "x-amz-checksum-crc64nvme": lambda body: as_header(anycrc.Model("CRC64-NVME").calc(body), 8),
    "x-amz-checksum-crc32c": lambda body: as_header(anycrc.Model("CRC32-ISCSI").calc(body), 4),
    "x-amz-checksum-crc32": lambda body: as_header(crc32(body), 4),
    "x-amz-checksum-sha256": lambda body: base64.b64encode(hashlib.sha256(body).digest()).decode(),
}


def test_the_checksums_are_those_of_the_catalogues():
    """Check values for "123456789" of https://reveng.sourceforge.io/crc-catalogue (CRC-64/NVME, CRC-32/ISCSI)."""
    assert anycrc.Model("CRC64-NVME").calc(b"123456789") == 0xAE8B14860A799888
    assert anycrc.Model("CRC32-ISCSI").calc(b"123456789") == 0xE3069283


@pytest.mark.parametrize("header", [*CHECKSUMS])
def test_an_encrypted_object_with_a_checksum_is_read_once(monkeypatch: pytest.MonkeyPatch, header: str):
    """SSE-KMS: the etag looks like an MD5 of the bytes, and is none."""
    keys(monkeypatch)
    bucket = Bucket(etag=lambda body: hashlib.md5(b"key" + body).hexdigest())
    bucket.checksums = lambda body: {header: CHECKSUMS[header](body)}
    with bucket_at(monkeypatch, bucket):
        store = opened()
        store.write("a", b"data")
        assert store.read("a") == b"data"
    assert [asked.method for asked in bucket.asked] == ["PUT", "GET"]


@pytest.mark.parametrize("header", [*CHECKSUMS])
def test_a_body_that_has_another_checksum_is_no_answer(monkeypatch: pytest.MonkeyPatch, header: str):
    keys(monkeypatch)
    bucket = Bucket(objects={"place/a": b"data"}, etag=lambda _: "0" * 32 + "-2")
    vouched_for = [b"other", b"data"]
    bucket.checksums = lambda body: {header: CHECKSUMS[header](vouched_for.pop(0))}
    with bucket_at(monkeypatch, bucket):
        store = opened()
        store.retry_seconds = 20
        assert store.read("a") == b"data"
    assert [asked.method for asked in bucket.asked] == ["GET", "GET"]


def test_a_checksum_of_parts_is_none_of_the_body(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    bucket = Bucket(objects={"place/a": b"data"}, etag=lambda _: "0" * 32 + "-2")
    bucket.checksums = lambda body: {"x-amz-checksum-crc32": f"{as_header(1, 4)}-2"}
    with bucket_at(monkeypatch, bucket):
        assert opened().read("a") == b"data"


def test_checksums_may_be_switched_off_for_servers_that_refuse_them(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    bucket = Bucket()
    with bucket_at(monkeypatch, bucket):
        use_all_verbs(opened())
    assert not [name for asked in bucket.asked for name in asked.headers if "checksum" in name]


# ---- connections


def test_threads_share_connections_and_none_is_opened_twice(monkeypatch: pytest.MonkeyPatch):
    """The server answers four requests at once, or none: so many connections are needed, and no more."""
    keys(monkeypatch)
    bucket, four = Bucket(objects={"place/a": b"data"}), threading.Barrier(4)

    def answered_together(body: bytes) -> dict[str, str]:
        four.wait(60)
        return {}

    bucket.checksums = answered_together
    with bucket_at(monkeypatch, bucket):
        store = opened()
        assert concurrently(store.read, ["a"] * 40, 4) == [b"data"] * 40
    assert len(bucket.asked) == 40
    assert len({asked.connection for asked in bucket.asked}) == 4


def test_a_client_is_made_once_for_all_threads(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    variables = frozenset({("AWS_TEST", "once")})
    with ThreadPoolExecutor(8) as pool:
        assert len({id(session) for session in pool.map(session_of, [variables] * 8)}) == 1


def test_a_child_of_a_fork_takes_no_connection_of_its_parent(monkeypatch: pytest.MonkeyPatch):
    """Not even with a store of the parent's: an answer to one would reach the other."""
    keys(monkeypatch)
    bucket = Bucket(objects={"place/a": b"data"})
    code = """
import os
from tidemill.storage.s3 import S3Store
store = S3Store("bucket", "place")
assert store.read("a") == b"data"
child = os.fork()
if not child:
    os._exit(store.read("a") != b"data")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert store.read("a") == b"data"
"""
    with bucket_at(monkeypatch, bucket):
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
    of_parent, of_child, again = (asked.connection for asked in bucket.asked)
    assert of_parent == again
    assert of_child != of_parent


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("verb", [lambda s: s.read("a"), lambda s: s.write("a", b"x" * 9_000_000)])
def test_a_signal_interrupts_at_once(monkeypatch: pytest.MonkeyPatch, verb: Callable[[S3Store], object]):
    keys(monkeypatch)

    def interrupt(*_: object) -> None:
        raise Interrupted

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = opened()
        sent: list[float] = []

        def send() -> None:
            with silent.accept()[0] as connection:
                connection.recv(1)
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGUSR1)
                ended.wait(60)

        ended = threading.Event()
        sender = threading.Thread(target=send)
        old = signal.signal(signal.SIGUSR1, interrupt)
        try:
            sender.start()
            with pytest.raises(Interrupted):
                verb(store)
            took = time.monotonic() - sent[0]
        finally:
            ended.set()
            sender.join()
            signal.signal(signal.SIGUSR1, old)
        assert took < 3


def test_a_large_body_may_take_longer_than_a_connection(monkeypatch: pytest.MonkeyPatch):
    keys(monkeypatch)
    monkeypatch.setattr(s3_session, "CONNECT_SECONDS", 0.2)
    late = threading.Event()

    class Slow(Handler):
        def answer(self) -> None:
            late.wait(0.6)  # three times as long as connecting may take
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(200, ETag='"etag"')

        do_PUT = answer

    with served(Slow) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
        store = opened()
        store.retry_seconds = 0
        assert store.write("a", b"x" * 30_000_000).etag == "etag"


# ---- the other way


class ThroughS3fs(S3Store):
    """Asks all of s3fs's client, as for buckets with another signer."""

    def _asked(self, method: str, params: dict[str, object]) -> dict[str, object]:
        return s3_others.ask(self._aws_variables, method, params, 30, anonymous=False)


def test_both_clients_tell_the_same(s3_server: S3, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    place = f"both-{os.getpid()}-{time.time_ns()}"
    ours, theirs = S3Store(BUCKET, place), ThroughS3fs(BUCKET, place)
    for number, key in enumerate(["a", "b/c d+e", "ä%2F", "plus+", "f'(1)*=&~", "\x01control", "\u3000space "]):
        one, other = (store.write(f"{name}/{key}", key.encode()) for store, name in ((ours, "1"), (theirs, "2")))
        assert one.etag == other.etag, number
    assert sorted(map(repr, ours.list())) == sorted(map(repr, theirs.list()))
    assert len([*ours.list()]) == 14
    for info in ours.list():
        assert ours.stat(info.key) == theirs.stat(info.key)
        assert ours.read(info.key, if_match=info.etag) == theirs.read(info.key, if_match=info.etag)
        assert ours.read(info.key, start=0, length=1) == theirs.read(info.key, start=0, length=1)
    for store in (ours, theirs):
        for key in ("missing", "1/a"):
            with pytest.raises(StorageError) as caught:
                store.replace(key, b"", if_match="0" * 32)
            assert key in str(caught.value)
