"""Tidemill's learners, in process: the same features, loop and scores as its batch and online runs, without storage."""

import math
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch

from benchmarks.learning.protocol import Settings
from benchmarks.learning.streams import Stream, Y
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import TableGroup
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, train_pass, train_shard
from tidemill.tasks.training.spec import Column, Model, ReplayMemory, Spec
from tidemill.tasks.training.steps import Steps

GROUP_ROWS: Final = 4096
BUCKETS: Final = 4096  # hardly any two values share one (of 102 destinations, two do): the others get one-hot columns
RETRAININGS: Final = 3  # in a stream
# Over each shard. Two learn more from a moving stream than one (docs/log.md); the linear learner takes one, as River does.
PASSES: Final = {"mlp": 2, "linear": 1}
BATCH_SIZE: Final = {"mlp": 32, "linear": 1}  # River's and scikit-learn's linear learners step row by row too
# A rate chosen on a calm batch part diverges when the inputs leave their range. Linear learners step without, as the others': of
# single rows almost every gradient would be clipped.
CLIP_NORM: Final = {"mlp": 1.0, "linear": None}


def groups_of(table: pa.Table) -> list[TableGroup]:
    starts = range(0, table.num_rows, GROUP_ROWS)
    return [TableGroup(f"rows {start}", table.slice(start, GROUP_ROWS)) for start in starts]


@dataclass
class Tidemill:
    """One model and one policy: frozen never learns, online trains on each shard, retrain starts anew now and then."""

    stream: Stream
    settings: Settings
    seed: int
    factory: str = "mlp"
    policy: Literal["frozen", "online", "retrain"] = "online"
    running: bool = False  # statistics
    replay: ReplayMemory | None = None
    seen: list[pa.Table] = field(default_factory=list)

    def __post_init__(self) -> None:
        arguments: dict[str, Any] = {"hidden": [64, 32]} if self.factory == "mlp" else {}
        categories = self.stream.categories
        self.every = math.ceil(len(self.stream.shards) / (RETRAININGS + 1))
        self.spec = Spec(
            features=tuple(
                Column(name=name, kind="category", buckets=BUCKETS) if name in categories else Column(name=name)
                for name in self.stream.features
            ),
            target=Y,
            task=self.stream.task,
            model=Model(factory=self.factory, arguments=arguments),
            loss=self.stream.loss,
            learning_rate=self.settings.rate,
            epochs=self.settings.epochs,
            replay=self.replay,
            clip_norm=CLIP_NORM[self.factory],
            batch_size=BATCH_SIZE[self.factory],
            seed=self.seed,
            standardize_target=self.stream.task == "regression",
            running_statistics=self.running,
        )

    def fit(self, table: pa.Table) -> None:
        """As `tidemill train`: statistics of all rows, then epochs over them."""
        self.seen = [table]
        groups = groups_of(table)
        features = Features.resolve(self.spec, table.schema).fit(groups)
        self.learner = Learner.create(self.spec, features)
        self.steps = Steps(self.learner)
        for epoch in range(self.spec.epochs):
            train_pass(self.steps, groups, key=("epoch", epoch), remember=epoch == 0)

    def predict(self, table: pa.Table) -> np.ndarray:
        return torch.cat(list(predict(self.learner, groups_of(table)))).double().numpy()

    def learn(self, table: pa.Table) -> None:
        """As `tidemill follow --passes`; or, a few times in a stream, as a new `tidemill train`."""
        if self.policy == "online":
            train_shard(self.steps, groups_of(table), PASSES[self.factory])
        elif self.policy == "retrain":
            self.seen.append(table)
            if (len(self.seen) - 1) % self.every == 0:  # the batch part is among those seen
                seen = self.seen
                self.fit(pa.concat_tables(seen))
                self.seen = seen
