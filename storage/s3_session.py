"""What botocore decides for requests to S3: a bucket's address, credentials, the signer, certificates, proxies.

Its client is asked once for each bucket how a request would look, and sends nothing: its rules, hooks and parsers cost five
times as much as a request without them. So every variable and profile means here what it means to botocore.
"""

import os
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.client import BaseClient
from botocore.exceptions import CredentialRetrievalError
from botocore.httpsession import ProxyConfiguration, create_urllib3_context, get_cert_path
from botocore.utils import get_environ_proxies
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ReadTimeoutError

from tidemill.storage.pieces import Pieces
from tidemill.storage.remote import Transient

CONNECT_SECONDS: Final = 5.0
SLOWEST_UPLOAD: Final = 128 * 1024
"""Bytes a second; slower than that is taken for a stall."""
STALL_SECONDS: Final = 30.0
_CONNECTIONS: Final = 32
"""Kept open for each address; more than that are closed after their request."""
CHECKSUM: Final = "x-amz-checksum-crc32"
"""Header of the checksum that is sent with each body."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where the requests of one bucket go, and for whom they are signed."""

    url: str
    """Of the bucket, without a slash at its end: `https://bucket.s3.eu-west-1.amazonaws.com`, `http://host:9000/bucket`."""
    region: str
    service: str
    pool: HTTPConnectionPool
    target: str
    """What the first line of a request names for `url`: its path, or all of it to a proxy that reads requests."""
    root: str
    """What follows `url` in a request for the bucket itself: nothing, or a slash where the host's name is all of it."""


class Session:
    """One process's way to the stores that one set of AWS variables names. Threads share it."""

    def __init__(self) -> None:
        self._botocore = botocore.session.get_session()
        if region := aws_region():
            self._botocore.set_config_variable("region", region)
        self._lock = threading.RLock()
        self._deciders: dict[str | None, BaseClient] = {}
        self._addresses: dict[str, Address | None] = {}
        config = self._decider(None).meta.config
        self.sends_checksums = config.request_checksum_calculation != "when_required"
        self.asks_checksums = config.response_checksum_validation != "when_required"
        self._config = config
        self._found: list[Any] = []
        self._managers: dict[str | None, PoolManager] = {}

    @property
    def endpoint(self) -> str:
        """For messages: without whatever secrets stand before an @."""
        url = urlsplit(self._decider(None).meta.endpoint_url)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"

    @property
    def anonymous(self) -> bool:
        """No credentials are to be found: requests are not signed, which is enough for a public bucket."""
        return self._credentials() is None

    def address(self, bucket: str) -> Address | None:
        """None if requests to this bucket need another signer, as those to directory buckets (S3 Express) do."""
        if bucket not in self._addresses:
            self.move(bucket, None)
        return self._addresses[bucket]

    def move(self, bucket: str, region: str | None) -> Address | None:
        """From now on the bucket's address is that in this region; None: where botocore looks for it."""
        with self._lock:
            decided = self._decided(bucket, region)
            found = None
            if decided.signer == "s3v4":
                url = urlsplit(decided.url)
                host = url.netloc.rpartition("@")[2]  # a name and password would mean nothing to S3
                path = url.path.rstrip("/")
                base = f"{url.scheme}://{host}{path}"
                pool, forwarded = self._pool(base)
                target, root = base if forwarded else path, "" if path else "/"
                found = Address(base, decided.region, decided.service, pool, target, root)
            self._addresses[bucket] = found
        return found

    def send(
        self,
        address: Address,
        verb: str,
        resource: str,
        headers: dict[str, str],
        body: bytes | Pieces | None = None,
        stall_seconds: float = STALL_SECONDS,
    ) -> BaseHTTPResponse:
        """One request for `resource`, which is what follows the bucket's URL, and its answer with all of its body.

        Raises:
            FAILURES, Transient: see `s3_errors`.
        """
        seconds = sending_seconds(body or b"", stall_seconds)
        try:
            return address.pool.urlopen(
                verb,
                address.target + resource,
                body,  # type: ignore[arg-type]  # its buffers are sent as they are
                self._signed(address, verb, resource, headers, body),
                retries=False,  # S3Store retries; layers would multiply
                redirect=False,
                assert_same_host=False,
                timeout=Timeout(connect=CONNECT_SECONDS, read=seconds),
                decode_content=False,
            )
        except ReadTimeoutError as error:
            raise Transient(f"no answer within {seconds:.0f} s") from error

    def _signed(
        self, address: Address, verb: str, resource: str, headers: dict[str, str], body: bytes | Pieces | None
    ) -> dict[str, str]:
        """The headers of a request, signed by the credentials as they are now: those that expire are renewed here."""
        signed = {"host": urlsplit(address.url).netloc, **headers}
        if isinstance(body, Pieces):
            signed["content-length"] = str(len(body))  # or urllib3 would send it in chunks, which S3 does not take
        credentials = self._credentials()
        if credentials is not None:
            # Over https a body that has a checksum is not hashed a second time
            context = {
                "client_config": self._config,
                "checksum": {"request_algorithm": {"in": "header", "name": CHECKSUM}},
                "has_streaming_input": body is not None,
            }
            try:
                frozen = credentials.get_frozen_credentials()
            except RuntimeError as error:  # so botocore says that those it got have expired too
                raise CredentialRetrievalError(provider=credentials.method, error_msg=str(error)) from error
            signer = _Signer(frozen, address.service, address.region)
            signer.add_auth(_Request(verb, f"{address.url}{resource}", signed, body, context))
        return signed

    def _credentials(self) -> Any:
        """Whatever botocore finds first, looked for once; None: nothing."""
        if not self._found:
            with self._lock:
                if not self._found:
                    self._found.append(self._botocore.get_credentials())
        return self._found[0]

    def _decider(self, region: str | None) -> BaseClient:
        """botocore's client for a region; None: that of the variables and profile."""
        with self._lock:
            if region not in self._deciders:
                nobody = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nobody"}  # else they are looked for
                client = self._botocore.create_client("s3", region_name=region, **nobody)
                client.meta.events.register_first("before-sign.s3.ListObjectsV2", _tell)
                self._deciders[region] = client
            return self._deciders[region]

    def _decided(self, bucket: str, region: str | None) -> "_Decided":
        try:
            self._decider(region).list_objects_v2(Bucket=bucket)
        except _Decided as decided:
            return decided
        raise AssertionError("botocore sent a request that it was to tell of")

    def _pool(self, url: str) -> tuple[HTTPConnectionPool, bool]:
        """The connections to this URL, and whether a proxy reads requests on them (through others it sees only TLS)."""
        proxies = ProxyConfiguration(get_environ_proxies(url))
        proxy = proxies.proxy_url_for(url)
        if proxy not in self._managers:
            verify = self._botocore.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", True)
            context = create_urllib3_context()
            context.check_hostname = True
            context.load_verify_locations(get_cert_path(verify))
            settings: dict[str, Any] = {"maxsize": _CONNECTIONS, "ssl_context": context}
            self._managers[proxy] = (
                PoolManager(**settings)
                if proxy is None
                else ProxyManager(
                    proxy, proxy_headers=proxies.proxy_headers_for(proxy), proxy_ssl_context=context, **settings
                )
            )
            self._managers[proxy].pool_classes_by_scheme = {"http": _Pool, "https": _PoolOfTLS}
        to = urlsplit(url)
        pool = self._managers[proxy].connection_from_host(to.hostname, to.port, to.scheme)
        return pool, proxy is not None and to.scheme == "http"


