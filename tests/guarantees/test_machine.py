"""Random histories of the whole system; see `machine.py` for what may happen in them and how to play a failure again."""

import secrets
import uuid
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.guarantees.machine import LocalMachine, Machine, Meanwhile, Plan, World


@pytest.mark.timeout(14_400)
@pytest.mark.parametrize(
    ("machine", "sample", "full_figure"), [(Machine, 16, 2000), (LocalMachine, 2, 100)], ids=["memory", "local"]
)
def test_any_history_is_sound(
    machine: type[Machine],
    sample: int,
    full_figure: int,
    full: bool,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    """CI: the same examples each time, of 30 steps. Full: new ones, of 50, unless `--hypothesis-seed` asks for old ones."""
    machine.executed.clear()
    asked = request.config.getoption("--hypothesis-seed")
    drawn = int(asked) if asked is not None else secrets.randbits(32) if full else 0
    print(f"--hypothesis-seed={drawn}")
    chosen = settings(
        max_examples=full_figure if full else sample,
        stateful_step_count=50 if full else 30,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seed(drawn)(machine), settings=chosen)
    for what, executed in machine.executed.items():
        record_property(what, executed)
    print(f"{machine.__name__}: {dict(machine.executed)}")
    assert machine.executed["examples"] >= chosen.max_examples


@pytest.mark.parametrize("at", range(6, 20, 3))
def test_a_shard_is_rejected_once_though_another_run_rejected_it_and_may_not_delete(at: int) -> None:
    """A run finds that a shard breaks training, and goes on from a head that rejected its candidates and still owes them."""
    world = World(f"memory://{uuid.uuid4().hex}")
    world.produce("m.parquet", "corrupt")
    world.produce("zz.parquet", "breaks training")
    overtaken = Meanwhile(at, "train", (3, Plan(denied=True)))
    world.train(0, Plan(meanwhile=(overtaken,), denied=True))
    world.end()
    world.forget()
