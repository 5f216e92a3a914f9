"""Tidemill's training, through the functions that a batch run uses."""

import math
import time
from collections.abc import Sequence
from typing import Any, Final

from torch import nn

from benchmarks.speed.loader.ours import window, window_of_a_group
from benchmarks.speed.measure import cpu_seconds, rates
from benchmarks.speed.training import TRAINERS
from benchmarks.speed.work import Work

SMALL_BATCH: Final = 256
MODELS: Final[dict[str, dict[str, Any]]] = {
    "net": {"factory": "examples.net:Net"},
    "mlp": {"factory": "mlp", "arguments": {"hidden": [256, 256]}},
    "linear": {"factory": "linear"},
}


def begun(work: Work, **settings: Any) -> tuple[Any, Sequence[Any]]:
    """A fresh learner, and the row groups of the dataset."""
    from tidemill.storage.dataset import snapshot
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.learner import Learner
    from tidemill.tasks.training.spec import Spec

    common = {"features": work.features, "target": "y", "batch_size": work.batch, "standardize_features": False}
    spec = Spec.model_validate({**common, "model": MODELS[work.net], **window(work), **settings})
    groups = snapshot(work.folder).row_groups
    return Learner.create(spec, Features.resolve(spec, groups[0].schema).fit(groups, None)), groups


def trained(work: Work, began: float, **settings: Any) -> dict[str, Any]:
    """Two passes over one row group, then one over so many that it takes about `work.seconds`, which is measured.

    `first_step_s` is what the first pass takes more than the second: compilation, and whatever else is paid once. Eager, the
    steady rate begins with the first step of the last pass. Compiled, it is that of the whole pass, its first window included:
    code that watches for the first step would change what is compiled.
    """
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.steps import Steps

    learner, groups = begun(work, **settings)
    steps = Steps(learner, expected=1)  # passes of a few lengths: each has its own code, as in a batch run
    opened = time.perf_counter() - began
    took = []
    for number in range(2):
        at = time.perf_counter()
        train_pass(steps, groups[:1], key=("warm-up", number))
        took.append(time.perf_counter() - at)
    count = max(_least(learner.spec.window_bytes, work), math.ceil(work.seconds / took[1]))
    many = [groups[i % len(groups)] for i in range(count)]
    first_step = [] if learner.spec.compile == "on" else _watched(learner.model)
    called, cpu = time.perf_counter(), cpu_seconds()
    result = train_pass(steps, many, key=("epoch", 0))
    now = time.perf_counter()
    assert result.rows == sum(group.num_rows for group in many)
    if learner.spec.compile == "on" and not learner.counters.compiled_steps:
        raise RuntimeError("no step was compiled; see the warning above")
    since = first_step[0] if first_step else called
    once = max(0.0, took[0] - took[1])
    return {
        "startup_s": opened + once + since - called,
        "first_step_s": once,
        **rates(result.rows, now - since, cpu_seconds() - cpu),
        "loss": result.loss,
    }


def _least(window_bytes: int, work: Work) -> int:
    """Row groups of several windows: what is trained from the first one was read before, not beside, the training.

    Two are enough where a step takes so long that reading is a percent of it.
    """
    windows = 2 if work.batch < SMALL_BATCH else 4
    return 1 + windows * max(1, window_bytes // window_of_a_group(work))


def _watched(model: nn.Module) -> list[float]:
    """Will hold the time at which the model is called next; from then on nothing is watched any more."""
    times: list[float] = []

    def called(*_: Any) -> None:
        times.append(time.perf_counter())
        handle.remove()

    handle = model.register_forward_pre_hook(called)
    return times


@TRAINERS.case("ours")
def tidemill(work: Work, began: float) -> dict[str, Any]:
    """Tidemill, eager: streamed from Parquet, shuffled in its default window."""
    return trained(work, began, compile="off")


@TRAINERS.case("ours")
def tidemill_compiled(work: Work, began: float) -> dict[str, Any]:
    """The same with compiled steps."""
    return trained(work, began, compile="on")
