"""Inputs run in a process, which `test_fuzz.py` starts as a child of its own.

An input follows from its target's name and its seed alone. This checks a single one again, with the whole traceback:

    python -m tests.guarantees.fuzz.run shard 17
"""

import faulthandler
import gc
import json
import mmap
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import torch

from tests.guarantees.fuzz.mutate import Random
from tests.guarantees.fuzz.targets import TARGETS, Check

SECONDS = 30
"""What one input may take by the clock. The slowest ones take a fraction of a second, also on a busy machine."""
ADDRESS_SPACE = 3 * 2**30
"""What a child may map beyond what it has mapped when the first input begins."""
GROWTH = 96 * 2**20
"""How much more memory may be resident after the last input than after the first fifth of them."""


# ---- running them --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Result:
    """What a child tells of its inputs."""

    outcomes: dict[str, int]
    slowest_seconds: float
    cpu_seconds: float
    growth_bytes: int
    """Resident at the end, less what was resident after the first fifth of the inputs."""
    failed: int | None = None
    """Seed of the input that failed."""
    reason: str = ""


def random_of(target: str, seed: int) -> Random:
    return Random(f"{target} {seed}")


def _pages(index: int) -> int:
    """Bytes of this process by /proc: 0 mapped, 1 resident."""
    return int(Path("/proc/self/statm").read_text().split()[index]) * resource.getpagesize()


def _resident() -> int:
    gc.collect()
    pa.default_memory_pool().release_unused()
    return _pages(1)


def run(target: str, make: Callable[[Path], Check], inputs: int, folder: Path, seconds: float) -> None:
    """Check so many inputs in this process. Writes the seed in hand to `folder/seed` and the result to `folder/result`.

    Ends the process if an input takes too long; its stack is then in `folder/stacks`, as it is if the process crashes.
    """
    torch.set_num_threads(1)
    with (folder / "stacks").open("w") as stacks, (folder / "seed").open("w+b") as seed_file:
        seed_file.write(bytes(8))
        seed_file.flush()
        seed_at = mmap.mmap(seed_file.fileno(), 8)  # survives whatever becomes of the process
        faulthandler.enable(stacks)
        (folder / "data").mkdir()
        check = make(folder / "data")
        limit = _pages(0) + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        outcomes: Counter[str] = Counter()
        slowest, before = 0.0, 0
        failed, reason = None, ""
        for seed in range(inputs):
            if seed == inputs // 5:
                before = _resident()
            seed_at[:] = seed.to_bytes(8, "little")
            faulthandler.dump_traceback_later(seconds, exit=True, file=stacks)
            started = time.perf_counter()
            try:
                outcomes[check(random_of(target, seed))] += 1
            except BaseException:  # noqa: BLE001  # Rust's panics are no Exceptions
                failed, reason = seed, traceback.format_exc()
                break
            slowest = max(slowest, time.perf_counter() - started)
        faulthandler.cancel_dump_traceback_later()
        result = Result(dict(outcomes), slowest, time.process_time(), _resident() - before, failed, reason)
        (folder / "result").write_text(json.dumps(result.__dict__))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        torch.set_num_threads(1)
        print(TARGETS[sys.argv[1]](Path(name))(random_of(sys.argv[1], int(sys.argv[2]))))
