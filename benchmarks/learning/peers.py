"""River's and scikit-learn's learners on the same columns: numbers standardised, categories one-hot, targets standardised.

River learns row by row and keeps its running statistics up to date. scikit-learn's `partial_fit` takes a shard at a time and
goes through it row by row too; its statistics are those of the batch part, as in Tidemill.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from river import compose, linear_model, optim, preprocessing, tree
from river.base import Estimator
from sklearn.compose import make_column_transformer
from sklearn.linear_model import SGDClassifier, SGDRegressor
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from benchmarks.learning.protocol import Settings
from benchmarks.learning.streams import Stream, Y
from tidemill.tasks.training.groups import stable_seed


def _orders(rows: int, settings: Settings, seed: int) -> Iterator[np.ndarray]:
    """A new order of the rows for each epoch."""
    for epoch in range(settings.epochs):
        yield np.random.default_rng(stable_seed("epoch", seed, epoch)).permutation(rows)


class _River:
    """A River pipeline. It learns all rows of a shard in their order, one at a time."""

    def __init__(self, stream: Stream, settings: Settings, seed: int) -> None:
        self.stream, self.settings, self.seed = stream, settings, seed
        model = self.model()
        if stream.task == "regression":
            model = preprocessing.TargetStandardScaler(model)
        scale = compose.Select(*stream.numbers) | preprocessing.StandardScaler()
        if stream.categories:
            scale = scale + (compose.Select(*stream.categories) | preprocessing.OneHotEncoder())
        self.pipeline = scale | model

    def model(self) -> Estimator:
        raise NotImplementedError

    def fit(self, table: pa.Table) -> None:
        rows = self._rows(table)
        for order in _orders(len(rows), self.settings, self.seed):
            for i in order:
                self.pipeline.learn_one(*rows[i])

    def predict(self, table: pa.Table) -> np.ndarray:
        return np.array([self._predict(x) for x, _ in self._rows(table)])

    def learn(self, table: pa.Table) -> None:
        for x, y in self._rows(table):
            self.pipeline.learn_one(x, y)

    def _predict(self, x: dict[str, Any]) -> float:
        if self.stream.task == "regression":
            return float(self.pipeline.predict_one(x))
        return float(self.pipeline.predict_proba_one(x).get(True, 0.0))

    def _rows(self, table: pa.Table) -> list[tuple[dict[str, Any], Any]]:
        rows = table.to_pylist()
        kind = float if self.stream.task == "regression" else bool
        return [(row, kind(row.pop(Y))) for row in rows]


class RiverLinear(_River):
    """Linear or logistic regression by SGD."""

    def model(self) -> Estimator:
        rate = self.settings.rate
        if self.stream.task == "binary":
            return linear_model.LogisticRegression(optim.SGD(rate), intercept_lr=rate)
        loss = optim.losses.Absolute() if self.stream.loss == "l1" else optim.losses.Squared()
        return linear_model.LinearRegression(optim.SGD(rate), loss, intercept_lr=rate)


class RiverLinearByRow(RiverLinear):
    """The same, but each row is learned before the next is predicted: River's own protocol, more than the others get."""

    def predict(self, table: pa.Table) -> np.ndarray:
        found = []
        for x, y in self._rows(table):
            found.append(self._predict(x))
            self.pipeline.learn_one(x, y)
        return np.array(found)

    def learn(self, table: pa.Table) -> None:
        """Already done while predicting."""


class RiverLinearTwice(RiverLinear):
    """The same, but each shard is gone over twice, as by our net."""

    def learn(self, table: pa.Table) -> None:
        super().learn(table)
        super().learn(table)


class RiverTree(_River):
    """A Hoeffding adaptive tree with its default settings: for orientation, nothing is chosen for it."""

    def model(self) -> Estimator:
        if self.stream.task == "binary":
            return tree.HoeffdingAdaptiveTreeClassifier(seed=self.seed)
        return tree.HoeffdingAdaptiveTreeRegressor(seed=self.seed)


class SklearnSGD:
    """SGDRegressor or SGDClassifier, without a penalty and with a constant rate, as the others."""

    def __init__(self, stream: Stream, settings: Settings, seed: int) -> None:
        self.stream, self.settings, self.seed = stream, settings, seed
        self.encoder = make_column_transformer(
            (StandardScaler(), stream.numbers), (OneHotEncoder(handle_unknown="ignore"), stream.categories)
        )
        common = {"penalty": None, "learning_rate": "constant", "eta0": settings.rate, "random_state": seed}
        if stream.task == "binary":
            self.model: Any = SGDClassifier(loss="log_loss", **common)
        else:
            loss = "epsilon_insensitive" if stream.loss == "l1" else "squared_error"
            self.model = SGDRegressor(loss=loss, epsilon=0.0, **common)

    def fit(self, table: pa.Table) -> None:
        x, y = self.encoder.fit_transform(table.to_pandas()), table[Y].to_numpy()
        regression = self.stream.task == "regression"
        self.mean, self.std = (y.mean(), y.std()) if regression else (0.0, 1.0)
        for order in _orders(len(y), self.settings, self.seed):
            self._learn(x[order], y[order])

    def predict(self, table: pa.Table) -> np.ndarray:
        x = self.encoder.transform(table.to_pandas())
        if self.stream.task == "binary":
            found: np.ndarray = self.model.predict_proba(x)[:, 1]
            return found
        return self.model.predict(x) * self.std + self.mean

    def learn(self, table: pa.Table) -> None:
        self._learn(self.encoder.transform(table.to_pandas()), table[Y].to_numpy())

    def _learn(self, x: Any, y: np.ndarray) -> None:
        if self.stream.task == "binary":
            self.model.partial_fit(x, y, classes=[0, 1])
        else:
            self.model.partial_fit(x, (y - self.mean) / self.std)
