"""The recipe of defaults: how to train on a table where nothing was said about it.

It was searched on ten data sets and confirmed on twelve others (docs/learning.md). Its number is part of what a run is known by:
a better recipe gets another number, and what was trained by this one stays what it is.

"""

import math
from typing import Any, Final

from tidemill.tasks.training.spec import Model, Optimizer, Spec

LEARNING_RATE: Final = 0.003
WEIGHT_DECAY: Final = 0.3
"""Each step shrinks matrices by 0.003 * 0.3 of themselves."""
EMA_DECAY: Final = 0.99
HIDDEN: Final = (64, 32)
DROPOUT: Final = 0.1
DROPOUT_BELOW: Final = 20_000
"""Rows from which on nothing is dropped: it costs more than it helps."""
SOFT_LIMIT: Final = 3.0
"""Of classes only: a number far out that acts linearly on the target of a regression must go on doing so."""
SMALLEST_BATCH: Final = 32
LARGEST_BATCH: Final = 512


def filled(spec: Spec, rows: int) -> Spec:
    """The spec with what its recipe chooses; unchanged if it names none. Its task is known.

    Args:
        spec: With or without a recipe. What it sets of the settings that stay open to choice (scaling, average) stands.
        rows: Labelled ones that are trained on.
    """
    if spec.recipe is None:
        return spec
    regression = spec.stated_task == "regression"
    dropout = DROPOUT if rows < DROPOUT_BELOW else 0.0
    arguments: dict[str, Any] = {"hidden": list(HIDDEN), "embedding": None, "dropout": dropout}
    chosen: dict[str, Any] = {
        "recipe": None,
        "model": Model(factory="mlp", arguments=arguments | ({} if regression else {"base_rates": True})),
        "optimizer": Optimizer(name="adamw", arguments={"weight_decay": WEIGHT_DECAY}, decay_biases=False),
        "learning_rate": LEARNING_RATE,
        "batch_size": batch_size(rows),
        "epochs": "auto",
        "null_indicators": True,
        "standardize_target": regression,
        "limit_predictions": regression,
    }
    if spec.ema_decay is None:
        chosen |= {"ema_decay": EMA_DECAY, "ema_warmup": True}
    if spec.soft_limit is None and not regression and spec.standardize_features:
        chosen["soft_limit"] = SOFT_LIMIT
    return Spec.model_validate(spec.model_dump() | {name: _plain(value) for name, value in chosen.items()})


def batch_size(rows: int) -> int:
    """The next power of two from the square root of the rows on, within bounds."""
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 1 << math.ceil(math.log2(max(rows, 1)) / 2)))


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, Model | Optimizer) else value
