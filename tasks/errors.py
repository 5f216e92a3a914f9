"""Errors of whole runs. Nothing slow is imported here: the command line catches them, and must not wait for torch."""

from tidemill.storage.extras import MissingExtra, of_extra

__all__ = [
    "CannotExport",
    "CannotPublish",
    "CannotServe",
    "GateClosed",
    "MissingExtra",
    "RanksDiffer",
    "RanksRefused",
    "of_extra",
]


class GateClosed(Exception):
    """Versions were refused again and again, and the settings say that a person must decide."""


class CannotExport(Exception):
    """A version cannot be written in a format of others: it cannot be translated, or what came of it predicts otherwise."""


class CannotPublish(Exception):
    """MLflow refuses what it is told, cannot be reached, or has another model of the same name."""


class RanksRefused(Exception):
    """Processes cannot train together in the way in which they were started."""


class RanksDiffer(Exception):
    """One of the processes that train together holds other bits than the rest. Nothing was committed."""


class CannotServe(Exception):
    """A server cannot start: it cannot listen where it was told to, or its token is empty."""
