"""Packages that only a part of Tidemill needs: those of the extras of pyproject.toml."""

from collections.abc import Iterator
from contextlib import contextmanager

from tidemill.storage.errors import StorageError


class MissingExtra(StorageError):
    """Packages that only a part of Tidemill needs are not installed."""


@contextmanager
def of_extra(extra: str, what: str) -> Iterator[None]:
    """For the imports of packages that an extra of pyproject.toml names. `what` needs them, in words.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{what} needs the package {error.name!r}, which is not installed: pip install 'tidemill[{extra}]'"
        ) from error
