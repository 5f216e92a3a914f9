"""Tensors as a safetensors file that is never whole in memory: its pieces to be written, and a stream of it as it is read.

The bytes are those that safetensors' own library writes, which the tests compare. The library makes and reads files whole.
The format: a length (8 bytes, little-endian), that much JSON, then the tensors one after the other. Its order is the library's:
the widest type first, then by name.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from tidemill.tasks.training.errors import FactoryError, StateMismatch

DTYPES: Final = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""By their names in a file, in the order of safetensors' library."""
LONGEST_HEADER: Final = 100_000_000
"""Bytes of JSON; the library reads no more."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_RANKS: Final = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_ALIGNED: Final = 8
_SKIPPED: Final = 2**20


class Buffer(Protocol):
    """What holds the bytes of a tensor; a flat memoryview is one."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def __getitem__(self, part: slice, /) -> memoryview:
        """Some of them."""


class Readable(Protocol):
    """A file that is read once, from its beginning to its end."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a flat buffer with the bytes that follow. Returns how many there were: fewer only at the end."""


class Kind(NamedTuple):
    """Of a tensor, what can be known without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    @classmethod
    def of(cls, tensor: Tensor) -> "Kind":
        return cls(tensor.dtype, tuple(tensor.shape))


# ---- writing ---------------------------------------------------------------------------------------------------------
def buffers_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[Buffer]:
    """The file of these tensors in buffers: the header, then the memory of each tensor, which must not change meanwhile.

    Only a tensor that is not contiguous is copied. One that shares its memory with another is in the file under each of its
    names, so that the file is complete to any reader. Of `metadata` at most one item has a fixed place.

    Raises:
        FactoryError: a tensor is of a type that such a file does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise FactoryError(f"{name} is {Kind.of(tensor)}, of a type that cannot be stored")
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    buffers: list[Buffer] = []
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
        if tensor.nbytes:
            buffers.append(_buffer(tensor))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return [memoryview(len(text).to_bytes(8, "little") + text), *buffers]


def joined(buffers: Iterable[Buffer]) -> bytes:
    """All of their bytes."""
    return b"".join(buffer[:] for buffer in buffers)


def copied(buffers: Iterable[Buffer]) -> list[Buffer]:
    """The same bytes, which do not change with the tensors any more."""
    return [memoryview(joined(buffers))]


def _buffer(tensor: Tensor) -> Buffer:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return _memory(flat) if flat.device.type == "cpu" else _Elsewhere(flat)


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor of uint8, which live as long as they are held."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers


@dataclass(frozen=True)
class _Elsewhere:
    """The bytes of a tensor on an accelerator, fetched part by part."""

    flat: Tensor
    """uint8 [bytes]."""

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes

    def __getitem__(self, part: slice, /) -> memoryview:
        return _memory(self.flat[part].cpu())


# ---- reading ---------------------------------------------------------------------------------------------------------
class TensorFile:
    """A file whose header has been read, and whose tensors are read in the order in which they are stored."""

    def __init__(self, source: bytes | Readable, what: str) -> None:
        """`what` the file holds, in words.

        Raises:
            StateMismatch: it is no such file.
        """
        self._source: Readable = _Whole(source) if isinstance(source, bytes) else source
        self._what = what
        header = self._header()
        self.metadata = self._texts(header.pop("__metadata__", None))
        self.kinds = self._kinds(header)
        """Of all tensors, by name, in the order of the file."""
        self._left = list(self.kinds)[::-1]

    def rest(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """The tensors that were not read yet, without those that are not wanted. Each is in memory of its own.

        Raises:
            StateMismatch: the file ends too early.
        """
        return dict(self._read(len(self._left), wanted))

    def up_to_last(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The same up to the last wanted one, with whatever lies before it."""
        last = next((at for at, name in enumerate(self._left) if wanted(name)), len(self._left))
        return dict(self._read(len(self._left) - last, lambda name: True))

    def _read(self, count: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        for _ in range(count):
            name = self._left.pop()
            kind = self.kinds[name]
            if not wanted(name):
                self._skip(_bytes_of(kind))
                continue
            tensor = torch.empty(kind.shape, dtype=kind.dtype)
            if tensor.nbytes:
                self._fill(_memory(tensor.view(-1).view(torch.uint8)))
            yield name, tensor

    def _header(self) -> dict[str, object]:
        length = bytearray(8)
        if self._source.nbytes < len(length):
            raise self._no_file("it is too short")
        self._fill(memoryview(length))
        size = int.from_bytes(length, "little")
        if size > min(LONGEST_HEADER, self._source.nbytes - len(length)):
            raise self._no_file("its header is longer than that")
        text = bytearray(size)
        self._fill(memoryview(text))
        try:
            header: object = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise self._no_file(f"its header is no JSON: {error}") from error
        if not isinstance(header, dict):
            raise self._no_file("its header is no JSON object")
        self._body = self._source.nbytes - len(length) - size
        return header

    def _texts(self, metadata: object) -> dict[str, str]:
        """Raises StateMismatch: they are no texts by name."""
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._no_file("its metadata is no text")
        return metadata

    def _kinds(self, header: Mapping[str, object]) -> dict[str, Kind]:
        """Raises StateMismatch: the header does not tell tensors that fill the file, one after the other."""
        found = [(*self._entry(name, about), name) for name, about in header.items()]
        found.sort(key=lambda entry: entry[:2])
        at = 0
        for begin, end, kind, name in found:
            if begin != at or end - begin != _bytes_of(kind):
                raise self._no_file(f"the place of {name!r} in it is not that of {kind}")
            at = end
        if at != self._body:
            raise self._no_file(f"its tensors have {at} bytes, and {self._body} follow its header")
        return {name: kind for _, _, kind, name in found}

    def _entry(self, name: str, about: object) -> tuple[int, int, Kind]:
        if isinstance(about, dict) and about.keys() == {"dtype", "shape", "data_offsets"}:
            dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
            known = isinstance(dtype, str) and dtype in DTYPES
            if known and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
                return offsets[0], offsets[1], Kind(DTYPES[dtype], tuple(shape))
        raise self._no_file(f"what it says of {name!r} is not known")

    def _fill(self, buffer: memoryview) -> None:
        if self._source.readinto(buffer) != len(buffer):
            raise self._no_file("it ends too early")

    def _skip(self, count: int) -> None:
        scratch = memoryview(bytearray(min(count, _SKIPPED)))
        while count:
            self._fill(scratch[:count])
            count -= len(scratch[:count])

    def _no_file(self, why: str) -> StateMismatch:
        return StateMismatch(f"the {self._what} are not a safetensors file: {why}")


class _Whole:
    """Bytes that are in memory."""

    def __init__(self, data: bytes) -> None:
        self._left, self.nbytes = memoryview(data), len(data)

    def readinto(self, buffer: memoryview, /) -> int:
        taken = self._left[: len(buffer)]
        buffer[: len(taken)] = taken
        self._left = self._left[len(taken) :]
        return len(taken)


def _bytes_of(kind: Kind) -> int:
    return math.prod(kind.shape) * kind.dtype.itemsize


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
