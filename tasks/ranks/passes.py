"""A pass of a batch training by all ranks: each reads the dataset by itself, from the files that the leader has found, and
computes its share of each batch.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import torch

from tidemill.progress import NOBODY, Activity
from tidemill.storage.dataset import Snapshot
from tidemill.storage.errors import StorageError
from tidemill.tasks.errors import RanksDiffer
from tidemill.tasks.ranks.alike import digest
from tidemill.tasks.ranks.ending import end_here
from tidemill.tasks.ranks.group import Group
from tidemill.tasks.ranks.leader import leader
from tidemill.tasks.ranks.messages import gathered
from tidemill.tasks.training import loop
from tidemill.tasks.training.groups import RowGroup, Subset
from tidemill.tasks.training.kept import Kept
from tidemill.tasks.training.loop import PassResult
from tidemill.tasks.training.midway import Keeper, Midway
from tidemill.tasks.training.steps import Steps

R = TypeVar("R")

BLOCKS: Final = 64
"""Steps, or blocks of them, after which the leader may have a pass stored in its middle: to ask costs a message to all."""
HEARD_SECONDS: Final = 5.0
"""A rank that gets its rows ready is heard from this often: they may take longer than ranks wait for each other."""


@dataclass(frozen=True)
class ReadByAll:
    """What all passes of a run take their rows from."""

    dataset: Snapshot
    holdout_share: float
    """Of the rows that are never trained on; 0: none."""

    @property
    def about(self) -> dict[str, Any]:
        """In words that another process can read it by: see `rows.Rows`."""
        return {
            "ref": self.dataset.ref.model_dump(mode="json"),
            "folder": self.dataset.folder,
            "files": [
                [info.key, info.size, info.etag, info.last_modified.isoformat(), info.lasting_etag]
                for info in self.dataset.files
            ],
            "holdout_share": self.holdout_share,
        }


def train_pass(
    read_by_all: ReadByAll | None,
    steps: Steps,
    groups: Sequence[RowGroup] | Kept,
    *,
    key: tuple[str | int, ...],
    split: Subset | None,
    remember: bool,
    labelled: int | None,
    activity: Activity = NOBODY,
    start: Midway | None = None,
    keeper: Keeper | None = None,
    search: Mapping[str, Any] | None = None,
) -> PassResult:
    """As `loop.train_pass`, by all ranks together if there are several; then all of them compare what they hold.

    Args:
        read_by_all: What the rows are from; None: no run that several ranks can make.
        steps: Of the learner that is trained.
        groups: The rows themselves, as this process has them.
        key: As there; so are `split`, `remember`, `labelled`, `activity`, `start` and `keeper`.
        search: Where a search stands (`Progress`), which says which rows they are; None: all on our side of the split.

    A rank that finds the store away ends, and with it all others, since they wait for its share of a batch.

    Raises:
        RanksDiffer: a rank has come to other bits.
        TrainingError: as `loop.train_pass`, on all ranks.
    """

    leads = leader()
    if leads is not None and read_by_all is not None:
        keeper = AlikeKeeper(leads.group, steps, keeper)

    def train() -> PassResult:
        return loop.train_pass(
            steps,
            groups,
            key=key,
            split=split,
            remember=remember,
            labelled=labelled,
            activity=activity,
            start=start,
            keeper=keeper,
        )

    if leads is None or read_by_all is None:
        return train()
    if leads.dataset is not read_by_all:
        with leads.ordered("dataset", read_by_all.about):
            leads.dataset = read_by_all
    about = {
        "counters": asdict(steps.learner.counters),
        "key": key,
        "remember": remember,
        "labelled": labelled,
        "start": None if start is None else start.model_dump(mode="json"),
        "search": search,
    }

    def with_all() -> PassResult:
        awaited(leads.group, lambda: None)
        return read_or_end(train)

    result = leads.train(steps, "pass", about, with_all)
    leads.agree(steps)
    return result


class AlikeKeeper:
    """The leader's keeper on all ranks: they compare what they hold before it stores a pass in its middle."""

    def __init__(self, group: Group, steps: Steps, keeper: Keeper | None) -> None:
        """`keeper`: of the leader; None: this is another rank."""
        self._group, self._steps, self._keeper, self._asked = group, steps, keeper, 0

    def due(self, rows: int) -> bool:
        """As `Keeper.due`: the leader says whether it is time.

        Raises:
            RanksDiffer: on all ranks.
        """
        self._asked += 1
        if self._asked % BLOCKS:
            return False
        due = torch.tensor([int(self._keeper is not None and self._keeper.due(rows))])
        self._group.broadcast_(due)
        if not due:
            return False
        if len(set(gathered(self._group, digest(self._steps.learner)))) > 1:
            raise RanksDiffer(
                "ranks have other weights or states after the same rows: all go back to what was stored last"
            )
        return self._keeper is not None

    def keep(self, midway: Midway) -> None:
        """As `Keeper.keep`."""
        assert self._keeper is not None, "it is due for the leader alone"
        self._keeper.keep(midway)


def read_or_end(read: Callable[[], R]) -> R:
    """What `read` returns. Where the dataset cannot be read, this rank ends: the others wait for it."""
    try:
        return read()
    except StorageError as error:
        end_here(f"it cannot go on reading the dataset: {error}")


def awaited(group: Group, ready: Callable[[], R]) -> R:
    """What `ready` returns, once it has returned on all ranks, which hear from each other meanwhile however long it takes.

    A rank on which it raises ends, as the others wait for it.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(ready)
        while True:
            wait([coming], HEARD_SECONDS)
            if coming.done() and (error := coming.exception()) is not None:
                end_here(f"it cannot take part in a pass over the dataset: {error}")
            done = torch.tensor([int(coming.done())])
            group.sum_(done)
            if int(done) == group.size:
                return coming.result()
