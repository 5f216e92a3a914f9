"""All that training changes, and its bytes.

The weights are a plain safetensors file of `model.state_dict()`, usable without Tidemill. The state is another: tensors
of the optimizer and of the feature statistics, everything else as JSON in its metadata. Neither can run code.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from tidemill.tasks.training.errors import FactoryError, SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.metrics import Metric, metrics_of
from tidemill.tasks.training.models import build
from tidemill.tasks.training.optimizers import (
    goes_by_rows,
    make_average,
    make_optimizer,
    make_schedule,
    restore_optimizer,
    restore_schedule,
    schedule_position,
)
from tidemill.tasks.training.replay import ReplayBuffer
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.stored import (
    METADATA_KEY,
    STATE_FORMAT,
    Stored,
    check_weights,
    kinds_of,
    settled,
    taken,
    telling_of_other_states,
)
from tidemill.tasks.training.tensors import Buffer, Readable, buffers_of, joined
from tidemill.tasks.training.touched import Mark, Touched


@dataclass
class Counters:
    """What the learner has been trained on. `train_pass` counts rows and steps, its caller epochs and shards."""

    epochs: int = 0
    shards: int = 0
    rows: int = 0
    steps: int = 0
    compiled_steps: int = 0
    """Those of the steps that ran compiled."""


@dataclass(frozen=True, eq=False)
class Network:
    """A network that is not trained any more, with all that scoring and predicting needs."""

    spec: Spec
    features: Features
    served: nn.Module
    since: Mark | None = None
    """When it was copied of a learner."""

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.served.parameters()).device

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the spec, to be reset before use: making them takes longer than scoring a small shard."""
        return metrics_of(self.spec)

    @classmethod
    def load(cls, spec: Spec, weights: bytes | Readable, state: bytes | Readable, device: str = "cpu") -> Self:
        """What `Learner.load` would serve, without an optimizer and its state.

        Raises:
            StateMismatch, FactoryError: as there.
        """
        with telling_of_other_states():
            stored = Stored.begun(spec, weights, state)
            served = build(stored.spec, stored.features).to(device_of(device))
            stored.take_weights(served)
            stored.state.rest(lambda name: False)
            return cls(stored.spec, stored.features, served)

    @torch.no_grad()
    def renewed(self, learner: "Learner") -> dict[int, nn.Parameter]:
        """The tables that can be a part of the next copy of what this learner serves: by the id of the learner's own ones.

        They are those of which it is known which rows have changed since this copy was made: these are brought up to date. The
        network is of no use any more.
        """
        if self.since is None or not learner.changes.by_rows:
            return {}
        found, copies = {}, dict(self.served.named_parameters())
        for name, original in learner.served.named_parameters():
            rows = self.since.rows(original)
            if rows is not None and (table := copies.get(name)) is not None:
                table.index_copy_(0, rows, original.index_select(0, rows))
                found[id(original)] = table
        return found


