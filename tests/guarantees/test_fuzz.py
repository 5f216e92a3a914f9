"""Whatever bytes stand where Tidemill reads: only the stated errors, no crash, no hang, no growing memory, nothing wrongly
accepted. The inputs and what must hold of each are in `fuzz/`; here they run, each target in a child process of its own.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guarantees.children import start_server
from tests.guarantees.fuzz.mutate import Random
from tests.guarantees.fuzz.run import GROWTH, SECONDS, Result, run
from tests.guarantees.fuzz.targets import TARGETS, Check

INPUTS = {
    "shard": (200, 12_000),
    "step": (20, 400),
    "learner": (300, 15_000),
    "manifest": (500, 25_000),
    "version": (200, 8_000),
    "tombstones": (400, 20_000),
    "runs": (300, 12_000),
    "spec": (400, 20_000),
    "keys": (60, 2_000),
}
"""For each target, how many inputs in CI, and with --full."""


def fuzz(
    target: str, make: Callable[[Path], Check], inputs: int, folder: Path, seconds: float = SECONDS
) -> tuple[Result | None, str]:
    """Run inputs in a child process. (None if the process ended too soon, how to repeat the last input and its stack)."""
    start_server()
    child = multiprocessing.get_context("forkserver").Process(target=run, args=(target, make, inputs, folder, seconds))
    child.start()
    child.join()
    seed = int.from_bytes((folder / "seed").read_bytes(), "little")
    repeat = f"python -m tests.guarantees.fuzz.run {target} {seed}\n{(folder / 'stacks').read_text()}"
    stored = folder / "result"
    return (Result(**json.loads(stored.read_text())) if stored.exists() else None), repeat


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_does_harm(
    target: str, full: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    inputs = INPUTS[target][full]
    started = time.monotonic()
    result, repeat = fuzz(target, TARGETS[target], inputs, tmp_path)
    assert result is not None, f"an input ended the process, or took more than {SECONDS} s: {repeat}"
    assert result.failed is None, f"{repeat}\n{result.reason}"
    assert sum(result.outcomes.values()) == inputs
    assert len(result.outcomes) > 1, f"mutations that are all alike: {result.outcomes}"
    assert result.growth_bytes < GROWTH
    figures = {
        "inputs": inputs,
        "outcomes": result.outcomes,
        "slowest input, s": round(result.slowest_seconds, 3),
        "growth, MiB": round(result.growth_bytes / 2**20, 1),
        "CPU seconds": round(result.cpu_seconds, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    record_property(target, json.dumps(figures))
    print(f"{target}: {json.dumps(figures)}")


def test_every_target_is_run_and_the_full_figure_is_a_hundred_thousand() -> None:
    assert INPUTS.keys() == TARGETS.keys()
    assert sum(inputs for _, inputs in INPUTS.values()) >= 100_000


# ---- that the harness can see ----------------------------------------------------------------------------------------


def crashes(_: Path) -> Check:
    """Ends the process by a signal at the fourth input."""
    seen = 0

    def check(_: Random) -> str:
        nonlocal seen
        seen += 1
        if seen == 4:
            os.kill(os.getpid(), signal.SIGSEGV)
        return "accepted"

    return check


def hangs(_: Path) -> Check:
    """Never returns from a system call."""
    return lambda _: str(signal.pause())


def allocates(_: Path) -> Check:
    """Asks for more than a child may map."""
    return lambda _: str(len(bytearray(4 * 2**30)))


def leaks(_: Path) -> Check:
    """Keeps 40 MiB of each input."""
    kept: list[bytes] = []

    def check(rng: Random) -> str:
        kept.append(rng.randbytes(2**20) * 40)
        return str(len(kept))

    return check


def test_a_crash_names_the_input(tmp_path: Path) -> None:
    result, repeat = fuzz("shard", crashes, 10, tmp_path)
    assert result is None
    assert "fuzz.run shard 3\n" in repeat
    assert "Segmentation fault" in repeat


def test_a_hang_names_the_input(tmp_path: Path) -> None:
    result, repeat = fuzz("shard", hangs, 10, tmp_path, seconds=0.2)
    assert result is None
    assert "fuzz.run shard 0\nTimeout" in repeat


def test_an_error_that_is_not_stated_names_the_input(tmp_path: Path) -> None:
    result, repeat = fuzz("shard", allocates, 10, tmp_path)
    assert result is not None
    assert (result.failed, "MemoryError" in result.reason) == (0, True)
    assert "fuzz.run shard 0\n" in repeat


def test_growing_memory_is_seen(tmp_path: Path) -> None:
    result, _ = fuzz("shard", leaks, 5, tmp_path)
    assert result is not None
    assert result.failed is None
    assert result.growth_bytes > GROWTH
