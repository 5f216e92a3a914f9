"""A pass in its middle: where it stands beside the learner. From there it goes on to the same bits as if it had not stopped."""

import base64
from typing import Protocol, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tidemill.tasks.training.order import Place


class Midway(BaseModel):
    """Between two gradient steps of a pass, or two blocks of them. Checkpoints hold it, beside the learner."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    place: Place
    loss: float
    """The sum over the rows so far, each with the weights at its step."""
    steps: int
    """Gradient steps of the pass so far."""
    random: dict[str, str]
    """The states of random numbers, by name, as base64: torch's global ones (`cpu`, and the device's), and those that decide
    which rows the replay memory keeps (`memory`)."""

    @classmethod
    def of(cls, place: Place, loss: float, steps: int, device: torch.device, memory: torch.Generator | None) -> Self:
        """As things are now. Raises ValueError: the loss is not finite."""
        states = {"cpu": torch.default_generator.get_state()}
        if device.type == "cuda":
            states[device.type] = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            states[device.type] = torch.mps.get_rng_state()
        if memory is not None:
            states["memory"] = memory.get_state()
        return cls(
            place=place,
            loss=loss,
            steps=steps,
            random={name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()},
        )

    def restore(self, device: torch.device, memory: torch.Generator | None) -> None:
        """Let all random numbers go on from where they were. On another device its own go on from the pass's seed."""
        states = {name: _state(text) for name, text in self.random.items()}
        torch.default_generator.set_state(states["cpu"])
        if device.type == "cuda" and device.type in states:
            torch.cuda.set_rng_state(states[device.type], device)
        elif device.type == "mps" and device.type in states:
            torch.mps.set_rng_state(states[device.type])
        if memory is not None and "memory" in states:
            memory.set_state(states["memory"])


def _state(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


class Keeper(Protocol):
    """Stores a pass in its middle, now and then."""

    def due(self, rows: int) -> bool:
        """Whether it is time, after so many rows of the pass. Asked after each block of steps."""
        ...

    def keep(self, midway: Midway) -> None:
        """Store the learner as it is now, and where its pass stands."""
        ...
