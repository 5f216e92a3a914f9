"""Tensors as safetensors files: the bytes are the library's own, and what it refuses is refused."""

import json
import random
import string

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load as library_load
from safetensors.torch import save as library_save
from torch import Tensor

from tidemill.tasks.training.errors import FactoryError, StateMismatch
from tidemill.tasks.training.tensors import DTYPES, TensorFile, buffers_of

SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 5), (0,), (4, 0, 2), (2, 3, 1, 2)]
NAMES = [
    "a",
    "b.weight",
    "é",
    "日本",
    'quo"te',
    "back\\slash",
    "new\nline",
    "\x00\x1f\x7f",
    "🙂",
    "Z",
    "__x__",
    "a b",
    "/",
]


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(buffer[:] for buffer in buffers_of(tensors, metadata))


def made_up(dtype: torch.dtype, shape: tuple[int, ...], generator: random.Random) -> Tensor:
    """Any bytes."""
    count = dtype.itemsize * torch.Size(shape).numel()
    data = generator.randbytes(count) if dtype is not torch.bool else bytes(generator.choices((0, 1), k=count))
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def same_bytes(one: Tensor, other: Tensor) -> bool:
    views = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*views)


@pytest.mark.parametrize("seed", range(40))
def test_the_bytes_are_those_of_the_library(seed: int) -> None:
    generator = random.Random(seed)
    names = generator.sample(NAMES, k=generator.randrange(len(NAMES) + 1))
    tensors = {
        name: made_up(generator.choice(list(DTYPES.values())), generator.choice(SHAPES), generator) for name in names
    }
    text = "".join(generator.choices(string.printable + 'é"\\日\x01', k=generator.randrange(40)))
    metadata = generator.choice([None, {}, {"tidemill": text}])
    data = file_of(tensors, metadata)
    assert data == library_save(tensors, metadata)
    file = TensorFile(data, "bytes")
    read = file.rest()
    assert (read.keys(), file.metadata) == (tensors.keys(), metadata or {})
    assert all(same_bytes(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_type_has_its_place_and_its_name(dtype: torch.dtype) -> None:
    """Beside each other type, so that the order of any two is the library's."""
    generator = random.Random(0)
    for other in DTYPES.values():
        tensors = {"a": made_up(dtype, (3,), generator), "b": made_up(other, (5,), generator)}
        assert file_of(tensors) == library_save(tensors)


def test_what_is_not_contiguous_or_shares_memory_is_stored_as_it_reads() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tied = torch.nn.Parameter(torch.ones(2))
    tensors = {"t": weight.T, "row": weight[1], "every": weight[:, ::2], "one": tied, "other": tied, "last": weight}
    tensors["image"] = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    alone = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    assert file_of(tensors) == library_save(alone)


def test_a_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.zeros(4)
    header, memory = buffers_of({"a": tensor})
    tensor += 1
    assert torch.equal(TensorFile(bytes(header[:]) + bytes(memory[:]), "bytes").rest()["a"], torch.ones(4))


def test_a_type_that_no_file_knows_is_told() -> None:
    with pytest.raises(FactoryError, match=r"w is complex128\[2\], of a type that cannot be stored"):
        buffers_of({"w": torch.zeros(2, dtype=torch.complex128)})


def test_tensors_are_read_in_turn_and_what_is_not_wanted_is_passed_over() -> None:
    tensors = {name: torch.full((300_000,), float(at)) for at, name in enumerate("abcd")}
    file = TensorFile(file_of(tensors), "bytes")
    assert list(file.up_to_last(lambda name: name == "b")) == ["a", "b"]
    assert file.up_to_last(lambda name: name == "a") == {}
    [(name, tensor)] = file.rest(lambda name: name == "d").items()
    assert (name, torch.equal(tensor, tensors["d"])) == ("d", True)
    assert file.rest() == {}


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: list[tuple[str | dict[str, object], int]] = [
    ({"a": entry()}, 4),
    ({"a": entry(), "b": entry(offsets=(4, 8))}, 8),
    ({"b": entry(offsets=(4, 8)), "a": entry()}, 8),
    ({"a": entry(), "b": entry()}, 4),
    ({"a": entry(), "b": entry(offsets=(2, 6))}, 6),
    ({"a": entry(), "b": entry(offsets=(5, 9))}, 9),
    ({"a": entry(offsets=(4, 8))}, 8),
    ({"a": entry()}, 5),
    ({"a": entry()}, 3),
    ({"a": entry(shape=(2,))}, 4),
    ({"a": entry(shape=(-1,))}, 4),
    ({"a": entry(shape=(1.0,))}, 4),
    ({"a": entry(shape=(True,))}, 4),
    ({"a": entry(shape=(2**40, 2**40))}, 4),
    ({"a": entry(shape=(0,), offsets=(0, 0))}, 0),
    ({"a": entry(dtype="F33")}, 4),
    ({"a": entry(dtype=None)}, 4),
    ({"a": entry(offsets=(4, 0))}, 4),
    ({"a": entry(offsets=(0, 4, 4))}, 4),
    ({"a": entry(offsets=None)}, 4),
    ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    ({"a": None}, 4),
    ({"a": []}, 4),
    ({"__metadata__": {"x": "y"}}, 0),
    ({"__metadata__": {"x": 1}}, 0),
    ({"__metadata__": []}, 0),
    ({"__metadata__": None}, 0),
    ("{}", 0),
    ("{}", 1),
    ("{} ", 0),
    (" {}", 0),
    ("[]", 0),
    ("null", 0),
    ("", 0),
    ("{", 0),
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4),
    ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4),
    ("{" * 50_000, 0),
    ('{"\ud800":1}', 0),
]


@pytest.mark.parametrize(("header", "size"), HEADERS)
def test_what_the_library_refuses_is_refused_and_nothing_else(header: str | dict[str, object], size: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    check_as_the_library(len(text).to_bytes(8, "little") + text + bytes(size))


@pytest.mark.parametrize("seed", range(300))
def test_mutated_files_are_refused_as_by_the_library(seed: int) -> None:
    generator = random.Random(seed)
    tensors = {"a": torch.arange(3.0), "b": torch.arange(2), "c": torch.zeros(2, 0)}
    data = bytearray(file_of(tensors, {"tidemill": "{}"}))
    for _ in range(generator.choice((1, 1, 2, 4))):
        at = generator.randrange(len(data))
        change = generator.choice(("flip", "cut", "double", "digit"))
        if change == "flip":
            data[at] ^= 1 << generator.randrange(8)
        elif change == "cut":
            del data[at : at + generator.randrange(1, 9)]
        elif change == "double":
            data[at:at] = data[at : at + generator.randrange(1, 9)]
        else:
            data[at : at + 1] = generator.choice(b'0123456789[]{},:"').to_bytes()
    check_as_the_library(bytes(data))


def check_as_the_library(data: bytes) -> None:
    try:
        expected = library_load(data)
    except (SafetensorError, KeyError, RuntimeError):  # of types that torch lacks, of sizes that it does not take
        expected = None
    try:
        found = TensorFile(data, "bytes").rest()
    except (StateMismatch, RuntimeError):
        found = None
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_a_file_that_ends_too_early_is_told(keep: int) -> None:
    data = file_of({"a": torch.zeros(3)})
    with pytest.raises(StateMismatch, match="the weights are not a safetensors file"):
        TensorFile(data[:keep], "weights").rest()
