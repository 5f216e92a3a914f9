"""The dataset of a batch training, as a rank of the crew reads it."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tidemill.storage.dataset import Snapshot, pinned
from tidemill.storage.records import DatasetRef
from tidemill.storage.store import ObjectInfo
from tidemill.tasks.search import Progress, Search
from tidemill.tasks.training.groups import RowGroup, Split, Subset
from tidemill.tasks.training.kept import Kept
from tidemill.tasks.training.learner import Learner


class Rows:
    """The files that the leader has found, and what a search makes of them."""

    def __init__(self, about: dict[str, Any]) -> None:
        """`about` is that of a `ReadByAll`."""
        self._about = about
        share = about["holdout_share"]
        self._split = Split(share, side="train") if share else None
        self._dataset: Snapshot | None = None
        self._search: Search | None = None

    def of_pass(
        self, learner: Learner, progress: dict[str, Any] | None
    ) -> tuple[Sequence[RowGroup] | Kept, Subset | None]:
        """The rows that the leader passes over, and which of them it trains on; `progress`: where its search stands, if any.

        The first call reads all footers; with a search, each of its phases may take a pass over the dataset.

        Raises:
            DatasetChanged, DatasetError: the files are not what the leader has read.
            ColumnError: as `Search.data`.
        """
        if self._dataset is None:
            files = [
                ObjectInfo(key, size, etag, datetime.fromisoformat(modified), lasting)
                for key, size, etag, modified, lasting in self._about["files"]
            ]
            self._dataset = pinned(DatasetRef.model_validate(self._about["ref"]), self._about["folder"], files)
        groups = self._dataset.row_groups
        if progress is None:
            return groups, self._split
        if self._search is None:
            self._search = Search(groups, self._split, learner.spec, learner.features)
        self._search.progress = Progress.model_validate(progress)
        data = self._search.data()
        return data.train, data.train_rows
