"""Errors of whole runs. Nothing is imported here: the command line catches them, and must not wait for torch."""


class GateClosed(Exception):
    """Versions were refused again and again, and the settings say that a person must decide."""
