"""What the leader tells the crew, and what all ranks tell each other: a length, JSON, and raw bytes. Never a pickle."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tidemill.tasks.ranks.ending import end_here
from tidemill.tasks.ranks.group import Group

PIECE_BYTES: Final = 64 * 2**20
"""More bytes are sent in several pieces, each of which has the whole time that a rank waits."""
ABOUT_BYTES: Final = 64 * 2**20
"""The most that the JSON of an order may take: more is none."""


@dataclass(frozen=True)
class Order:
    """What the leader wants done."""

    name: str
    about: dict[str, Any]
    """What JSON can say of it."""
    parts: Sequence[memoryview]
    """Its bytes: of each part as many as were sent."""


def send(group: Group, name: str, about: dict[str, Any], *parts: bytes | memoryview) -> None:
    """Send an order to all other ranks, each of which is in `receive`."""
    lengths = [memoryview(part).nbytes for part in parts]
    words = json.dumps({"order": name, "about": about, "parts": lengths}).encode()
    group.broadcast_(torch.tensor([len(words), sum(lengths)], dtype=torch.int64))
    body = bytearray(b"".join([words, *parts]))
    for piece in _pieces(body):
        group.broadcast_(piece)


def receive(group: Group) -> Order:
    """The next order of the leader."""
    header = torch.zeros(2, dtype=torch.int64)
    group.broadcast_(header)
    words, more = header.tolist()
    if not (0 < words <= ABOUT_BYTES and more >= 0):
        end_here("what came is no order of the leader's: the ranks are not at the same place")
    body = bytearray(words + more)
    for piece in _pieces(body):
        group.broadcast_(piece)
    told = json.loads(body[:words])
    parts, at = [], words
    for length in told["parts"]:
        parts.append(memoryview(body)[at : at + length])
        at += length
    return Order(told["order"], told["about"], parts)


def farewell(group: Group) -> None:
    """After the last order, on all ranks: none ends well unless all have heard it, since what is sent to one that has just died
    may seem sent."""
    group.sum_(torch.zeros(1))


def _pieces(body: bytearray) -> Iterator[torch.Tensor]:
    """uint8 tensors that are the bytes themselves."""
    whole = torch.frombuffer(body, dtype=torch.uint8)
    for at in range(0, len(body), PIECE_BYTES):
        yield whole[at : at + PIECE_BYTES]


def gathered(group: Group, data: bytes) -> list[bytes]:
    """What each rank gives, by rank; on all of them. All ranks call it, with any number of bytes."""
    lengths = torch.zeros(group.size, dtype=torch.int64)
    lengths[group.rank] = len(data)
    group.sum_(lengths)
    longest = int(lengths.max())
    rows = torch.zeros((group.size, longest), dtype=torch.int32)  # Horovod adds up no bytes
    if data:
        rows[group.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if longest:
        group.sum_(rows)  # of each byte all ranks but one have a zero
    return [row[:length].to(torch.uint8).numpy().tobytes() for row, length in zip(rows, lengths.tolist(), strict=True)]
