"""The suite `profile`: where the time of a training pass goes, thread by thread.

A thread samples the stacks of all others at random moments, a few hundred times a second, and each sample counts for the stage
whose functions it is in. It runs inside the process that it watches and needs nothing installed: what the interpreter is
doing while it holds its lock for long is seen a little too seldom.
"""

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

from benchmarks.speed import data
from benchmarks.speed.processes import measured_apart
from benchmarks.speed.suites import SUITES
from benchmarks.speed.work import Work

PAUSE: Final = 0.004  # seconds between two samples, on average
WAITING: Final = "waiting"
# Parts of paths, names of functions ("": any), and the stage: that of the innermost function which is found here.
STAGES: Final = (
    ("threading.py", "wait", WAITING),
    ("concurrent/futures/thread.py", "_worker", WAITING),
    ("training/optimizers.py", "backward", "backward"),
    ("training/optimizers.py", "", "optimizer"),
    ("torch/optim/", "", "optimizer"),
    ("torch/_inductor/", "", "compiled steps"),
    ("torch/_dynamo/", "", "compiled steps"),
    ("training/steps.py", "", "call compiled steps"),
    ("torch/nn/modules/loss.py", "", "loss"),
    ("training/losses.py", "", "loss"),
    ("torch/nn/", "mse_loss", "loss"),
    ("torch/nn/modules/", "", "forward"),
    ("examples/", "", "forward"),
    ("training/packing.py", "place", "permute"),
    ("training/packing.py", "", "encode"),
    ("training/columns.py", "", "encode"),
    ("training/features.py", "", "encode"),
    ("training/batches.py", "_windows", "permute"),
    ("training/batches.py", "add", "permute"),
    ("training/batches.py", "put", "permute"),
    ("training/batches.py", "_add_labels", "permute"),
    ("training/batches.py", "block", "permute"),
    ("pyarrow/parquet/", "", "decode"),
    ("storage/parquet.py", "", "decode"),
    ("storage/pages.py", "", "decode"),
    ("storage/", "", "read"),
    ("training/batches.py", "", "hand out batches"),
    ("training/cutting.py", "", "hand out batches"),
    ("training/loop.py", "", "the loop itself"),
)


def stage(frame: FrameType | None) -> str:
    """Of a stack, given by its innermost frame."""
    while frame is not None:
        code = frame.f_code
        for path, function, name in STAGES:
            if path in code.co_filename and function in ("", code.co_name):
                return name
        frame = frame.f_back
    return "other"


class Sampler(threading.Thread):
    """Counts the stages of every other thread until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.samples: dict[int, Counter[str]] = {}
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(random.uniform(0, 2 * PAUSE)):  # random: no rhythm of the loop's can hide
            for thread, frame in sys._current_frames().items():
                if thread != self.ident:
                    self.samples.setdefault(thread, Counter())[stage(frame)] += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()


def measure(case: str, work: Work, began: float) -> dict[str, Any]:
    """Shares of the time of the main thread, and of one core by the others together; a pass as in the `training` suite."""
    from benchmarks.speed.training.ours import begun
    from tidemill.tasks.training.loop import train_pass
    from tidemill.tasks.training.steps import Steps

    learner, groups = begun(work, compile="on" if case == "tidemill_compiled" else "off")
    steps = Steps(learner, expected=1)
    train_pass(steps, groups[:1], key=("warm-up", 0))
    at = time.perf_counter()
    train_pass(steps, groups[:1], key=("warm-up", 1))
    count = max(1, round(work.seconds / (time.perf_counter() - at)))
    sampler = Sampler()
    sampler.start()
    train_pass(steps, [groups[i % len(groups)] for i in range(count)], key=("epoch", 0))
    sampler.stop()
    main = sampler.samples.pop(threading.get_ident())
    others = sum(sampler.samples.values(), Counter[str]())
    total = main.total()
    return {
        "samples": total,
        "main": {name: round(n / total, 4) for name, n in main.most_common()},
        "background": {name: round(n / total, 4) for name, n in others.most_common() if name != WAITING},
    }


def measurements(
    folder: Path, *, seconds: float, timeout: float, scratch: str, small: bool
) -> Iterator[dict[str, Any]]:
    """One line for each setup of the `training` suite that has one thread, eager and compiled."""
    place = data.made(data.dataset("narrow", small=small), folder)
    setups = [setup for setup in SUITES["training"].setups if setup.threads == 1 and setup.net in ("net", "mlp")]
    for setup in setups[:1] if small else setups:
        for case in ("tidemill", "tidemill_compiled"):
            work = Work(str(place), setup.batch, seconds, setup.threads, scratch=scratch, net=setup.net or "net")
            about = {"suite": "profile", "case": case, "net": setup.net, "batch": setup.batch}
            yield about | measured_apart("profile", case, work, timeout)


def newest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last measurement of each setup and case."""
    found = {
        (line["net"], line["batch"], line["case"]): line
        for line in lines
        if line["suite"] == "profile" and "main" in line
    }
    return list(found.values())
