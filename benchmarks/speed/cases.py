"""A register of the ways to do the work."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

Kind = Literal["ours", "limit", "peer"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Case(Generic[F]):
    """One way to do the work; its name and what it is are those of the function."""

    run: F
    kind: Kind
    only: tuple[str, ...]  # the nets that it can train; empty: every one

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def about(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


@dataclass
class Register(Generic[F]):
    """The cases of a suite, in the order in which they are defined."""

    cases: dict[str, Case[F]] = field(default_factory=dict)

    def case(self, kind: Kind, *, only: tuple[str, ...] = ()) -> Callable[[F], F]:
        """Decorator: adds a function as a case."""

        def add(run: F) -> F:
            self.cases[run.__name__] = Case(run, kind, only)
            return run

        return add
