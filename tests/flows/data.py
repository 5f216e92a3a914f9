"""Small Parquet files of `y = 2a - b`, which a linear model learns in a few steps."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tidemill.tasks.training.spec import Column, Spec

SPEC = Spec(features=(Column(name="a"), Column(name="b")), target="y", epochs=2, learning_rate=0.1, batch_size=32)
SPEC_FIELDS = {"features": ["a", "b"], "target": "y", "epochs": 2, "learning_rate": 0.1, "batch_size": 32}
"""The same as it stands in a file."""
NOT_PARQUET = b"PAR1" + b"not a parquet file" * 10 + b"PAR1"

OWN_MODEL = """
import torch

def build(inputs):
    return torch.nn.Linear(inputs.numbers, inputs.outputs)
"""
"""A module with a factory, for the folder that a command is started from."""


def parquet(rows: int, *, seed: str, sign: int = 1) -> bytes:
    """A file with the columns a, b and y; the seed decides its rows. With `sign` -1, y is the opposite of what it should be."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:12], 16))
    x = torch.randn(rows, 2, generator=generator)
    sink = pa.BufferOutputStream()
    columns = {"a": x[:, 0].tolist(), "b": x[:, 1].tolist(), "y": (sign * (2 * x[:, 0] - x[:, 1])).tolist()}
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())
