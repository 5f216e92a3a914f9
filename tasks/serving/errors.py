"""What a server answers where it does not predict."""


class Refused(Exception):
    """A request that gets another status than 200, with the reason."""

    def __init__(self, status: int, reason: str, *, row: int | None = None, column: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.row, self.column = status, reason, row, column
