"""The replay memory: a bounded sample of the rows seen so far, from which old rows are mixed into the steps of new ones.

Rows are kept as the model receives them (scaled numbers, hashed ids), so that they never have to be encoded again.
A reservoir is a uniform sample of a stream without knowing its length (Vitter 1985, "Random sampling with a reservoir",
algorithm R, https://doi.org/10.1145/3147.3165).

Shape legend: M slots, P parts of the memory, B rows of a batch, S rows staged, F numbers and C categories of one row.
"""

from collections.abc import Iterator
from typing import Final, Self

import torch
from torch import Tensor

from tidemill.tasks.training.cutting import Batch
from tidemill.tasks.training.errors import SpecError, StateMismatch
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.spec import Spec

STAGED_ROWS: Final = 4096
"""Rows that are decided on together: tensor operations cost the same for few rows."""
DRAWN_STEPS: Final = 64
"""Steps whose old rows are gathered together, for the same reason."""
_STAGED: Final = "staged."
"""How the names of the tensors begin that hold rows which are not decided on."""
WORKING_BYTES: Final = 32 * 2**20
"""That either may take: of wide rows, such as images, there are fewer."""


class ReplayBuffer:
    """A reservoir, or with policy `balanced` one of equal size for each class."""

    def __init__(self, spec: Spec, features: Features) -> None:
        """An empty memory of at most `replay.rows` rows and `replay.bytes` bytes.

        Raises:
            SpecError: not even one row fits.
        """
        settings = spec.replay
        assert settings is not None, "the spec asks for a memory"
        parts = 1 if settings.policy == "reservoir" else spec.classes or 2
        self.slots = min(settings.rows, settings.bytes // features.row_bytes) // parts
        """Of each part."""
        if self.slots < 1:
            raise SpecError(
                f"replay of {settings.rows} rows and {settings.bytes:,} bytes holds no row for each of {parts} parts: a row "
                f"takes {features.row_bytes} bytes; raise replay.rows or replay.bytes"
            )
        self.ratio = settings.ratio
        self._row_bytes = features.row_bytes
        self._staged_rows = max(1, min(STAGED_ROWS, WORKING_BYTES // self._row_bytes))
        self.seen_P = torch.zeros(parts, dtype=torch.int64)
        self._kept: dict[str, Tensor] = {}
        """Field of a Batch -> [M, ...]; empty before the first rows."""
        self._staged: dict[str, Tensor] = {}
        """Field of a Batch -> [S, ...]."""
        self._waiting = 0
        """How many rows are staged."""

    @property
    def rows(self) -> int:
        """How many rows are kept."""
        return int(self.seen_P.clamp(max=self.slots).sum())

    # ---- remembering -------------------------------------------------------------------------------------------------
    def offer(self, batch: Batch, random: torch.Generator) -> None:
        """Show new rows to the memory. They are copied; `random` decides, at the latest at `admit`, which it keeps."""
        tensors = {name: tensor for name, tensor in batch._asdict().items() if tensor is not None}
        if not self._staged:
            self._staged = _empty(tensors, self._staged_rows)
        size, at = len(batch.y_B), 0
        while at < size:
            count = min(size - at, self._staged_rows - self._waiting)
            for name, tensor in tensors.items():
                self._staged[name][self._waiting : self._waiting + count] = tensor[at : at + count]
            self._waiting += count
            at += count
            if self._waiting == self._staged_rows:
                self.admit(random)

    def admit(self, random: torch.Generator) -> None:
        """Decide on all rows that were offered. What is kept depends on their order and on `random` alone."""
        if not self._waiting:
            return
        staged = {name: tensor[: self._waiting] for name, tensor in self._staged.items()}
        if not self._kept:
            self._kept = _empty(staged, len(self.seen_P) * self.slots)
        for part in range(len(self.seen_P)):
            rows = staged
            if len(self.seen_P) > 1:
                of_part = (staged["y_B"] == part).nonzero().squeeze(1)
                rows = {name: tensor[of_part] for name, tensor in staged.items()}
            self._admit_part(part, rows, random)
        self._waiting = 0

    def _admit_part(self, part: int, rows: dict[str, Tensor], random: torch.Generator) -> None:
        count, seen = len(rows["y_B"]), int(self.seen_P[part])
        before_S = torch.arange(seen, seen + count, dtype=torch.float64)  # rows seen before each
        # Row t goes to a random one of t + 1 places, and only the first places exist.
        place_S = (torch.rand(count, dtype=torch.float64, generator=random) * (before_S + 1)).long()
        first = max(0, min(self.slots - seen, count))  # these fill the memory, in order
        place_S[:first] = torch.arange(seen, seen + first)
        taken = (place_S < self.slots).nonzero().squeeze(1)
        # Of several rows for one place the last stays, as if they had come one by one.
        last_M = torch.full((self.slots,), -1).scatter_reduce_(0, place_S[taken], taken, "amax")
        places = (last_M >= 0).nonzero().squeeze(1)
        for name, tensor in rows.items():
            self._kept[name][part * self.slots + places] = tensor[last_M[places]]
        self.seen_P[part] += count

    def rescale(self, old: Features, new: Features) -> None:
        """Brings the kept rows from the scale of `old` features to that of `new` ones; a null stays where it was."""
        before, after = old.statistics, new.statistics
        assert not self._waiting, "admit() comes before rescale()"
        assert before is not None, "the old features are fitted"
        assert after is not None, "the new features are fitted"
        scales = {}
        if new.standardize_features:
            scales["x_BF"] = old.scaling, new.scaling
        if new.standardize_target:
            scales["y_B"] = (before.target_mean, before.target_std), (after.target_mean, after.target_std)
        block = max(1, WORKING_BYTES // (8 * self._row_bytes))  # float64, and several of them
        for slots in torch.split(self._slot(torch.arange(self.rows)), block):
            for name in scales.keys() & self._kept.keys():
                (old_mean, old_std), (new_mean, new_std) = scales[name]
                raw = self._kept[name][slots].double() * old_std + old_mean
                self._kept[name][slots] = ((raw - new_mean) / new_std).float()

    # ---- drawing -----------------------------------------------------------------------------------------------------
    def draws(self, size: int, random: torch.Generator) -> Iterator[Batch]:
        """Endlessly, batches of `size` old rows, each row drawn uniformly from what is kept, with replacement.

        Nothing comes while the memory is empty. Rows admitted since may be missing from the next `DRAWN_STEPS` batches.
        """
        steps = max(1, min(DRAWN_STEPS, WORKING_BYTES // (size * self._row_bytes)))
        while rows := self.rows:
            drawn = self._slot(torch.randint(rows, (size * steps,), generator=random))
            parts = {name: torch.split(tensor.index_select(0, drawn), size) for name, tensor in self._kept.items()}
            for i in range(steps):
                yield _batch({name: tensors[i] for name, tensors in parts.items()})

    def _slot(self, index: Tensor) -> Tensor:
        """Slot of the i-th kept row: parts may be filled to different degrees."""
        if len(self.seen_P) == 1:
            return index
        filled_P = self.seen_P.clamp(max=self.slots)
        end_P = filled_P.cumsum(0)
        part = torch.searchsorted(end_P, index, right=True)
        return part * self.slots + index - (end_P - filled_P)[part]

    # ---- state -------------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """Tensors from which `load` restores the memory exactly: the kept rows, how many each part has seen, and in the middle
        of a pass what is not decided on yet."""
        slots = self._slot(torch.arange(self.rows))
        found = {"seen": self.seen_P} | {name: tensor[slots] for name, tensor in self._kept.items()}
        if self._waiting:
            found |= {f"{_STAGED}{name}": tensor[: self._waiting] for name, tensor in self._staged.items()}
        return found

    @classmethod
    def load(cls, spec: Spec, features: Features, tensors: dict[str, Tensor]) -> Self:
        """The memory that `state` described, for the same spec.

        Raises:
            StateMismatch: the rows do not fit the spec, or are not as many as they count.
        """
        memory = cls(spec, features)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(_STAGED)}
        staged = {name.removeprefix(_STAGED): tensor for name, tensor in tensors.items() if name.startswith(_STAGED)}
        seen_P = kept.pop("seen")
        if seen_P.shape != memory.seen_P.shape or seen_P.dtype != torch.int64 or bool((seen_P < 0).any()):
            raise StateMismatch(
                f"the stored replay memory has parts of {seen_P.tolist()} rows, the spec asks for other parts"
            )
        memory.seen_P = seen_P
        if {len(tensor) for tensor in kept.values()} - {memory.rows} or bool(kept) != bool(memory.rows):
            raise StateMismatch(f"the stored replay memory does not hold the {memory.rows} rows that it counts")
        if kept:
            memory._kept = _empty(kept, len(seen_P) * memory.slots)
            slots = memory._slot(torch.arange(memory.rows))
            for name, tensor in kept.items():
                memory._kept[name][slots] = tensor
        if staged:
            memory._staged = _empty(staged, memory._staged_rows)
            memory._waiting = len(staged["y_B"])
            for name, tensor in staged.items():
                memory._staged[name][: memory._waiting] = tensor
        return memory


def mixed(new: Batch, old: Batch, count: int) -> Batch:
    """The rows of `new`, then the first `count` of `old`."""
    return _batch(
        {name: torch.cat([t, getattr(old, name)[:count]]) for name, t in new._asdict().items() if t is not None}
    )


def _batch(tensors: dict[str, Tensor]) -> Batch:
    return Batch(**(dict.fromkeys(Batch._fields) | tensors))  # type: ignore[arg-type]  # None where a field is not used


def _empty(tensors: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Uninitialised room for `rows` rows like these. It takes no memory until it is written to."""
    return {name: tensor.new_empty((rows, *tensor.shape[1:])) for name, tensor in tensors.items()}
