"""The columns that a log of requests has beside the features: what was asked for, when, what answered, and the answer.

They are Tidemill's own. No pattern takes them for features, and shards that have them have no new columns for that.
"""

from typing import Final

import pyarrow as pa

PREFIX: Final = "_tidemill_"
REQUEST: Final = PREFIX + "request"
"""Which row this is. Labels are joined with the rows by it, so that each row of a request has its own."""
TIME: Final = PREFIX + "time"
"""When it was answered."""
VERSION: Final = PREFIX + "version"
"""Number of the version that answered."""
PREDICTION: Final = PREFIX + "prediction"
"""The answer: what `tidemill predict` writes as `prediction`, in that type."""
PROBABILITIES: Final = PREFIX + "probabilities"
"""Where the target holds labels: what `tidemill predict` writes as `probabilities`, in that type."""

TYPES: Final = {REQUEST: pa.string(), TIME: pa.timestamp("us", "UTC"), VERSION: pa.int64()}
"""Types of the columns that have the same one for each model, in the order in which they are written."""


def is_reserved(name: str) -> bool:
    """Whether a column is Tidemill's own, of today or of a later version."""
    return name.startswith(PREFIX)
