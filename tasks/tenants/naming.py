"""Whose turn it is, in log lines: the rooms of an online run do not know that there are others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_speaking_of: ContextVar[str] = ContextVar("tidemill_tenant", default="")


@contextmanager
def speaking_of(name: str) -> Iterator[None]:
    """While the context is open, what this thread does, it does for the tenant of this name."""
    token = _speaking_of.set(name)
    try:
        yield
    finally:
        _speaking_of.reset(token)


@contextmanager
def named_in_logs() -> Iterator[None]:
    """While the context is open, each log line of ours begins with the name of the tenant that it is about, in all threads.

    The factory of records is where `logging` lets a program add to all of them, whichever handlers there are.
    """
    before = logging.getLogRecordFactory()

    def named(*arguments: Any, **more: Any) -> logging.LogRecord:
        record = before(*arguments, **more)
        if (name := _speaking_of.get()) and record.name.partition(".")[0] == "tidemill":
            record.msg = f"{name}: {record.msg}"  # a name has no % (`Pair`)
        return record

    logging.setLogRecordFactory(named)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
