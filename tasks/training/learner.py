"""All that training changes, and its bytes.

The weights are a plain safetensors file of `model.state_dict()`, usable without Tidemill. The state is another: tensors
of the optimizer and of the feature statistics, everything else as JSON in its metadata. Neither can run code.
"""

import copy
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes
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
    def load(cls, spec: Spec, weights: bytes, state: bytes, device: str = "cpu") -> Self:
        """What `Learner.load` would serve, without an optimizer and its state.

        Raises:
            StateMismatch, FactoryError: as there.
        """
        with _telling_of_other_states():
            stored = _Stored.parsed(spec, weights, state)
            served = build(stored.spec, stored.features).to(device_of(device))
            _check_weights(served, stored.weights)
            served.load_state_dict(stored.weights)
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
        weights = tensor_bytes(_storable(self.served.state_dict()))
        return weights, tensor_bytes(_storable(tensors), {METADATA_KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, spec: Spec, weights: bytes, state: bytes, device: str = "cpu") -> Self:
        """The learner that `dump` wrote, bit for bit, for the same spec; on a device as in `create`.

        Raises StateMismatch if the bytes do not fit the spec's model or optimizer, and FactoryError.
        """
        with _telling_of_other_states():
            stored = _Stored.parsed(spec, weights, state)
            spec = stored.spec
            learner = cls.create(spec, stored.features, device)
            _check_weights(learner.model, stored.weights)
            learner.served.load_state_dict(stored.weights)
            if learner.averaged is not None:
                trained_weights = _under("model.", stored.tensors)
                _check_weights(learner.model, trained_weights)
                learner.model.load_state_dict(trained_weights)
                learner.averaged.n_averaged.copy_(stored.tensors["averaged.steps"])
            restore_optimizer(learner.optimizer, spec, stored.about["optimizer"], _under("optimizer.", stored.tensors))
            if learner.schedule is not None:
                restore_schedule(learner.schedule, stored.about["schedule"])
            if learner.memory is not None:
                learner.memory = ReplayBuffer.load(spec, stored.features, _under("memory.", stored.tensors))
            learner.counters = Counters(**stored.about["counters"])
            return learner


def serving_state(state: bytes) -> bytes:
    """Of a state that `Learner.dump` wrote, what `Network.load` needs: no optimizer, no old rows.

    Raises:
        StateMismatch: it is no such state.
    """
    about = {name: value for name, value in _about(state).items() if name in ("format", "features")}
    tensors = {name: tensor for name, tensor in parse_tensors(state).items() if name.startswith("features.")}
    return tensor_bytes(tensors, metadata={METADATA_KEY: json.dumps(about)})


def parsed(spec: Spec, weights: bytes, state: bytes) -> tuple[Features, dict[str, Tensor]]:
    """Features and weights of what `Learner.dump` wrote, without a model. Raises StateMismatch: it wrote something else."""
    with _telling_of_other_states():
        stored = _Stored.parsed(spec, weights, state)
        return stored.features, stored.weights


# ---- what is stored --------------------------------------------------------------------------------------------------
class _Stored(NamedTuple):
    """What `Learner.dump` wrote, parsed and found to be for a spec."""

    spec: Spec
    """With its task."""
    about: dict[str, Any]
    """The JSON in the state's metadata."""
    tensors: dict[str, Tensor]
    """Of the state."""
    weights: dict[str, Tensor]
    features: Features

    @classmethod
    def parsed(cls, spec: Spec, weights: bytes, state: bytes) -> Self:
        """Raises StateMismatch: it is for another spec, or for a built-in model of other sizes."""
        about = _about(state)
        tensors = parsed_tensors(state, "training state")
        features = Features.from_state(_under("features.", tensors), about["features"])
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
        stored_weights = parsed_tensors(weights, "weights")
        if spec.model.factory in BUILT_IN_MODELS:
            with torch.device("meta"):  # before memory is taken for whatever sizes the spec asks for
                _check_weights(build(spec, features), stored_weights)
        return cls(spec, about, tensors, stored_weights, features)


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


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with a copy where safetensors needs one: not contiguous, or sharing memory with another.

    A tied weight is stored under each of its names, as in `state_dict`, so that the file is complete to any reader.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
        stored[name] = tensor
    return stored


def parsed_tensors(data: bytes, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises StateMismatch: it is none."""
    try:
        return parse_tensors(data)
    except SafetensorError as error:
        raise StateMismatch(f"the {what} are not a safetensors file: {error}") from error


def _about(state: bytes) -> dict[str, Any]:
    """The JSON in the metadata. A safetensors file begins with an 8-byte little-endian length and that much JSON."""
    parsed_tensors(state, "bytes of the training state")
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    about: dict[str, Any] = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
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


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_weights(model: nn.Module, stored: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} is unknown to the model" for name in stored.keys() - expected.keys()]
    for name in expected.keys() & stored.keys():
        old, new = stored[name], expected[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            problems.append(f"{name} is {_shape(old)}, the model has {_shape(new)}")
    if problems:
        raise StateMismatch(
            f"the stored weights do not fit the model of the spec: {'; '.join(sorted(problems)[:10])}: "
            f"has the code of the factory changed since?"
        )


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
