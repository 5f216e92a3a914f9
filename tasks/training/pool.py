"""Memory of windows: lent to one window after the other, for as long as a batch refers to it.

What the system has just mapped is in no cache: filling a window of fresh memory takes a third longer.
"""

import math
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

WINDOWS: Final = 2
"""In memory at a time: the one in use and the one being filled."""
ALIGNED: Final = 64
"""Bytes: a line of the cache, and the widest vector instructions."""


class Empty(Protocol):
    """Makes a tensor that is not filled, as `torch.empty` does."""

    def __call__(self, size: Sequence[int], *, dtype: torch.dtype) -> Tensor: ...


class WindowPool:
    """Memory for two windows of at most `size` bytes, and of `tensors` tensors each.

    One thread borrows it, another one uses what was made of it. The one that borrows waits for the other to let go of a
    window, but only until that one needs the next window: of somebody who keeps batches, every window has its own memory.
    """

    def __init__(self, size: int, tensors: int) -> None:
        self._size = size + tensors * ALIGNED
        # SimpleQueue, because its `put` is reentrant: a finalizer may call it during any allocation. None in it means that
        # somebody has begun to wait.
        self._free = SimpleQueue[np.ndarray | None]()
        self._needed = False
        for _ in range(WINDOWS):  # pages that are never written take no memory
            self._free.put(self._new())

    def _new(self) -> np.ndarray:
        return torch.empty(self._size, dtype=torch.uint8).numpy()  # aligned by torch: numpy's own memory may be less

    def needed(self, now: bool) -> None:
        """The next window is needed, so that nobody may wait for memory any more; or, if not `now`, is there."""
        self._needed = now
        if now:
            self._free.put(None)

    def borrow(self) -> Empty:
        """Makes the tensors of one window. Its memory comes back when all of them, and this, are gone."""
        memory: np.ndarray | None = None
        while memory is None and not (self._needed and self._free.empty()):
            memory = self._free.get()
        if memory is None:  # somebody keeps batches
            lent = self._new()
        else:
            lent = memory[:]  # which every tensor made of it refers to
            weakref.finalize(lent, self._free.put, memory).atexit = False
        whole, used = torch.from_numpy(lent), 0

        def empty(size: Sequence[int], *, dtype: torch.dtype) -> Tensor:
            nonlocal used
            start = used
            stop = start + math.prod(size) * dtype.itemsize
            used = -(-stop // ALIGNED) * ALIGNED
            return whole[start:stop].view(dtype).view(*size)

        return empty
