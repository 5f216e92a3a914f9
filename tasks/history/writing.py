"""A page as a file, whole or not at all."""

import os
from pathlib import Path

from tidemill.storage.errors import StorageError
from tidemill.storage.files import temporary_file


def check_place(path: Path) -> None:
    """Find out whether a file can be written there, before anything slow begins.

    Raises:
        StorageError: it cannot.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise StorageError(f"{path} is a folder: name a file, such as {path / 'report.html'}")
    if not folder.is_dir():
        raise StorageError(f"{folder} is no folder: make it first, or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{folder} may not be written to: name a file in another folder")


def write(path: Path, page: str) -> int:
    """Write a page, in place of what was there. Whoever reads the file meanwhile sees the old one or the new one.

    Returns:
        Its size in bytes.

    Raises:
        StorageError: it cannot be written.
    """
    data = page.encode()
    whole = path.absolute()
    try:
        with temporary_file(str(whole.parent), data) as (temporary, _):
            os.replace(temporary, whole)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    return len(data)
