"""Every setting that has a say in a gradient step, trained on shards by the ranks of a group: what the tests compare."""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, distributed, nn
from torch.distributed import FileStore

from tests.training.rows import Noted, begin, cut, numbers_table
from tidemill.storage.manifest import sha256
from tidemill.tasks.ranks.group import Group
from tidemill.tasks.training.errors import TrainingError
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import score, train_shard
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

HERE = "tests.ranks.matrix"
SHARDS = (45, 16, 50, 3)
"""Rows of each: batches of 12 to 16 rows, and of 3, fewer than there are parts."""

COLUMNS: dict[str, Any] = {
    "features": [*(f"x{i}" for i in range(4)), {"name": "c", "kind": "category", "buckets": 8}],
    "target": "y",
    "model": {"factory": "mlp", "arguments": {"hidden": [16]}},
    "batch_size": 16,
    "seed": 3,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum, clipping": {"optimizer": {"arguments": {"momentum": 0.9}}, "clip_norm": 0.05},
    "adam, average, schedule": {
        "optimizer": {"name": "adam", "arguments": {"amsgrad": True}},
        "schedule": {"name": "cosine", "arguments": {"T_max": 30}, "warmup_steps": 5},
        "ema_decay": 0.9,
        "ema_warmup": True,
    },
    "weights of rows": {"sample_weight": "w", "loss": "huber", "standardize_target": True},
    "classes": {
        "target": "k",
        "task": "multiclass",
        "classes": 3,
        "class_weights": [1.0, 2.0, 0.5],
        "optimizer": {"name": "adamw"},
    },
    "old rows": {"replay": {"rows": 30, "ratio": 0.5}, "running_statistics": True},
    "several targets": {"target": ["y", "x3"], "features": ["x0", "x1", "x2"], "loss": "l1"},
    "parameters that some parts use": {"model": {"factory": f"{HERE}:Sometimes"}, "optimizer": {"name": "adamw"}},
    "float64": {"model": {"factory": f"{HERE}:Double"}},
    "bfloat16": {"precision": "bfloat16"},
    "dropout": {"model": {"factory": "mlp", "arguments": {"hidden": [16], "dropout": 0.5}}},
    "compiled": {"compile": "on"},
}
DROPS = ("dropout",)
"""Which rows are dropped depends on how many parts there are: near to one process these are not."""
ROUGH = {"bfloat16": 1e-2}


class Trained(NamedTuple):
    """What a rank has come to in one of the settings."""

    weights: bytes
    state: bytes
    losses: list[float]

    @property
    def digest(self) -> tuple[str, str]:
        return sha256(self.weights), sha256(self.state)


def spec_of(name: str, parts: int | None) -> Spec:
    return Spec.model_validate(COLUMNS | SETTINGS[name] | {"parts": parts})


@functools.cache
def shards() -> list[Noted]:
    """Row groups, each of which is a shard."""
    rows = sum(SHARDS)
    table = numbers_table(rows, 4)
    table = table.append_column("c", [[["red", "green", None, "blue"][i % 4] for i in range(rows)]])
    table = table.append_column("k", [[i % 3 for i in range(rows)]])
    return cut(table.append_column("w", pa.array([0.2 + i % 7 for i in range(rows)], pa.float32())), *SHARDS[:-1])


def train(
    group: Group,
    names: list[str],
    parts: int | None,
    first: int = 0,
    last: int | None = None,
    stored: Mapping[str, Trained] | None = None,
    backend: str = "aot_eager",
) -> dict[str, Trained]:
    """Train on the shards from the first to before the last one, in each of the settings, on from what is stored; `backend` is
    torch.compile's."""
    found = {}
    for name in names:
        spec = spec_of(name, parts)
        learner = Learner.load(spec, *stored[name][:2]) if stored is not None else begin(spec, shards())
        steps = Steps(learner, group=group, backend=backend)
        losses = [train_shard(steps, [shard], passes=2).loss for shard in shards()[first:last]]
        found[name] = Trained(*learner.dump(), losses)
    return found


def train_by_inductor(group: Group, cache: str) -> dict[str, Trained]:
    """The same with steps that torch's own compiler makes, from nothing on each rank."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}-{group.rank}", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return train(group, ["compiled"], 4, backend="inductor")


def largest(learner: Learner) -> float:
    """Of the weights: what a difference of two of them is measured by."""
    return max(1.0, *(float(p.detach().abs().max()) for p in learner.model.parameters()))


def fail(group: Group) -> tuple[str, str]:
    """The error of a model that fails on rows which only one part has."""
    spec = Spec.model_validate(COLUMNS | {"model": {"factory": f"{HERE}:Choosy"}})
    learner = begin(spec, shards())
    rows = shards()[0].table.slice(0, 16)
    x0 = [0.0] * 15 + [100.0]
    table = rows.set_column(rows.schema.get_field_index("x0"), "x0", pa.array(x0, pa.float32()))
    steps = Steps(learner, group=group)
    try:
        train_shard(steps, cut(table), passes=1)
    except TrainingError as error:
        told = type(error).__name__, str(error)
    group.sum_(torch.ones(1))  # all are at the same place afterwards
    return told


def score_alone(group: Group, store: str) -> dict[str, float]:
    """The metrics that the leader finds, while the others wait for it in torch's default group; of the others none."""
    if group.size > 1:
        file = FileStore(store, group.size)
        distributed.init_process_group("gloo", store=file, rank=group.rank, world_size=group.size)
    found = {}
    if not group.rank:
        spec = Spec.model_validate(COLUMNS | {"metrics": ["torchmetrics:R2Score"]})
        found = score(begin(spec, shards()), shards()).metrics
    if group.size > 1:
        distributed.barrier()
        distributed.destroy_process_group()
    return found


class Sometimes(nn.Module):
    """Uses one parameter in some parts of a batch only, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = nn.Linear(4, 1), nn.Parameter(torch.ones(1))
        self.table, self.never = nn.Embedding(9, 1), nn.Parameter(torch.ones(2))

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        output = self.net(x_BF) + self.table(ids_BC[:, 0])
        far_B = x_BF[:, 0] > 1
        return output + far_B.unsqueeze(1) * self.shift if bool(far_B.any()) else output


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        return self.net(x_BF.double())


class Choosy(Double):
    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        if self.training and bool((x_BF > 3).any()):
            raise RuntimeError("a row that I do not like")
        return super().forward(x_BF, ids_BC)
