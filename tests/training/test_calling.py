"""Threads of one process: one may train while another loads a version or predicts, and neither disturbs the other."""

import threading
from collections.abc import Callable

import torch

from tests.training.rows import DropoutNet, begin, cut, numbers_table, plain_spec
from tidemill.tasks.training.calling import numbered, usual_types
from tidemill.tasks.training.loop import train_pass
from tidemill.tasks.training.models import build
from tidemill.tasks.training.steps import Steps

GROUPS = cut(numbers_table(200))
SPEC = plain_spec(model={"factory": f"{DropoutNet.__module__}:DropoutNet"}, batch_size=8)


def test_a_cuda_device_has_its_number_and_others_have_none() -> None:
    """A rank that kept the random numbers of device 0 would take memory there."""
    assert [numbered(torch.device(name)) for name in ("cpu", "mps", "cuda:0", "cuda:1")] == [[], [], [0], [1]]


def trained() -> bytes:
    learner = begin(SPEC, GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    return learner.dump()[0]


def beside(act: Callable[[], object], run: Callable[[], bytes]) -> bytes:
    """What `run` returns while a thread does `act` again and again."""
    stop = threading.Event()

    def again() -> None:
        while not stop.is_set():
            act()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        return run()
    finally:
        stop.set()
        thread.join()


def test_a_network_that_is_built_beside_a_training_does_not_change_what_it_draws() -> None:
    alone, features = trained(), begin(SPEC, GROUPS).features
    assert beside(lambda: build(SPEC, features), trained) == alone


def test_float32_is_the_default_type_until_the_last_of_several_threads_needs_it_no_more() -> None:
    before, first, second = torch.get_default_dtype(), usual_types(), usual_types()
    torch.set_default_dtype(torch.float64)
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # of another thread, which began earlier
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(before)
