"""Several calls at once: in order, bounded, and none after an error."""

import threading

import pytest

from tidemill.storage.parallel import concurrently


def test_results_are_in_the_order_of_the_items_whichever_ends_first() -> None:
    last = threading.Event()

    def call(item: int) -> int:
        if item == 3:
            last.set()
        else:
            assert last.wait(60)
        return 10 * item

    assert concurrently(call, range(4), 4) == [0, 10, 20, 30]


def test_no_more_are_under_way_than_workers() -> None:
    under_way: list[int] = []
    most, meeting = [0], threading.Barrier(3)

    def call(item: int) -> None:
        under_way.append(item)
        most[0] = max(most[0], len(under_way))
        meeting.wait(60)  # three are under way together
        under_way.remove(item)

    concurrently(call, range(9), 3)
    assert most == [3]


@pytest.mark.parametrize(("items", "workers"), [(range(4), 1), (range(1), 4), ([], 4)])
def test_one_worker_or_one_item_needs_no_thread(items, workers) -> None:
    assert concurrently(lambda item: threading.current_thread(), items, workers) == [threading.current_thread()] * len(
        items
    )


def test_after_an_error_no_call_begins_and_the_first_in_order_is_raised_once_nothing_is_under_way() -> None:
    failed, begun, ended = threading.Event(), set(), []

    def call(item: int) -> None:
        begun.add(item)
        if item == 0:
            assert failed.wait(60)
            ended.append(item)
            raise ValueError("first")
        failed.set()
        raise ValueError("second")

    with pytest.raises(ValueError, match="first"):
        concurrently(call, range(1000), 2)
    assert (begun, ended) == ({0, 1}, [0])


def test_items_that_are_made_one_by_one_are_taken_no_faster_than_calls_end() -> None:
    taken, ended = 0, 0

    def items():
        nonlocal taken
        for item in range(50):
            taken += 1
            assert taken - ended <= 3 + 1
            yield item

    def call(item: int) -> int:
        nonlocal ended
        ended += 1
        return item

    assert concurrently(call, items(), 3) == [*range(50)]


def test_an_error_of_the_items_is_raised_once_nothing_is_under_way() -> None:
    begun, ended = threading.Event(), []

    def items():
        yield 0
        assert begun.wait(60)
        raise ValueError("of the items")

    def call(item: int) -> None:
        begun.set()
        ended.append(item)

    with pytest.raises(ValueError, match="of the items"):
        concurrently(call, items(), 2)
    assert ended == [0]