class _Decided(Exception):
    """Carries what botocore would have sent out of its client."""

    def __init__(self, url: str, region: str, service: str, signer: str) -> None:
        self.url, self.region, self.service, self.signer = url, region, service, signer


def _tell(request: AWSRequest, region_name: str, signing_name: str, signature_version: str, **_: object) -> None:
    signing = request.context.get("signing", {})
    url = request.url.partition("?")[0]
    region, service = signing.get("region") or region_name, signing.get("signing_name") or signing_name
    raise _Decided(url, region, service, signature_version)


@dataclass(slots=True)
class _Request:
    """What botocore's signer reads and writes of an `AWSRequest`, which would copy and convert its headers many times."""

    method: str
    url: str
    headers: dict[str, str]
    body: bytes | Pieces | None
    context: dict[str, Any]
    params: None = None


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Of one request. What is signed is asked for twice, and made once."""

    _made: Any = None

    def headers_to_sign(self, request: _Request) -> Any:
        self._made = self._made or super().headers_to_sign(request)
        return self._made

    def payload(self, request: _Request) -> Any:
        if isinstance(request.body, Pieces) and self._should_sha256_sign_payload(request):
            return request.body.sha256()
        return super().payload(request)


class _HTTP(HTTPConnection):
    """urllib3 gives the sending of a body as long as it gives connecting; a large one takes longer."""

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any) -> None:
        if self.sock is None:
            self.connect()
        self.timeout = sending_seconds(body or b"")
        super().request(method, url, body, headers, **more)


class _HTTPS(HTTPSConnection):
    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **more: Any) -> None:
        self.timeout = sending_seconds(body or b"")  # it is connected before, to see the certificate
        super().request(method, url, body, headers, **more)


class _Pool(HTTPConnectionPool):
    ConnectionCls = _HTTP


class _PoolOfTLS(HTTPSConnectionPool):
    ConnectionCls = _HTTPS


def aws_region() -> str | None:
    """What botocore does not read, and every other AWS client does: comes before `AWS_DEFAULT_REGION` and the profile's."""
    return os.environ.get("AWS_REGION")


def sending_seconds(body: bytes | Pieces, stall_seconds: float = STALL_SECONDS) -> float:
    """How long a request with this body may take to be sent, and then to be answered."""
    return stall_seconds + len(body) / SLOWEST_UPLOAD


_making: Final = threading.Lock()
os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)


@lru_cache(maxsize=8)
def _made(pid: int, aws_variables: frozenset[tuple[str, str]]) -> Session:
    return Session()


def session_of(aws_variables: frozenset[tuple[str, str]]) -> Session:
    """One for each process, as connections do not survive a fork, and each set of AWS variables, which botocore reads itself."""
    with _making:
        return _made(os.getpid(), aws_variables)
