"""All that training changes, and its bytes.

The weights are a plain safetensors file of `model.state_dict()`, usable without Tidemill. The state is another: tensors
of the optimizer and of the feature statistics, everything else as JSON in its metadata. Neither can run code.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from tidemill.tasks.training.errors import FactoryError, SpecError, StateMismatch, TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.metrics import Metric, metrics_of
from tidemill.tasks.training.models import build
from tidemill.tasks.training.optimizers import (
    make_average,
    make_optimizer,
    make_schedule,
    restore_optimizer,
    restore_schedule,
    schedule_position,
)
from tidemill.tasks.training.replay import ReplayBuffer
from tidemill.tasks.training.spec import BUILT_IN_MODELS, Spec
from tidemill.tasks.training.tensors import Buffer, Kind, Readable, TensorFile, buffers_of, joined

METADATA_KEY: Final = "tidemill"  # a single key: safetensors does not fix the order of several
PREPROCESSING: Final = (
    "standardize_features",
    "standardize_target",
    "running_statistics",
    "soft_limit",
    "null_indicators",
    "limit_predictions",
)
"""What spec and stored features must agree on."""
STATE_FORMAT: Final = "1.1"
"""`major.minor`. A field's meaning never changes; a new one is optional, under a higher minor. It and all lower ones are read."""


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
        with _telling_of_other_states():
            stored = _Stored.begun(spec, weights, state)
            served = build(stored.spec, stored.features).to(device_of(device))
            stored.take_weights(served)
            stored.state.rest(lambda name: False)
            return cls(stored.spec, stored.features, served)


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

    @classmethod
    def create(cls, spec: Spec, features: Features, device: str = "cpu") -> Self:
        """A learner with fresh weights on a device: `auto` (an accelerator if there is one), `cpu`, `cuda` or `mps`.

        Raises FactoryError, and SpecError: unknown arguments of the optimizer or the schedule, features that were not
        fitted, or a device that this machine does not have.
        """
        if not features.fitted:
            raise SpecError("the spec needs statistics of the columns: pass what features.fit(groups) returned")
        spec = _settled(spec, features)
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

    def network(self) -> Network:
        """A copy of what is served now, which further training does not change."""
        try:
            served = copy.deepcopy(self.served)
        except Exception:  # noqa: BLE001  # of the user's classes, or of a result with a gradient that the model keeps
            served = build(self.spec, self.features).to(self.device)
            served.load_state_dict(self.served.state_dict())
        return Network(self.spec, self.features, served)

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
        tensors, config = self.features.state()
        tensors = {f"features.{name}": tensor for name, tensor in tensors.items()}
        plain: dict[
            str, dict[str, Any]
        ] = {}  # optimizer state that is no tensor, such as a momentum that is still None
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    if value.layout != torch.strided:
                        raise FactoryError(
                            f"{name} of optimizer {self.spec.optimizer.name} is sparse, as the gradients are, and cannot be "
                            "stored: use adagrad, sgd without momentum, or sparse=False"
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
        weights = buffers_of(self.served.state_dict())
        return weights, buffers_of(tensors, {METADATA_KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, spec: Spec, weights: bytes | Readable, state: bytes | Readable, device: str = "cpu") -> Self:
        """The learner that `dump` wrote, bit for bit, for the same spec; on a device as in `create`.

        Of files that are read as streams the weights are in memory once more until the model has them, the state never.

        Raises StateMismatch if the bytes do not fit the spec's model or optimizer, and FactoryError.
        """
        with _telling_of_other_states():
            stored = _Stored.begun(spec, weights, state)
            spec, about = stored.spec, stored.about
            learner = cls.create(spec, stored.features, device)
            if learner.averaged is not None:
                _check_weights(learner.model, stored.weights.kinds)
            stored.take_weights(learner.served)
            tensors = stored.tensors | stored.state.rest()
            stored.tensors.clear()
            if learner.averaged is not None:
                trained_weights = _taken("model.", tensors)
                _check_weights(learner.model, _kinds(trained_weights))
                learner.model.load_state_dict(trained_weights)
                del trained_weights
                learner.averaged.n_averaged.copy_(tensors["averaged.steps"])
            restore_optimizer(learner.optimizer, spec, about["optimizer"], _taken("optimizer.", tensors))
            if learner.schedule is not None:
                restore_schedule(learner.schedule, about["schedule"])
            if learner.memory is not None:
                learner.memory = ReplayBuffer.load(spec, stored.features, _taken("memory.", tensors))
            learner.counters = Counters(**about["counters"])
            return learner


def serving_state(state: bytes) -> bytes:
    """Of a state that `Learner.dump` wrote, what `Network.load` needs: no optimizer, no old rows.

    Raises:
        StateMismatch: it is no such state.
    """
    file = TensorFile(state, "training state")
    about = {name: value for name, value in _about(file).items() if name in ("format", "features")}
    tensors = file.rest(lambda name: name.startswith("features."))
    return joined(buffers_of(tensors, {METADATA_KEY: json.dumps(about)}))


def parsed(spec: Spec, weights: bytes | Readable, state: bytes | Readable) -> tuple[Features, dict[str, Tensor]]:
    """Features and weights of what `Learner.dump` wrote, without a model. Raises StateMismatch: it wrote something else."""
    with _telling_of_other_states():
        stored = _Stored.begun(spec, weights, state)
        stored.state.rest(lambda name: False)
        return stored.features, stored.weights.rest()


# ---- what is stored --------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class _Stored:
    """What `Learner.dump` wrote, read as far as to make a model, and found to be for a spec."""

    spec: Spec
    """With its task."""
    about: dict[str, Any]
    """The JSON in the state's metadata."""
    features: Features
    tensors: dict[str, Tensor]
    """Of the state, as far as it has been read."""
    state: TensorFile
    weights: TensorFile

    @classmethod
    def begun(cls, spec: Spec, weights: bytes | Readable, state: bytes | Readable) -> Self:
        """Raises StateMismatch: it is for another spec, or for a built-in model of other sizes."""
        state_file = TensorFile(state, "bytes of the training state")
        about = _about(state_file)
        tensors = state_file.up_to_last(lambda name: name.startswith("features."))
        features = Features.from_state(_taken("features.", tensors), about["features"])
        spec = _settled(spec, features)
        wanted = ([column.name for column in spec.features], spec.targets, spec.task)
        stored = ([column.name for column in features.columns], features.targets, features.task)
        if wanted != stored:
            raise StateMismatch(f"the stored state is for (features, target, task) {stored}, the spec has {wanted}")
        for name in PREPROCESSING:
            if getattr(features, name) != getattr(spec, name):
                raise StateMismatch(
                    f"the stored state has {name} {getattr(features, name)}, the spec {getattr(spec, name)}"
                )
        weights_file = TensorFile(weights, "weights")
        if spec.model.factory in BUILT_IN_MODELS:
            with torch.device("meta"):  # before memory is taken for whatever sizes the spec asks for
                _check_weights(build(spec, features), weights_file.kinds)
        return cls(spec, about, features, tensors, state_file, weights_file)

    def take_weights(self, served: nn.Module) -> None:
        """Put the stored weights into a model. Raises StateMismatch: they are of another one."""
        _check_weights(served, self.weights.kinds)
        served.load_state_dict(self.weights.rest())


@contextmanager
def _telling_of_other_states() -> Iterator[None]:
    """What bytes that Tidemill did not write may raise, as StateMismatch."""
    try:
        yield
    except TrainingError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise StateMismatch(
            f"the training state is not what Tidemill writes: {type(error).__name__}: {error}"
        ) from error


def _settled(spec: Spec, features: Features) -> Spec:
    """The spec with its task, where it leaves that open: what the features were resolved for."""
    return spec if spec.task is not None else spec.model_copy(update={"task": features.task})


def device_of(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `mps` stands for here. Raises SpecError: this machine has none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return torch.device("cpu") if found is None else found
    if name != "cpu" and (found is None or found.type != name):
        raise SpecError(f"device {name!r} is not available here ({found or 'only cpu'} is): choose auto or cpu")
    return torch.device(name)


def _about(state: TensorFile) -> dict[str, Any]:
    """The JSON in the metadata."""
    about: dict[str, Any] = json.loads(state.metadata.get(METADATA_KEY, "{}"))
    stated = _format(about.get("format"))
    if stated is None:
        raise StateMismatch("the training state says no format: are the weights passed in place of the state?")
    if stated > (_format(STATE_FORMAT) or ()):
        raise StateMismatch(
            f"the training state has format {about['format']}, this Tidemill reads up to {STATE_FORMAT}: upgrade Tidemill."
        )
    return about


def _format(stated: object) -> tuple[int, ...] | None:
    """(major, minor); None for what is no format. The number 1 was written before there were minor ones."""
    if type(stated) is int:
        return (stated, 0)
    if isinstance(stated, str) and re.fullmatch(r"\d{1,9}\.\d{1,9}", stated):
        return tuple(map(int, stated.split(".")))
    return None


def _taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by what follows; they are taken out of `tensors`, which may hold the only ones."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {name: Kind.of(tensor) for name, tensor in tensors.items()}


def _check_weights(model: nn.Module, stored: Mapping[str, Kind]) -> None:
    expected = _kinds(model.state_dict())
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} is unknown to the model" for name in stored.keys() - expected.keys()]
    for name in expected.keys() & stored.keys():
        if stored[name] != expected[name]:
            problems.append(f"{name} is {stored[name]}, the model has {expected[name]}")
    if problems:
        raise StateMismatch(
            f"the stored weights do not fit the model of the spec: {'; '.join(sorted(problems)[:10])}: "
            f"has the code of the factory changed since?"
        )
