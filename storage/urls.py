"""From a URL to a store, and back: `store.url` opens the same store again."""

import os
import re
from collections.abc import Callable
from typing import Final

from tidemill.storage.errors import InvalidURL
from tidemill.storage.extras import of_extra
from tidemill.storage.local import LocalStore
from tidemill.storage.memory import MemoryStore
from tidemill.storage.store import Store

_KINDS: Final = "use one of ./folder, /folder, file:///folder, s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, memory://name/prefix"

_S3: Final = "write s3://bucket/prefix, and give the server by AWS_ENDPOINT_URL_S3 if it is not that of AWS"
_PATTERN: Final = re.compile(r"[*?[{]")
_AZURE: Final = "write az://container/prefix, and name the account by AZURE_STORAGE_ACCOUNT"
_INSTEAD: Final = {
    **dict.fromkeys(("s3a", "s3n", "minio", "http", "https"), _S3),
    **dict.fromkeys(("azure", "wasb", "wasbs", "adl"), _AZURE),
    "gcs": "write gs://bucket/prefix",
}
_BUCKETS: Final = {"s3": "bucket", "gs": "bucket", "az": "container", "memory": "store"}
"""What the first part of a URL names, by scheme."""
_CREDENTIALS: Final = {
    "s3": "AWS_PROFILE (or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and AWS_ENDPOINT_URL_S3",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or `gcloud auth application-default login`)",
    "az": "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_KEY (or AZURE_STORAGE_CONNECTION_STRING)",
}
_ACCOUNT_HOST: Final = re.compile(r"([a-z0-9]+)\.(dfs|blob)\.core\.windows\.net")


def open_store(url: str) -> Store:
    """The store at `url`; nothing is read or made there yet.

    `./x`, `x/y`, `~/x`, `/x` and `file:///x` are local folders; `s3://bucket/prefix` takes its endpoint, region and
    credentials from the standard AWS variables, `gs://bucket/prefix` from Google's, `az://container/prefix` its account and
    credentials from Azure's (`abfss://container@account.dfs.core.windows.net/prefix` is the same, if that is the account);
    `memory://name/prefix` lives in this process. Nothing is percent-decoded.

    Raises:
        TypeError: it is no text.
        InvalidURL: the scheme is unknown, the URL carries credentials or options, or a relative path has nothing to start from.
        MissingExtra: the packages of `tidemill[gcs]` or `tidemill[azure]` are not installed.
    """
    if not isinstance(url, str):
        raise TypeError(
            f"a place is named by a URL, as text such as './data', not by {type(url).__name__}: of a path give str(path)"
        )
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower() if separator else scheme
    if not url.strip() or "\0" in url:
        raise InvalidURL(f"{_shown(url)} names no store; {_KINDS}")
    if separator and scheme != "file" and url != url.strip():  # a folder may well be called so
        raise InvalidURL(f"{_shown(url)} has white space at an end; remove it ({_KINDS})")
    if not separator:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
            raise InvalidURL(
                f"{_shown(url)} looks like a URL without its //; {_KINDS} (./ before a folder with a colon)"
            )
        return _local(os.path.expanduser(url))
    if scheme == "file":
        path = rest.removeprefix("localhost")
        if not path.startswith("/"):
            raise InvalidURL(f"{_shown(url)} names a host; a file URL has three slashes: file:///folder")
        return _local(path)
    account = ""
    if scheme in ("abfs", "abfss"):
        scheme, rest, account = "az", *_of_hadoop(rest)
    if scheme not in _BUCKETS:
        raise InvalidURL(f"{scheme}:// is not known here; {_INSTEAD.get(scheme, _KINDS)}")
    name, _, prefix = rest.partition("/")
    if rest.startswith("arn:"):
        raise InvalidURL(
            f"{_shown(url)} is the ARN of an access point; give its alias in place of the bucket: s3://alias/prefix"
        )
    if "@" in name or ":" in name:
        # The URL is not repeated here: secrets would end in the logs
        raise InvalidURL(
            f"this {scheme} URL has credentials or a port before the {_BUCKETS[scheme]}; give them by "
            f"{_CREDENTIALS.get(scheme, 'nothing: a store in memory has none')}"
        )
    prefix = prefix.rstrip("/")
    if not name:
        raise InvalidURL(f"{_shown(url)} names no {_BUCKETS[scheme]}; {_KINDS}")
    if "?" in rest or "#" in rest or "\\" in rest or (prefix and {"", ".", ".."} & set(prefix.split("/"))):
        raise InvalidURL(
            f"{_shown(url)} should be {scheme}://name/prefix: no options after ? or #, no backslash, no //, /./ or /../"
        )
    return _opened(scheme, name, prefix, account)


