"""The account of Azure Blob Storage that the environment names, and clients of its containers."""

import os
import re
from functools import lru_cache
from typing import Any, Final

from azure.storage.blob import BlobServiceClient, ContainerClient

from tidemill.storage.errors import InvalidURL

_CONNECT_SECONDS: Final = 5
_STALL_SECONDS: Final = 30
"""How long a connection may be silent."""
_LARGEST_PUT: Final = 5000 * 2**20
"""Bytes of one request, by the service's limit."""
_VARIABLES: Final = {
    "name": ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME"),
    "key": ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY"),
    "sas": ("AZURE_STORAGE_SAS_TOKEN",),
    "connection": ("AZURE_STORAGE_CONNECTION_STRING",),
}
"""Of each setting the variables that Azure's tools read: the command line, and fsspec."""

_OF_SERVICE: Final = re.compile(r"https?://([a-z0-9]+)\.blob\.")

Account = frozenset[tuple[str, str]]
"""The settings of `_VARIABLES` that are set."""


def account() -> Account:
    """What the environment says of the account.

    Raises:
        InvalidURL: it names none.
    """
    found = frozenset(
        (setting, next(os.environ[name] for name in names if os.environ.get(name)))
        for setting, names in _VARIABLES.items()
        if any(os.environ.get(name) for name in names)
    )
    if not {"name", "connection"} & dict(found).keys():
        raise InvalidURL(
            "an az:// URL names a container, and the environment its account: set AZURE_STORAGE_ACCOUNT (with AZURE_STORAGE_KEY, "
            "AZURE_STORAGE_SAS_TOKEN, or an identity that azure-identity finds), or AZURE_STORAGE_CONNECTION_STRING"
        )
    return found


def account_name() -> str | None:
    """The name of the account, if the environment tells it."""
    settings = dict(account())
    if "connection" not in settings:
        return settings["name"]
    parts = {
        name.strip().lower(): value
        for name, _, value in (part.partition("=") for part in settings["connection"].split(";"))
    }
    of_service = _OF_SERVICE.match(parts.get("blobendpoint", ""))  # which alone tells it beside a SAS
    return parts.get("accountname") or (of_service[1] if of_service else None)


def of_container(account: Account, container: str) -> ContainerClient:
    """The client of a container: one for each process, as connections do not survive a fork."""
    return _container(os.getpid(), account, container)


@lru_cache(maxsize=32)
def _container(pid: int, account: Account, container: str) -> ContainerClient:
    return _client(pid, account).get_container_client(container)


@lru_cache(maxsize=8)
def _client(pid: int, account: Account) -> BlobServiceClient:
    settings = dict(account)
    options: dict[str, Any] = {
        "retry_total": 0,  # AzureStore retries; layers would multiply
        "connection_timeout": _CONNECT_SECONDS,
        "read_timeout": _STALL_SECONDS,
        "max_single_put_size": _LARGEST_PUT,
        "max_single_get_size": 2**40,  # all of a blob by one request: what is read is of one write
    }
    if connection := settings.get("connection"):
        return BlobServiceClient.from_connection_string(connection, **options)
    credential: Any = settings.get("key") or settings.get("sas")
    if credential is None:
        from azure.identity import DefaultAzureCredential  # here: it takes long to import

        credential = DefaultAzureCredential()
    return BlobServiceClient(f"https://{settings['name']}.blob.core.windows.net", credential, **options)
