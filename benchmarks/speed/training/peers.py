"""What people train with instead. Each is imported when it is measured; one that is missing is skipped.

Lightning, skorch and Keras train the same nets. River, scikit-learn and Vowpal Wabbit train the linear model only. Those that
want the data in memory get it there: the time for that is in `startup_s`, not in the steady rate.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.loader import limits, peers
from benchmarks.speed.measure import consumed, cpu_seconds, rates
from benchmarks.speed.training import TRAINERS
from benchmarks.speed.training.nets import eager, network
from benchmarks.speed.work import LEARNING_RATE, Work


@TRAINERS.case("peer")
def seed_loop(work: Work, began: float) -> dict[str, Any]:
    """Plain PyTorch loop with a plain DataLoader over pandas."""
    return consumed(peers.seed(work), work.seconds, began, eager(network(work)))


@TRAINERS.case("peer")
def batch_sampler_loop(work: Work, began: float) -> dict[str, Any]:
    """The same with a DataLoader that indexes whole batches."""
    return consumed(peers.batch_sampler(work), work.seconds, began, eager(network(work)))


def in_parts(
    work: Work, began: float, prepare: Callable[[Tensor, Tensor], Any], fit: Callable[[Any, int], None]
) -> dict[str, Any]:
    """For peers that only know `fit`: `prepare` gets the rows, `fit` what it made of them and a number of rows.

    How many rows take `work.seconds` is found with calls that grow, so that what a call costs by itself counts for little.
    """
    x, y = limits.permuted(limits.all_rows(work))
    prepared = prepare(x, y)
    fit(prepared, work.batch)  # what is done once
    startup = time.perf_counter() - began
    rows, took = 8 * work.batch, 0.0
    while took < work.seconds / 4 and rows < len(x):
        rows = min(len(x), 4 * rows)
        at = time.perf_counter()
        fit(prepared, rows)
        took = time.perf_counter() - at
    rows = min(len(x), int(rows * work.seconds / took) // work.batch * work.batch)
    at, cpu = time.perf_counter(), cpu_seconds()
    fit(prepared, rows)
    return {"startup_s": startup, **rates(rows, time.perf_counter() - at, cpu_seconds() - cpu)}


class _Timed:
    """Batches that end by themselves, with what `consumed` measures of the code that takes them.

    A framework that pulls its batches is turned inside out: its step is what happens between two pulls.
    """

    def __init__(self, passes: Callable[[int], Iterator[Any]], work: Work, began: float) -> None:
        self._passes, self._work, self._began = passes, work, began
        self.result: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        rows = 0
        first = None
        for batch in self._passes(0):
            now = time.perf_counter()
            if rows and first is None:
                first, cpu, rows = now, cpu_seconds(), 0  # the step of the first batch is over
            elif first is not None and now - first > self._work.seconds:
                break
            rows += len(batch[0])
            yield batch
        assert first is not None, "the dataset has several batches"
        self.result = {
            "startup_s": first - self._began,
            **rates(rows, time.perf_counter() - first, cpu_seconds() - cpu),
        }


def lightning_fit(work: Work, began: float, passes: Callable[[int], Iterator[Any]]) -> dict[str, Any]:
    """Lightning's Trainer without logging, checkpoints and progress bar."""
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = network(work), nn.MSELoss()

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.loss(self.net(batch[0]), batch[1].unsqueeze(1))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    batches = _Timed(passes, work, began)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work.scratch,
    ).fit(Module(), batches)
    return batches.result


@TRAINERS.case("peer")
def lightning(work: Work, began: float) -> dict[str, Any]:
    """Lightning with a plain DataLoader over pandas."""
    return lightning_fit(work, began, peers.seed(work))


@TRAINERS.case("peer")
def lightning_in_memory(work: Work, began: float) -> dict[str, Any]:
    """Lightning over pre-sliced tensors in memory."""
    return lightning_fit(work, began, limits.in_memory(work))


@TRAINERS.case("peer")
def skorch(work: Work, began: float) -> dict[str, Any]:
    """skorch over arrays in memory."""
    from skorch import NeuralNetRegressor

    def prepare(x: Tensor, y: Tensor) -> Any:
        net = NeuralNetRegressor(
            network(work),
            max_epochs=1,
            batch_size=work.batch,
            lr=LEARNING_RATE,
            train_split=None,
            verbose=0,
            iterator_train__shuffle=True,
        )
        return net, x.numpy(), y.unsqueeze(1).numpy()

    return in_parts(work, began, prepare, lambda p, rows: p[0].fit(p[1][:rows], p[2][:rows]))


