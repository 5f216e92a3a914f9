"""Keras models on Keras's torch backend, as torch modules that are trained, stored and copied as any other.

A `keras.Model` of that backend is an `nn.Module`, but it cannot be resumed as it is: it ignores `train()` and `eval()`, the
names in its `state_dict` count all layers that the process has made, and its first weights are drawn from Python's own random
numbers.
Nothing here imports Keras: the user's factory does.

Shape legend: B rows of a batch, F numbers and C ids of one row.
"""

import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from tidemill.tasks.training.calling import random_numbers_kept, told
from tidemill.tasks.training.errors import FactoryError, ModelError

BACKEND: Final = "torch"
"""Of Keras's backends, the one that is trained."""


def is_keras(model: object) -> bool:
    """Whether it is a model of Keras, on whatever backend."""
    keras: Any = sys.modules.get("keras")
    return keras is not None and isinstance(model, keras.Model)


class KerasModule(nn.Module):
    """A Keras model, called as Tidemill calls all models.

    It is called with x_BF, or with the list [x_BF, ids_BC] where there are ids, and with `training`: the mode of this module.
    What is trained is a parameter here. All else is a buffer: frozen weights, the statistics of BatchNormalization, the state of
    the random numbers of layers with a seed. Their names are their places in the model: `0_kernel`, `1_bias`.
    """

    def __init__(self, name: str, make: Callable[[], Any], seed: int, rows: tuple[Tensor, Tensor | None]) -> None:
        """A model with new weights.

        Args:
            name: The factory, for messages.
            make: Makes the Keras model: at each call one of the same structure.
            seed: Of its first weights.
            rows: x_BF and ids_BC of a few rows: many models make their weights when they are first called.

        Raises:
            FactoryError: Keras has another backend, or the model cannot be called with the rows.
        """
        super().__init__()
        keras: Any = sys.modules["keras"]
        if (backend := keras.backend.backend()) != BACKEND:
            raise FactoryError(
                f"model.factory {name!r} returned a Keras model on the backend {backend!r}: set KERAS_BACKEND={BACKEND} in the "
                "environment before Tidemill starts"
            )
        self._made_of = name, make, seed, rows
        with _seeded(seed), keras.device("cpu"):
            net = make()
            self._held = (net,)  # torch would take the net itself for a part of this module, with all its names
            try:
                with torch.no_grad(), told(f"model.factory {name!r}: its Keras model", *rows):
                    self.eval()(*rows)
            except ModelError as error:
                raise FactoryError(str(error)) from error
        for i, variable in enumerate(net.variables):
            place = f"{i}_{re.sub(r'_[0-9]+$', '', variable.name)}"  # without Keras's own count
            if variable.trainable:
                self.register_parameter(place, variable.value)
            else:
                self.register_buffer(place, variable.value)
        self.train()

    @property
    def net(self) -> Any:
        """The Keras model, with the weights as they are now."""
        return self._held[0]

    def forward(self, x_BF: Tensor, ids_BC: Tensor | None = None) -> Tensor:
        keras: Any = sys.modules["keras"]
        with keras.device(x_BF.device.type):  # Keras would move the rows to the accelerator, if there is one
            return cast(Tensor, self.net(x_BF if ids_BC is None else [x_BF, ids_BC], training=self.training))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another model of the factory with these weights: Keras's own copies need the user's classes to be registered."""
        copied = type(self)(*self._made_of).to(next(self.parameters()).device)
        copied.load_state_dict(self.state_dict())
        memo[id(self)] = copied
        return copied.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the tensors. Keras holds the same ones: torch would put others in the place of buffers."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, tensor in buffers.items():
            if tensor is not None and (moved := self._buffers[name]) is not None:
                tensor.data = moved
                self._buffers[name] = tensor
        return self


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All global random numbers that Keras and its users draw from begin at `seed`; afterwards they go on as before."""
    python, array = random.getstate(), np.random.get_state()
    with random_numbers_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
