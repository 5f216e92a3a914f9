"""What `Learner.dump` wrote, read as far as it is asked for, and found to be for a spec."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tidemill.tasks.training.errors import StateMismatch, TrainingError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.models import build
from tidemill.tasks.training.spec import BUILT_IN_MODELS, Spec
from tidemill.tasks.training.tensors import Kind, Readable, TensorFile, buffers_of, joined

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


@dataclass(eq=False)
class Stored:
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
        features = Features.from_state(taken("features.", tensors), about["features"])
        spec = settled(spec, features)
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
            with torch.device("meta"), _WithoutNormal():  # before memory is taken for whatever sizes the spec asks for
                check_weights(build(spec, features), weights_file.kinds)
        return cls(spec, about, features, tensors, state_file, weights_file)

    def take_weights(self, served: nn.Module) -> None:
        """Put the stored weights into a model. Raises StateMismatch: they are of another one."""
        check_weights(served, self.weights.kinds)
        served.load_state_dict(self.weights.rest())


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
    with telling_of_other_states():
        stored = Stored.begun(spec, weights, state)
        stored.state.rest(lambda name: False)
        return stored.features, stored.weights.rest()


class _WithoutNormal(TorchFunctionMode):
    """Leaves tensors as they are where a layer begins with normal numbers.

    On the meta device there is nothing to fill, and torch would import its compiler and SymPy for that: a second at each start.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is nn.init.normal_:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


@contextmanager
def telling_of_other_states() -> Iterator[None]:
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


def settled(spec: Spec, features: Features) -> Spec:
    """The spec with its task, where it leaves that open: what the features were resolved for."""
    return spec if spec.task is not None else spec.model_copy(update={"task": features.task})


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


def taken(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by what follows; they are taken out of `tensors`, which may hold the only ones."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def kinds_of(tensors: Mapping[str, Tensor]) -> dict[str, Kind]:
    return {name: Kind.of(tensor) for name, tensor in tensors.items()}


def check_weights(model: nn.Module, stored: Mapping[str, Kind]) -> None:
    expected = kinds_of(model.state_dict())
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