@dataclass(eq=False)
class Learner:
    """A model in training. After any TrainingError from the loop, throw it away and load it again."""

    spec: Spec
    features: Features
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: lr_scheduler.LRScheduler | None = None
    averaged: swa_utils.AveragedModel | None = None
    """The moving average of the weights, if the spec asks for it."""
    memory: ReplayBuffer | None = None
    """Old rows for online training, if the spec asks for them."""
    counters: Counters = field(default_factory=Counters)
    resting: tuple[nn.Module, ...] = ()
    """Parts of the model that its factory left in evaluation mode, as a frozen backbone: they stay so while it is trained."""
    _committed: Mark | None = field(default=None, init=False, repr=False)
    """When `committed` was called; None: never."""

    @classmethod
    def create(cls, spec: Spec, features: Features, device: str = "cpu") -> Self:
        """A learner with fresh weights on a device: `auto` (an accelerator if there is one), `cpu`, `cuda` or `mps`.

        Raises FactoryError, and SpecError: unknown arguments of the optimizer or the schedule, features that were not
        fitted, or a device that this machine does not have.
        """
        if not features.fitted:
            raise SpecError("the spec needs statistics of the columns: pass what features.fit(groups) returned")
        spec = settled(spec, features)
        place = device_of(device)
        model = build(spec, features).to(place)
        # A whole model in evaluation mode is just what a library returned.
        resting = tuple(module for module in model.modules() if not module.training) if model.training else ()
        optimizer = make_optimizer(spec, model)
        return cls(
            spec,
            features,
            model,
            optimizer,
            schedule=make_schedule(spec, optimizer),
            averaged=make_average(spec, model),
            memory=None if spec.replay is None else ReplayBuffer(spec, features),
            resting=resting,
        )

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """As in `Network`."""
        return metrics_of(self.spec)

    @property
    def served(self) -> nn.Module:
        """The network that is scored and predicts: the averaged one if there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def update_statistics(self, groups: Sequence[RowGroup]) -> None:
        """Brings the running statistics up to the rows of `groups`, and the memory to their scale. Raises ColumnError."""
        old, self.features = self.features, self.features.updated(groups)
        if self.memory is not None:
            self.memory.rescale(old, self.features)

    def widen_limits(self, groups: Sequence[RowGroup]) -> None:
        """Lets predictions reach as far as the targets of `groups`. Raises ColumnError."""
        self.features = self.features.widened(groups)

    def network(self, tables: Mapping[int, nn.Parameter] | None = None) -> Network:
        """A copy of what is served now, which further training does not change. `tables`: of an earlier one (`renewed`)."""
        try:
            served = copy.deepcopy(self.served, dict(tables or {}))
        except Exception:  # noqa: BLE001  # of the user's classes, or of a result with a gradient that the model keeps
            served = build(self.spec, self.features).to(self.device)
            served.load_state_dict(self.served.state_dict())
        return Network(self.spec, self.features, served, self.changes.mark())

    def dump(self) -> tuple[bytes, bytes]:
        """(weights, state) as safetensors. Equal learners give equal bytes. The weights are those of `served`.

        Raises FactoryError: as `pieces`.
        """
        weights, state = self.pieces()
        return joined(weights), joined(state)

    @property
    def stored_bytes(self) -> int:
        """How many `dump` would give."""
        return sum(buffer.nbytes for part in self.pieces() for buffer in part)

    def pieces(self) -> tuple[list[Buffer], list[Buffer]]:
        """The bytes of `dump` as buffers of the tensors themselves, without a copy: they change with the next step.

        Raises FactoryError: the optimizer's state is of a kind that cannot be stored.
        """
        weights, state, about = self._contents()
        return buffers_of(weights), buffers_of(state, {METADATA_KEY: json.dumps(about, sort_keys=True)})

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(tensors of the weights, of the state, and what else the state holds). Raises FactoryError: as `pieces`."""
        tensors, config = self.features.state()
        tensors = {f"features.{name}": tensor for name, tensor in tensors.items()}
        plain: dict[
            str, dict[str, Any]
        ] = {}  # state of the optimizer that is no tensor, as a momentum that is still None
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    if value.layout != torch.strided:
                        raise FactoryError(
                            f"{name} of optimizer {self.spec.optimizer.name} is sparse, as the gradients are, and cannot be "
                            "stored: use adagrad, sparse_adam, sgd without momentum, or sparse=False"
                        )
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    plain.setdefault(str(index), {})[name] = value
        about = {
            # The lowest that has all that is in it: a history of before is reproduced byte for byte.
            "format": "1.0" if self.features.labels is None else STATE_FORMAT,
            "features": config,
            "optimizer": {"name": self.spec.optimizer.name, "values": plain},
            "counters": asdict(self.counters),
        }
        if self.schedule is not None:
            about["schedule"] = schedule_position(self.schedule.state_dict())
        if self.averaged is not None:
            tensors["averaged.steps"] = self.averaged.n_averaged
            tensors |= {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.memory is not None:
            tensors |= {f"memory.{name}": tensor for name, tensor in self.memory.state().items()}
        return self.served.state_dict(), tensors, about

    # ---- what has changed --------------------------------------------------------------------------------------------
    @cached_property
    def changes(self) -> Touched:
        """What is known of the changes that steps make."""
        by_rows = goes_by_rows(self.spec.optimizer)
        return Touched(self.model.parameters() if by_rows else (), self.optimizer)

    def committed(self) -> None:
        """What the learner holds now is what a version holds: `touched` tells what has changed since."""
        self._committed = self.changes.mark()
        self.changes.keep_rows(self._committed)

    def touched(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """(of the weights, of the state): which rows of which tensors may have changed since `committed` was called.

        By the names of the tensors in what `dump` writes: int64 [rows] on the CPU, sorted, each once. All other rows of these
        tensors have the same bytes as then. Of what is not named here nothing is known. It costs what was touched.
        """
        if self._committed is None or not self.changes.by_rows:
            return {}, {}
        self.changes.compare_rows(self._committed)
        weights, state, _ = self._contents()
        return _rows(self._committed, weights), _rows(self._committed, state)

    @classmethod
    def load(cls, spec: Spec, weights: bytes | Readable, state: bytes | Readable, device: str = "cpu") -> Self:
        """The learner that `dump` wrote, bit for bit, for the same spec; on a device as in `create`.

        Of files that are read as streams the weights are in memory once more until the model has them, the state never.

        Raises StateMismatch if the bytes do not fit the spec's model or optimizer, and FactoryError.
        """
        with telling_of_other_states():
            stored = Stored.begun(spec, weights, state)
            spec, about = stored.spec, stored.about
            learner = cls.create(spec, stored.features, device)
            if learner.averaged is not None:
                check_weights(learner.model, stored.weights.kinds)
            stored.take_weights(learner.served)
            tensors = stored.tensors | stored.state.rest()
            stored.tensors.clear()
            if learner.averaged is not None:
                trained_weights = taken("model.", tensors)
                check_weights(learner.model, kinds_of(trained_weights))
                learner.model.load_state_dict(trained_weights)
                del trained_weights
                learner.averaged.n_averaged.copy_(tensors["averaged.steps"])
            restore_optimizer(learner.optimizer, spec, about["optimizer"], taken("optimizer.", tensors))
            if learner.schedule is not None:
                restore_schedule(learner.schedule, about["schedule"])
            if learner.memory is not None:
                learner.memory = ReplayBuffer.load(spec, stored.features, taken("memory.", tensors))
            learner.counters = Counters(**about["counters"])
            return learner


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `mps` stands for here. Raises SpecError: this machine has none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if found is None else found
    if name != "cpu" and (found is None or found.type != name):
        raise SpecError(f"device {name!r} is not available here ({found or 'only cpu'} is): choose auto or cpu")
    return torch.device(name)


def _rows(since: Mark, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that have changed, of the tensors of which that is known."""
    found = {name: since.rows(tensor) for name, tensor in tensors.items()}
    return {name: rows.cpu() for name, rows in found.items() if rows is not None}