def _opened(scheme: str, name: str, prefix: str, account: str) -> Store:
    """The store of a cloud, or of this process. What it needs is imported here: s3fs alone takes most of a second."""
    if scheme == "memory":
        return MemoryStore(name, prefix)
    if scheme == "gs":
        with of_extra("gcs", "gs://"):
            from tidemill.storage.gcs import GCSStore

        return GCSStore(name, prefix)
    if scheme == "az":
        with of_extra("azure", "az://"):
            from tidemill.storage.azure import AzureStore
            from tidemill.storage.azure_account import account_name

        if account and account != (known := account_name()):
            of_environment = "does not tell the name of its own" if known is None else repr(known)
            raise InvalidURL(
                f"the URL names the account {account!r}, and the environment {of_environment}: all places of a run lie in one "
                "account, which AZURE_STORAGE_ACCOUNT or AZURE_STORAGE_CONNECTION_STRING names"
            )
        return AzureStore(name, prefix)
    from tidemill.storage.s3 import S3Store

    return S3Store(name, prefix)


def _of_hadoop(rest: str) -> tuple[str, str]:
    """(container/prefix, account) of what follows abfs:// or abfss://; no account in fsspec's spelling, abfs://container/prefix.

    Raises:
        InvalidURL: what stands before the first slash is no container, or no container of an account.
    """
    name, slash, prefix = rest.partition("/")
    container, at, host = name.partition("@")
    if not at:
        return rest, ""
    if (known := _ACCOUNT_HOST.fullmatch(host)) is None or ":" in container:
        raise InvalidURL(f"this URL should be abfss://container@account.dfs.core.windows.net/prefix; or {_AZURE}")
    return f"{container}{slash}{prefix}", known[1]


def open_object(url: str, stores: Callable[[str], Store] = open_store) -> tuple[Store, str]:
    """(store, key) of the object at `url`, which may be there or not: a file, or `s3://bucket/prefix/name`.

    Raises:
        InvalidURL: it names a folder or a bucket; or as `open_store`.
    """
    folder, slash, name = url.rpartition("/")
    scheme, separator, rest = folder.partition("://")
    if (
        not name
        or name in (".", "..", "~")
        or (separator and not rest and scheme.lower() != "file")
        or folder.endswith(":/")
    ):
        raise InvalidURL(
            f"{_shown(url)} names no file: give its name too, as in ./folder/name or s3://bucket/prefix/name"
        )
    if not slash:
        return stores("."), name
    return stores(folder if folder and folder.lower() != "file://" else f"{folder}/"), name


def looks_like_a_pattern(url: str) -> bool:
    """Whether a shell would expand the URL. Nothing does so here, and a name may well hold these characters."""
    return _PATTERN.search(url) is not None


def _local(path: str) -> LocalStore:
    try:
        return LocalStore(path)
    except FileNotFoundError as error:
        raise InvalidURL(
            f"{path!r} is relative to the current folder, which is gone: change to one that is there, or give the whole path"
        ) from error


def _shown(url: str) -> str:
    """A URL for a message, without what may be a secret: all before an @, and all after ? or #."""
    hidden = re.split(r"[?#]", url)[0]
    if "@" in hidden:
        hidden = f"...@{hidden.rpartition('@')[2]}"
    return repr(hidden if hidden == url or hidden.startswith("...@") else f"{hidden}...")
