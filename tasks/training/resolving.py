"""From the spec that was asked for to the one that is trained.

A spec may leave things open. They are decided here, once, from the schema of the dataset and from what the pass over it has
learned. The resolved spec is stored in the version: online training, predictions and reproductions go by it, so that nothing
depends on a later default. A batch run is known by what was asked.
"""

from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from tidemill.tasks.training.spec import Spec


@dataclass(frozen=True)
class Learned:
    """What the pass over the dataset has learned, as far as decisions hang on it."""

    rows: int
    """Of the training side."""
    labelled: int
    """Those of them that have all targets."""


class Resolved(BaseModel):
    """What a spec comes to on one dataset. Checkpoints hold it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Spec
    """Nothing is left open in it."""


def resolve(asked: Spec, schema: pa.Schema, learned: Learned | None) -> Resolved:
    """Decide what `asked` leaves open: a pure function of its arguments.

    Args:
        asked: The spec as it was asked for.
        schema: Of the dataset.
        learned: What the pass over the dataset has learned. None: before the pass, to know which columns it reads.
    """
    return Resolved(spec=asked)
