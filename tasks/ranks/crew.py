"""Every rank but the first: it holds the like of the leader's learner, and trains as it is told until it is told to stop.

It writes to no store, scores nothing and commits nothing, and needs no Prefect. Online it reads none either, and needs no
credentials; of a batch training it reads the dataset.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Final

import pyarrow as pa

from tidemill.tasks.ranks import launched
from tidemill.tasks.ranks.alike import digest, together
from tidemill.tasks.ranks.ending import end_here
from tidemill.tasks.ranks.group import Group
from tidemill.tasks.ranks.joining import joined
from tidemill.tasks.ranks.messages import Order, farewell, gathered, receive
from tidemill.tasks.ranks.passes import AlikeKeeper, awaited, read_or_end
from tidemill.tasks.ranks.rows import Rows
from tidemill.tasks.training.groups import TableGroup
from tidemill.tasks.training.learner import Counters, Learner
from tidemill.tasks.training.loop import PassResult, train_pass, train_shard
from tidemill.tasks.training.midway import Midway
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps


def serve(place: launched.Place) -> None:
    """Do what the leader says, until it says that this is the end.

    Signals are for the leader, which then stops after the step in hand, and says so.

    Raises:
        Exception: this rank cannot do what the leader asks of it. The launcher then ends or restarts all of them.
    """
    group = joined(place, launched.timeout_seconds())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow_orders(Crew(group))


def follow_orders(crew: "Crew") -> None:
    """The same for a group that is there already."""
    while (order := receive(crew.group)).name != "stop":
        crew.obey(order)
    farewell(crew.group)


class Crew:
    """One rank of the crew, and what it holds."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._steps: Steps | None = None
        """Of the like of the leader's learner; None: the leader sends one before it is needed."""
        self._rows: Rows | None = None
        """Of a batch training."""

    def obey(self, order: Order) -> None:
        """Carry out an order that is not the last one."""
        if (obeyed := ORDERS.get(order.name)) is None:
            end_here(f"the leader gave an order that this rank does not know: {order.name[:40]!r}")
        obeyed(self, order)

    def ping(self, order: Order) -> None:
        """The leader lives."""

    def load(self, order: Order) -> None:
        """Hold this learner."""
        folder = order.about["folder"]
        if folder not in sys.path and os.path.isdir(folder):
            sys.path.append(folder)  # where the leader finds modules of the user's
        weights, state = (bytes(part) for part in order.parts)
        spec = Spec.model_validate(order.about["spec"])
        learner = Learner.load(spec, weights, state, order.about["device"])
        self._steps = Steps(learner, order.about["expected"], group=self.group)

    def shard(self, order: Order) -> None:
        """Train on the rows that follow, as all ranks do."""
        about, steps = order.about, self.held
        groups = []
        for name in about["groups"]:
            table = pa.ipc.open_stream(pa.py_buffer(receive(self.group).parts[0])).read_all()
            groups.append(TableGroup(name, table))
        steps.learner.counters.shards = about["ordinal"]
        self.train(lambda: train_shard(steps, groups, about["passes"], labelled=about["labelled"]))

    def dataset(self, order: Order) -> None:
        """Be ready to read this dataset."""
        self._rows = Rows(order.about)

    def one_pass(self, order: Order) -> None:
        """Train on the rows of the dataset, as all ranks do."""
        rows, steps, about = self._rows, self.held, order.about
        if rows is None:
            end_here(
                "the leader has this rank read a dataset before it has named one: the ranks are not at the same place"
            )
        steps.learner.counters = Counters(**about["counters"])  # the leader has counted the epoch before
        start = None if about["start"] is None else Midway.model_validate(about["start"])

        def train() -> PassResult:
            groups, split = awaited(self.group, lambda: rows.of_pass(steps.learner, about["search"]))
            return read_or_end(
                lambda: train_pass(
                    steps,
                    groups,
                    key=tuple(about["key"]),
                    split=split,
                    remember=about["remember"],
                    labelled=about["labelled"],
                    start=start,
                    keeper=AlikeKeeper(self.group, steps, None),
                )
            )

        self.train(train)

    def train(self, train: Callable[[], object]) -> None:
        """Train as all ranks do. What has failed on all of them, the leader deals with."""
        if isinstance(together(self.group, train), Exception):
            self._steps = None  # half trained; the leader goes back too

    def agree(self, order: Order) -> None:
        """Tell which bits this rank holds."""
        learner = self.held.learner
        learner.counters = Counters(**order.about["counters"])  # the leader counts shards without labels too
        digests = gathered(self.group, digest(learner))
        if len(set(digests)) > 1:
            self._steps = None

    @property
    def held(self) -> Steps:
        """What the leader has had this rank load."""
        if self._steps is None:
            end_here("the leader has this rank train before it has sent a learner: the ranks are not at the same place")
        return self._steps


ORDERS: Final[Mapping[str, Callable[[Crew, Order], None]]] = {
    "ping": Crew.ping,
    "load": Crew.load,
    "shard": Crew.shard,
    "dataset": Crew.dataset,
    "pass": Crew.one_pass,
    "agree": Crew.agree,
}