@TRAINERS.case("peer")
def keras(work: Work, began: float) -> dict[str, Any]:
    """Keras on torch over arrays in memory."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras as k

    def prepare(x: Tensor, y: Tensor) -> Any:
        hidden = {"net": [20], "mlp": [256, 256], "linear": []}[work.net]
        activation = "relu" if work.net == "mlp" else None
        layers = [k.layers.Dense(size, activation) for size in hidden]
        model = k.Sequential([k.Input((x.shape[1],)), *layers, k.layers.Dense(1)])
        model.compile(k.optimizers.SGD(LEARNING_RATE), "mse")
        return model, x.numpy(), y.numpy()

    def fit(prepared: Any, rows: int) -> None:
        model, x, y = prepared
        model.fit(x[:rows], y[:rows], batch_size=work.batch, epochs=1, verbose=0)

    return in_parts(work, began, prepare, fit)


@TRAINERS.case("peer", only=("linear",))
def river_rows(work: Work, began: float) -> dict[str, Any]:
    """River's linear regression, a row at a time as it is made for, whatever the batch."""
    from river import linear_model, optim

    def prepare(x: Tensor, y: Tensor) -> Any:
        model = linear_model.LinearRegression(optimizer=optim.SGD(LEARNING_RATE))
        rows = x[: 1 << 19].tolist()  # as Python's floats all of it would take gigabytes
        return model, [dict(zip(work.features, row, strict=True)) for row in rows], y.tolist()

    def fit(prepared: Any, rows: int) -> None:
        model, xs, ys = prepared
        for i in range(rows):
            model.learn_one(xs[i % len(xs)], ys[i % len(xs)])

    return in_parts(work, began, prepare, fit)


@TRAINERS.case("peer", only=("linear",))
def river_batches(work: Work, began: float) -> dict[str, Any]:
    """River's linear regression, learning from frames of a batch."""
    import pandas as pd
    from river import linear_model, optim

    def prepare(x: Tensor, y: Tensor) -> Any:
        model = linear_model.LinearRegression(optimizer=optim.SGD(LEARNING_RATE))
        return model, pd.DataFrame(x.numpy(), columns=work.features), pd.Series(y.numpy())

    def fit(prepared: Any, rows: int) -> None:
        model, x, y = prepared
        for at in range(0, rows, work.batch):
            model.learn_many(x.iloc[at : at + work.batch], y.iloc[at : at + work.batch])

    return in_parts(work, began, prepare, fit)


@TRAINERS.case("peer", only=("linear",))
def scikit_learn(work: Work, began: float) -> dict[str, Any]:
    """scikit-learn's SGDRegressor.partial_fit, which takes a step a row, whatever the batch."""
    from sklearn.linear_model import SGDRegressor

    def fit(prepared: Any, rows: int) -> None:
        model, x, y = prepared
        for at in range(0, rows, work.batch):
            model.partial_fit(x[at : at + work.batch], y[at : at + work.batch])

    def prepare(x: Tensor, y: Tensor) -> Any:
        return SGDRegressor(learning_rate="constant", eta0=LEARNING_RATE), x.numpy(), y.numpy()

    return in_parts(work, began, prepare, fit)


@TRAINERS.case("peer", only=("linear",))
def vowpal_wabbit(work: Work, began: float) -> dict[str, Any]:
    """Vowpal Wabbit over its own text file, written beforehand: its C++ parser and a step a row, whatever the batch."""
    from vowpalwabbit import Workspace

    file = Path(work.scratch) / "rows.vw"
    x, y = (tensor[: 1 << 19] for tensor in limits.permuted(limits.all_rows(work)))  # as text all of it is a gigabyte
    with file.open("w") as out:
        for row, target in zip(x.tolist(), y.tolist(), strict=True):
            out.write(f"{target} | {' '.join(map('{}:{}'.format, work.features, row))}\n")
    startup = time.perf_counter() - began
    at, cpu = time.perf_counter(), cpu_seconds()
    Workspace(f"-d {file} --quiet --sgd -l {LEARNING_RATE}").finish()
    return {"startup_s": startup, **rates(len(x), time.perf_counter() - at, cpu_seconds() - cpu)}
