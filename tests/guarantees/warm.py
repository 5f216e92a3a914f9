"""Imported once by the server that the children of the kill tests are forked from: what each of them would pay for first.

Nothing here may start a thread: a fork does not take threads along.
"""

import pyarrow as pa
import torch

import tests.guarantees.children
import tidemill.storage.s3
import tidemill.storage.tombstones

__all__ = ["tests", "tidemill"]  # imported for the children

tidemill.storage.tombstones.WHOLE_VERSIONS = tests.guarantees.children.WHOLE_VERSIONS

torch.set_num_threads(1)
torch.nn.Linear(1, 1)(torch.from_dlpack(pa.array([1.0], pa.float32())).unsqueeze(1)).sum().backward()
