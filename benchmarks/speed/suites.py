"""The suites whose measurements are cases of a register: what is measured, on which work, and what the rest is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Final

from benchmarks.speed.cases import Case, Register
from benchmarks.speed.loader import LOADERS
from benchmarks.speed.measure import consumed
from benchmarks.speed.training import TRAINERS
from benchmarks.speed.work import Net, Work


@dataclass(frozen=True)
class Setup:
    """What the cases of one table have in common."""

    width: str  # of the dataset: narrow or wide
    batch: int
    threads: int = 1
    net: Net | None = None  # None: nothing is trained


@dataclass(frozen=True)
class Suite:
    """Cases, and the setups in which they are measured."""

    name: str
    register: Register[Any]
    modules: tuple[str, ...]  # define the cases, in this order
    setups: tuple[Setup, ...]
    references: tuple[str, ...]  # limits; the fastest of them is what ratios are to
    measure: Callable[[str, Work, float], dict[str, Any]]

    @cached_property
    def cases(self) -> dict[str, Case[Any]]:
        for module in self.modules:
            import_module(f"benchmarks.speed.{self.name}.{module}")
        order = ("ours", "limit", "peer")  # whatever was imported first
        return dict(sorted(self.register.cases.items(), key=lambda item: order.index(item[1].kind)))


def load(case: str, work: Work, began: float) -> dict[str, Any]:
    """A case of the loader suite. Every one must hand out all rows of the dataset in each pass."""
    result = consumed(SUITES["loader"].cases[case].run(work), work.seconds, began)
    if result["whole_passes"] and result["rows"] % work.rows:
        raise ValueError(f"{case} handed out {result['rows']} rows in whole passes over {work.rows}")
    return result


def train(case: str, work: Work, began: float) -> dict[str, Any]:
    """A case of the training suite."""
    result: dict[str, Any] = SUITES["training"].cases[case].run(work, began)
    return result


SUITES: Final = {
    suite.name: suite
    for suite in (
        Suite(
            "loader",
            LOADERS,
            ("ours", "limits", "peers"),
            tuple(Setup(width, batch) for width in ("narrow", "wide") for batch in (64, 1024)),
            (
                "streaming",
            ),  # as it is written by hand; `streaming_scattered` is what was found while ours was made faster
            load,
        ),
        Suite(
            "training",
            TRAINERS,
            ("ours", "limits", "peers"),
            (
                *(Setup("narrow", batch, 1, net) for net in ("net", "mlp", "linear") for batch in (64, 1024)),
                Setup("narrow", 1024, 2, "mlp"),
            ),
            ("eager_in_memory", "eager_in_memory_fused"),
            train,
        ),
    )
}
