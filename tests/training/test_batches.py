"""Streaming: every row once, in an order that only the seed decides, with bounded windows."""

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from random import Random

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.rows import TableGroup, cut, encoded, numbers_table, plain_spec, same_bits
from tidemill.tasks.training import groups as groups_module
from tidemill.tasks.training import packing
from tidemill.tasks.training.batches import Stream
from tidemill.tasks.training.cutting import Blocks, even
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.groups import Split, prefetch, read_ahead, stable_seed
from tidemill.tasks.training.order import Place
from tidemill.tasks.training.pool import WindowPool

ROW_BYTES = 8 + 4  # one float32 feature, the target, and the place in the window


def counted(rows, **more):
    """A table whose feature and target are both the row's number."""
    numbers = pa.array(range(rows), pa.float32())
    return pa.table({"x0": numbers, "y": numbers, **more})


def stream(groups, **arguments):
    features = Features.resolve(plain_spec(1), groups[0].schema)
    return Stream(groups, features, **({"batch_size": 10, "window_bytes": 2**20, "shuffle_seed": None} | arguments))


def rows_of(batches):
    return torch.cat([batch.y_B for batch in batches]).long().tolist()


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 50),
    window_rows=st.integers(1, 100),
    shuffled=st.booleans(),
    fraction=st.sampled_from([None, 0.3]),
    unlabelled=st.sets(st.integers(0, 30)),
)
def test_every_labelled_row_comes_once_in_full_batches(sizes, batch_size, window_rows, shuffled, fraction, unlabelled):
    unlabelled -= {0}  # some row has a label
    table = counted(sum(sizes))
    labels = [None if i in unlabelled else i for i in range(sum(sizes))]
    groups = cut(table.set_column(1, "y", pa.array(labels, pa.float32())), *sizes)
    split = None if fraction is None else Split(fraction, side="train")
    batches = list(
        stream(
            groups,
            batch_size=batch_size,
            window_bytes=window_rows * ROW_BYTES,
            shuffle_seed=(0, "epoch", 0) if shuffled else None,
            split=split,
        )
    )
    wanted = list(range(sum(sizes)))
    if split is not None:
        wanted = [
            row for row, kept in zip(wanted, torch.cat([split.rows(g) for g in groups]).tolist(), strict=True) if kept
        ]
    wanted = [row for row in wanted if row not in unlabelled]
    rows = rows_of(batches) if batches else []
    assert sorted(rows) == wanted
    assert shuffled or rows == wanted
    assert all(len(batch.y_B) == batch_size for batch in batches[:-1])
    assert all(0 < len(batch.y_B) <= batch_size for batch in batches)
    assert all(torch.equal(batch.x_BF.squeeze(1), batch.y_B) for batch in batches)
    assert all(batch.x_BF.is_contiguous() and batch.ids_BC is None for batch in batches)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    batch_size=st.integers(1, 50),
    window_rows=st.integers(1, 100),
    shuffled=st.booleans(),
    fraction=st.sampled_from([None, 0.3]),
    unlabelled=st.sets(st.integers(0, 30)),
    stop=st.integers(1, 50),
)
def test_a_pass_goes_on_from_any_batch(sizes, batch_size, window_rows, shuffled, fraction, unlabelled, stop):
    unlabelled -= {0}
    labels = [None if i in unlabelled else i for i in range(sum(sizes))]
    groups = cut(counted(sum(sizes)).set_column(1, "y", pa.array(labels, pa.float32())), *sizes)
    split = None if fraction is None else Split(fraction, side="train")

    def made(start: Place | None) -> Stream:
        return stream(
            groups,
            plan=plan,
            window_bytes=window_rows * ROW_BYTES,
            shuffle_seed=(0, "epoch", 0) if shuffled else None,
            split=split,
            start=start,
        )

    plan = None
    rows = sum(len(batch.y_B) for batch in made(None))
    plan = [Blocks(size, 1, count) for size, count in even(rows, batch_size)]
    whole = made(None)
    batches = list(whole)
    stop = min(stop, len(batches))
    stopped, used = made(None), 0
    for batch in islice(stopped, stop):
        used += len(batch.y_B)
        place = stopped.place(used)
    if not batches:
        return
    rest = made(place)
    for mine, theirs in zip(rest, batches[stop:], strict=True):
        assert all(a is b is None or same_bits(a, b) for a, b in zip(mine, theirs, strict=True))
        assert mine.y_B.data_ptr() % 64 == theirs.y_B.data_ptr() % 64, "sums may depend on where rows lie"
    assert (rest.rows, rest.unlabelled) == (whole.rows, whole.unlabelled)
    assert rest.place(rows) == whole.place(rows)


@pytest.mark.parametrize("shuffled", [False, True])
def test_row_groups_that_a_pass_has_used_are_not_read_again(shuffled):
    """Ten row groups of 100; windows of two."""
    groups = cut(counted(1000), *[100] * 9)
    arguments = {"plan": [Blocks(50, 1, 20)], "window_bytes": 250 * ROW_BYTES}
    arguments["shuffle_seed"] = (0, "epoch", 0) if shuffled else None
    stopped = stream(groups, **arguments)
    for used, batch in enumerate(stopped, 1):
        place = stopped.place(used * len(batch.y_B))
        if used == 9:
            break
    for group in groups:
        group.reads.clear()
    rest = rows_of(stream(groups, start=place, **arguments))
    assert len(rest) == 550
    read = {i for i, group in enumerate(groups) if group.reads}
    assert read == {row // 100 for row in rest}
    assert all(len(group.reads) <= 1 for group in groups)
    assert len(read) == 6


def test_the_order_is_decided_by_the_seed_only():
    groups = cut(counted(1000), 300, 300)
    first = rows_of(stream(groups, shuffle_seed=(0, "epoch", 0)))
    torch.rand(3)
    assert rows_of(stream(groups, shuffle_seed=(0, "epoch", 0))) == first
    assert rows_of(stream(groups, shuffle_seed=(0, "epoch", 1))) != first
    assert rows_of(stream(groups, shuffle_seed=(1, "epoch", 0))) != first


def test_a_window_mixes_whole_row_groups_and_no_more():
    groups = cut(counted(1000), *[100] * 9)
    rows = rows_of(stream(groups, window_bytes=250 * ROW_BYTES, shuffle_seed=(0,)))
    windows = [{row // 100 for row in rows[at : at + 200]} for at in range(0, 1000, 200)]
    assert all(len(window) == 2 for window in windows)  # two groups of 100 fit 250 rows
    assert rows[:200] != sorted(rows[:200])
    assert [row // 100 for row in rows[:200]] != sorted(row // 100 for row in rows[:200])
    assert [min(window) for window in windows] != sorted(min(window) for window in windows)


def test_windows_lie_where_torch_would_put_them():
    """Aligned, as torch's own memory: how a matrix product rounds may depend on it."""
    groups = cut(numbers_table(4000, 10), 1000, 1000, 1000)
    features = Features.resolve(plain_spec(), groups[0].schema)
    window = 1000 * (features.row_bytes + 4)
    for _ in range(5):
        batches = Stream(groups, features, batch_size=1000, window_bytes=window, shuffle_seed=(0, "epoch", 0))
        for batch in batches:
            assert [tensor.data_ptr() % 64 for tensor in (batch.x_BF, batch.y_B)] == [0, 0]


def test_a_row_group_larger_than_the_window_is_mixed_in_slices():
    rows = rows_of(stream(cut(counted(1000)), window_bytes=250 * ROW_BYTES, shuffle_seed=(0,)))
    slices = [{row // 250 for row in rows[at : at + 250]} for at in range(0, 1000, 250)]
    assert sorted(map(tuple, slices)) == [(0,), (1,), (2,), (3,)]
    assert slices != [{0}, {1}, {2}, {3}]


@pytest.mark.slow
def test_shuffling_is_uniform():
    groups = cut(counted(20), 10)
    first_rows = torch.tensor([rows_of(stream(groups, shuffle_seed=("s", i)))[0] for i in range(600)])
    counts = first_rows.bincount(minlength=20)
    assert counts.min() > 10  # 30 expected; 10 is four standard deviations away
    assert counts.max() < 55


def test_categories_travel_with_their_rows():
    names = [f"name {i}" for i in range(100)]
    table = counted(100, s=pa.array(names))
    spec = plain_spec(1, features=["x0", {"name": "s", "buckets": 10**9}])
    features = Features.resolve(spec, table.schema)
    expected = features.encode(table, "all").ids_NC
    for seed in (None, (0,)):
        batches = list(Stream(cut(table, 33, 33), features, batch_size=7, window_bytes=900, shuffle_seed=seed))
        rows, ids = rows_of(batches), torch.cat([batch.ids_BC for batch in batches])
        assert torch.equal(ids, expected[rows])


def test_sequences_weights_and_targets_travel_with_their_rows():
    lists = [None if i % 7 == 0 else [f"item {j}" for j in range(i % 5)] for i in range(100)]
    holes = pa.array([None if i % 10 == 3 else i for i in range(100)])
    table = counted(100, s=lists, c=pa.array([f"{i}" for i in range(100)]), z=holes, w=pa.array(range(100)))
    features_ = ["x0", {"name": "s", "length": 3}, {"name": "c", "buckets": 10**9}]
    spec = plain_spec(1, features=features_, target=["y", "z"], sample_weight="w")
    features = Features.resolve(spec, table.schema)
    whole = encoded(features, table)
    kept = [i for i in range(100) if i % 10 != 3]
    for seed in (None, (0,)):
        for sizes in ((), (33, 33), (1, 60)):  # how the file is cut decides nothing but the order
            found = Stream(cut(table, *sizes), features, batch_size=7, window_bytes=1400, shuffle_seed=seed)
            x, ids, y, w = (torch.cat(tensors) for tensors in zip(*found, strict=True))
            rows = y[:, 0].long()
            assert sorted(rows.tolist()) == kept
            assert seed is not None or rows.tolist() == kept
            assert same_bits(x, whole.x_NF[rows])
            assert same_bits(ids, whole.ids_NC[rows])
            assert same_bits(y, whole.y_N[rows])
            assert same_bits(w, whole.w_N[rows])
            assert (found.rows, found.unlabelled) == (90, 10)


def test_long_sequences_count_in_the_window():
    table = counted(1000, s=pa.array([[i] for i in range(1000)]))
    spec = plain_spec(1, features=[{"name": "s", "length": 100}])
    features = Features.resolve(spec, table.schema)
    found = Stream(cut(table), features, batch_size=50, window_bytes=100 * 808, shuffle_seed=(0,))
    rows = rows_of(found)
    assert [len({row // 100 for row in rows[at : at + 100]}) for at in range(0, 1000, 100)] == [1] * 10


def test_rows_without_any_of_the_targets_are_no_pass():
    table = pa.table({"x0": [1.0, 2], "y": [1.0, None], "z": [None, 1.0]})
    features = Features.resolve(plain_spec(1, target=["y", "z"]), table.schema)
    with pytest.raises(ColumnError, match="target 'y' or 'z' is null in all 2 rows"):
        list(Stream(cut(table), features, batch_size=1, window_bytes=99))


def test_a_renamed_weight_or_list_is_found():
    table = counted(200, s=pa.array([[1]] * 200), w=pa.array([1.0] * 200))
    spec = plain_spec(1, features=["x0", {"name": "s", "length": 2}], sample_weight="w", standardize_features=True)
    features = Features.resolve(spec, table.schema).fit(cut(table))
    null_lists = table.set_column(2, "s", pa.nulls(200, pa.list_(pa.int64())))
    with pytest.raises(ColumnError, match="'s' is null in all 200 rows: was it renamed"):
        list(Stream(cut(null_lists), features, batch_size=50, window_bytes=2**20))
    null_weights = table.set_column(3, "w", pa.nulls(200, pa.float64()))
    with pytest.raises(ColumnError, match=r"sample_weight 'w' of part-0.parquet row group 0 is null in 200 rows"):
        list(Stream(cut(null_weights), features, batch_size=50, window_bytes=2**20))


def test_unshuffled_targets_are_views_of_the_table():
    table = counted(100)
    batches = list(stream(cut(table), batch_size=10))
    address = table.column("y").chunk(0).buffers()[1].address
    assert [batch.y_B.data_ptr() - address for batch in batches] == [40 * i for i in range(10)]


def test_only_the_needed_columns_are_read():
    groups = cut(counted(10, other=pa.array(["?"] * 10)), 5)
    list(stream(groups))
    assert [group.reads for group in groups] == [[["x0", "y"]]] * 2


def test_unlabelled_rows_of_the_split_are_counted():
    table = pa.table({"x0": [1.0] * 100, "y": pa.array([None, 1.0] * 50)})
    groups, split = cut(table, 40), Split(0.5, side="holdout")
    kept = torch.cat([split.rows(group) for group in groups])
    for shuffle_seed in (None, (0,)):
        found = stream(groups, split=split, shuffle_seed=shuffle_seed)
        assert len(rows_of(found)) == found.rows == int(kept[1::2].sum())
        assert found.unlabelled == int(kept[0::2].sum())


def test_an_error_in_a_later_row_group_reaches_the_loop():
    groups = cut(counted(30), 10, 10)
    groups[2].table = groups[2].table.set_column(0, "x0", pa.array([float("nan")] * 10, pa.float32()))
    batches = iter(stream(groups))
    next(batches)
    with pytest.raises(ColumnError, match="row group 2"):
        list(batches)


def test_every_row_group_has_its_own_schema_checked():
    groups = cut(counted(30), 10, 10)
    groups[1].table = groups[1].table.drop_columns(["x0"])
    with pytest.raises(ColumnError, match=r"'x0' is missing from part-0.parquet row group 1"):
        list(stream(groups, shuffle_seed=(0,)))


def test_leaving_early_ends_the_threads():
    batches = iter(stream(cut(counted(1000), *[10] * 99), shuffle_seed=(0,), window_bytes=100))
    next(batches)
    batches.close()
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-ahead")]


@pytest.mark.parametrize("shuffle_seed", [None, (0,)])
def test_an_error_ends_the_threads_while_its_traceback_lives(shuffle_seed):
    """Left to the garbage collector, they could be joined inside the start of another thread: CPython deadlocks there."""
    groups = cut(counted(1000), *[10] * 99)
    for group in groups[5:]:
        group.table = group.table.set_column(0, "x0", pa.array([float("nan")] * group.num_rows, pa.float32()))
    with pytest.raises(ColumnError) as caught:
        list(stream(groups, shuffle_seed=shuffle_seed, window_bytes=100))
    assert caught.value.__traceback__ is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-ahead")]


def test_operators_of_the_thread_that_works_ahead_use_no_other_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(prefetch(torch.get_num_threads() for _ in range(2))) == [1, 1]
        assert torch.get_num_threads() == 2
        found: list[int] = []
        new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_ahead_makes_one_item_at_a_time_and_keeps_their_order():
    made = []

    def items():
        for i in range(5):
            made.append(i)
            yield i

    for item in prefetch(items()):
        assert item == made[item]
        assert len(made) <= item + 2 <= 6 or item == 4


# ---- reading ahead -------------------------------------------------------------------------------------------------------
class Reads:
    """What has happened to the row groups that share it."""

    def __init__(self):
        self.changed = threading.Condition()
        self.begun, self.threads = [], set()
        self.under_way = self.most_under_way = self.alive = self.most_alive = 0

    def let_go(self):
        with self.changed:
            self.alive -= 1


@dataclass(eq=False)
class FarGroup(TableGroup):
    """A row group that is worth reading beside others."""

    readers: int = 2
    seen: Reads = field(default_factory=Reads)
    wait: Callable[[], None] = lambda: None  # while it is read

    def read(self, columns):
        class Memory(np.ndarray):
            """An array that can be watched."""

        seen = self.seen
        with seen.changed:
            seen.begun.append(self.name)
            seen.threads.add(threading.current_thread())
            seen.under_way, seen.alive = seen.under_way + 1, seen.alive + 1
            seen.most_under_way = max(seen.most_under_way, seen.under_way)
            seen.most_alive = max(seen.most_alive, seen.alive)
            seen.changed.notify_all()
        try:
            self.wait()
            arrays = {}
            for column in columns:
                arrays[column] = self.table.column(column).to_numpy().copy().view(Memory)
            weakref.finalize(arrays[columns[0]], seen.let_go)
            return pa.table(
                {
                    name: pa.Array.from_buffers(pa.float32(), len(array), [None, pa.py_buffer(array)])
                    for name, array in arrays.items()
                }
            )
        finally:
            with seen.changed:
                seen.under_way -= 1


def far(groups, **settings):
    """The groups, as far away ones that share what is seen of them."""
    seen = Reads()
    return seen, [FarGroup(group.name, group.table, seen=seen, **settings) for group in groups]


def no_thread_works_ahead():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("tidemill-ahead")]


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("shuffle_seed", [None, (0, "epoch", 0)])
def test_several_readers_give_the_bits_of_one(readers, shuffle_seed):
    near = cut(numbers_table(3000, 3), *[100] * 25)
    random = Random(0)
    seen, groups = far(near, readers=readers, wait=lambda: time.sleep(random.random() / 500))
    spec = plain_spec(3, standardize_features=True)
    unfitted = Features.resolve(spec, near[0].schema)
    features = unfitted.fit(near, Split(0.2, side="train"))
    assert unfitted.fit(groups, Split(0.2, side="train")).state()[1] == features.state()[1]
    for tensor, expected in zip(*(unfitted.fit(some).state()[0].values() for some in (near, groups)), strict=True):
        assert same_bits(tensor, expected)
    arguments = {"batch_size": 64, "window_bytes": 700 * 20, "shuffle_seed": shuffle_seed}
    one, several = (list(Stream(some, features, **arguments)) for some in (near, groups))
    assert len(one) == len(several) == 47
    for batch, expected in zip(several, one, strict=True):
        assert same_bits(batch.x_BF, expected.x_BF)
        assert same_bits(batch.y_B, expected.y_B)
    assert len(seen.begun) == 3 * len(groups)
    assert seen.most_under_way <= readers


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("shuffle_seed", [None, (0,)])
def test_in_memory_is_the_table_in_use_and_one_for_each_reader(readers, shuffle_seed):
    def until_all_read():
        """All but the first two, after which the others begin, wait until every reader has had something to read."""
        with seen.changed:
            assert len(seen.begun) <= 2 or seen.changed.wait_for(lambda: len(seen.threads) == readers, timeout=60)

    seen, groups = far(cut(counted(4000), *[100] * 39), readers=readers, wait=until_all_read)
    for _ in stream(groups, shuffle_seed=shuffle_seed, window_bytes=100 * ROW_BYTES, batch_size=100):
        pass
    assert len(seen.begun) == 40
    assert seen.most_under_way <= readers
    assert seen.most_alive <= readers + 1
    assert len(seen.threads) == readers


def test_readers_work_at_the_same_time():
    together = threading.Barrier(3)
    seen, groups = far(cut(counted(40), *[10] * 3), readers=3)
    for group in groups[1:]:
        group.wait = lambda: together.wait(60)
    assert rows_of(stream(groups)) == list(range(40))
    assert seen.most_under_way == 3


TABLE_BYTES = 2 * 4 * 100


@pytest.mark.parametrize(
    ("allowed", "ahead_of_use"),
    [(0, 1), (2 * TABLE_BYTES - 1, 1), (2 * TABLE_BYTES, 2), (3 * TABLE_BYTES, 3), (2**20, 4)],
)
def test_large_tables_are_read_one_at_a_time(monkeypatch, allowed, ahead_of_use):
    monkeypatch.setattr(groups_module, "AHEAD_BYTES", allowed)
    seen, groups = far(cut(counted(1000), *[100] * 9), readers=4)
    names = [group.name for group in groups]
    for used, _ in enumerate(read_ahead(groups, lambda group: group.read(["x0", "y"])), 1):
        begun = min(max(used + ahead_of_use, 2), 10)
        with seen.changed:
            assert seen.changed.wait_for(lambda begun=begun: len(seen.begun) >= begun, timeout=30)
            assert sorted(seen.begun) == names[:begun]
    assert used == 10


def test_the_error_of_a_row_group_comes_in_its_turn_after_the_same_reads():
    expected = None
    for attempt in range(20):
        random = Random(attempt)
        wait = lambda random=random: time.sleep(random.random() / 1000)  # noqa: E731
        seen, groups = far(cut(counted(100), *[10] * 9), readers=3, wait=wait)
        groups[4].table = groups[4].table.drop_columns(["x0"])
        done = []
        with pytest.raises(ColumnError, match=r"'x0' is missing from part-0.parquet row group 4") as caught:
            done.extend(stream(groups))
        assert caught.value.__traceback__ is not None
        assert no_thread_works_ahead()
        expected = expected or sorted(seen.begun)
        assert sorted(seen.begun) == expected == [f"part-0.parquet row group {i}" for i in (0, 1, 2, 3, 5, 6)]


def test_batches_before_an_error_are_handed_out():
    _, groups = far(cut(counted(100), *[10] * 9), readers=3)
    groups[4].table = groups[4].table.drop_columns(["x0"])
    batches = iter(stream(groups))
    assert rows_of(next(batches) for _ in range(4)) == list(range(40))
    with pytest.raises(ColumnError, match="row group 4"):
        next(batches)


@pytest.mark.parametrize("shuffle_seed", [None, (0,)])
def test_leaving_early_ends_all_readers(shuffle_seed):
    _, groups = far(cut(counted(1000), *[10] * 99), readers=3)
    batches = iter(stream(groups, shuffle_seed=shuffle_seed, window_bytes=100))
    next(batches)
    batches.close()
    assert no_thread_works_ahead()


def test_an_error_of_the_statistics_ends_all_readers():
    _, groups = far(cut(counted(1000), *[10] * 99), readers=3)
    groups[7].table = groups[7].table.set_column(0, "x0", pa.array([float("inf")] * 10, pa.float32()))
    with pytest.raises(ColumnError, match="NaN, infinity") as caught:
        Features.resolve(plain_spec(1, standardize_features=True), groups[0].schema).fit(groups)
    assert caught.value.__traceback__ is not None
    assert no_thread_works_ahead()


def test_a_single_row_group_needs_no_thread():
    seen, groups = far(cut(counted(10)), readers=3)
    assert rows_of(stream(groups, shuffle_seed=(0,)))
    assert seen.threads == {threading.current_thread()}


# ---- the split -------------------------------------------------------------------------------------------------------
def test_the_sides_of_a_split_are_complements_and_depend_on_the_name_only():
    a, b = TableGroup("a", counted(1000)), TableGroup("b", counted(1000))
    holdout, rest = Split(0.25, side="holdout"), Split(0.25, side="train")
    assert torch.equal(holdout.rows(a), ~rest.rows(a))
    assert torch.equal(holdout.rows(a), holdout.rows(TableGroup("a", counted(1000))))
    assert not torch.equal(holdout.rows(a), holdout.rows(b))
    assert 180 < holdout.rows(a).sum() < 320


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_split_needs_a_share_of_the_rows(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Split(fraction, side="holdout")


def test_seeds_are_stable_across_processes_and_keys_apart():
    assert stable_seed(0, "epoch", 1) == 5471977719921920884  # a change would change every model
    assert stable_seed(0, "epoch", 1) != stable_seed("0", "epoch", 1)
    assert stable_seed("ab", "c") != stable_seed("a", "bc")


def test_two_windows_are_alive_and_no_more(monkeypatch):
    """Also while a batch is in use that straddles two of them."""

    class Memory(np.ndarray):
        """An array that can be watched."""

    alive: set[int] = set()
    made = threading.Condition()
    windows = 0

    def watched(self, n, empty):
        nonlocal windows
        memory = np.empty((n, self.numbers), np.float32).view(Memory)
        weakref.finalize(memory, alive.discard, windows)
        with made:
            alive.add(windows)
            windows += 1
            made.notify_all()
        return torch.from_numpy(memory), None

    monkeypatch.setattr(Features, "allocate", watched)
    groups = cut(counted(40_000), *[1000] * 39)
    taken = 0
    for batch in stream(groups, batch_size=3000, window_bytes=10_000 * ROW_BYTES, shuffle_seed=(0,)):
        taken += len(batch.y_B)
        ahead_of_it = min(4, -(-taken // 10_000) + 1)
        with made:
            assert made.wait_for(lambda wanted=ahead_of_it: windows >= wanted, timeout=30)
        assert len(alive) <= 2
    assert windows == 4


def test_windows_are_filled_with_the_rows_of_the_split(monkeypatch):
    sizes = []
    room = Features.allocate
    monkeypatch.setattr(Features, "allocate", lambda self, n, empty: sizes.append(n) or room(self, n, empty))
    groups = cut(counted(1000), *[10] * 99)
    found = stream(groups, window_bytes=100 * ROW_BYTES, shuffle_seed=(0,), split=Split(0.5, side="train"))
    assert len(rows_of(found)) == sum(sizes)
    assert all(90 < size <= 100 for size in sizes[:-1])


def test_columns_are_converted_a_block_at_a_time(monkeypatch):
    """Else a window would be in memory once more, as float32 columns."""
    lengths = set()
    as_tensor = packing.as_tensor
    monkeypatch.setattr(packing, "as_tensor", lambda array, width: lengths.add(len(array)) or as_tensor(array, width))
    monkeypatch.setattr(packing, "BLOCK_NUMBERS", 1000)
    table = pa.table({"x0": pa.array(range(5000)), "x1": pa.array([None, 1.0] * 2500, pa.float32()), "y": [0.0] * 5000})
    features = Features.resolve(plain_spec(2), table.schema)
    assert len(rows_of(Stream(cut(table), features, batch_size=50, window_bytes=2**20, shuffle_seed=(0,)))) == 5000
    assert lengths == {0, 512, 5000 % 512}


def test_the_error_of_a_whole_column_comes_before_the_last_window():
    table = pa.table({"x0": pa.nulls(200, pa.float32()), "y": [1.0] * 200})
    spec = plain_spec(1, standardize_features=True)
    features = Features.resolve(spec, table.schema).fit(cut(table.set_column(0, "x0", pa.array([1.0] * 200))))
    with pytest.raises(ColumnError, match="'x0' is null in all 200 rows"):
        next(iter(Stream(cut(table), features, batch_size=10, window_bytes=2**20, shuffle_seed=(0,))))


# ---- the memory of windows -------------------------------------------------------------------------------------------
def test_batches_that_are_kept_are_not_written_over():
    groups = cut(counted(1000), *[100] * 10)
    kept = list(stream(groups, window_bytes=100 * ROW_BYTES, shuffle_seed=("seed",)))
    assert sorted(rows_of(kept)) == list(range(1000))
    for batch in kept:
        assert batch.x_BF.squeeze(1).equal(batch.y_B)


@pytest.mark.parametrize("held", [1, 3, 10])
def test_windows_take_turns_in_the_memory_of_two(held):
    """Although whoever uses batches holds some of one window when it takes the first ones of the next."""
    groups = cut(counted(10_000), *[100] * 99)
    batches = iter(stream(groups, window_bytes=200 * ROW_BYTES, shuffle_seed=("seed",)))
    places = set()
    while some := list(islice(batches, held)):
        places.update(batch.x_BF.untyped_storage().data_ptr() for batch in some)
    assert len(places) == 2


def test_a_pass_that_ends_early_ends_though_its_memory_is_held():
    groups = cut(counted(1000), *[100] * 10)
    batches = iter(stream(groups, window_bytes=100 * ROW_BYTES, shuffle_seed=("seed",)))
    held = [next(batches) for _ in range(11)]  # of both windows
    batches.close()
    assert no_thread_works_ahead()
    assert len(rows_of(held)) == 110


def test_memory_comes_back_when_no_tensor_of_it_is_left():
    pool = WindowPool(80, tensors=2)
    first, second = pool.borrow(), pool.borrow()
    x, y = first((10, 1), dtype=torch.float32), first((5,), dtype=torch.int64)
    place, view = x.data_ptr(), y[3:].split(1)
    assert place % 64 == y.data_ptr() % 64 == 0
    assert (x.shape, y.shape, y.dtype) == ((10, 1), (5,), torch.int64)
    del first, x, y
    pool.needed(True)
    fresh = pool.borrow()((10, 1), dtype=torch.float32)
    assert fresh.data_ptr() != place
    pool.needed(False)
    del fresh, view  # of these two, only the latter is the pool's
    assert pool.borrow()((1, 1), dtype=torch.float32).data_ptr() == place
    del second


def test_who_borrows_waits_until_memory_comes_back_or_the_window_is_needed():
    pool = WindowPool(8, tensors=1)
    held = [pool.borrow()((1,), dtype=torch.float32) for _ in range(2)]
    pool.needed(True)
    pool.needed(False)  # is past
    with ThreadPoolExecutor(1) as executor:
        coming = executor.submit(pool.borrow)
        with pytest.raises(TimeoutError):
            coming.result(timeout=0.05)
        place = held.pop().data_ptr()
        held.append(coming.result(timeout=60)((1,), dtype=torch.float32))
        del coming
        assert held[-1].data_ptr() == place
        coming = executor.submit(pool.borrow)
        pool.needed(True)
        held.append(coming.result(timeout=60)((1,), dtype=torch.float32))
    assert len({tensor.data_ptr() for tensor in held}) == 3


# ---- many columns ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("standardize", [False, True])
def test_plain_columns_are_packed_together_with_the_bits_of_each_by_itself(monkeypatch, standardize):
    random = np.random.default_rng(0)
    columns = {f"x{i}": pa.array(random.standard_normal(400, np.float32)) for i in range(80)}
    columns["x40"] = pa.array([None if i % 3 else i for i in range(400)], pa.float32())
    columns["x41"] = pa.array(random.standard_normal(400))
    table = pa.table({**columns, "y": columns["x0"]})
    monkeypatch.setattr(packing, "BLOCK_ROWS", 64)

    def batches():
        features = Features.resolve(plain_spec(80, standardize_features=standardize), table.schema)
        groups = cut(table.slice(13, 300), 100, 150)
        settings = {"batch_size": 100, "window_bytes": 2**20, "shuffle_seed": ("seed",)}
        return torch.cat([batch.x_BF for batch in Stream(groups, features.fit(groups), **settings)])

    together = batches()
    monkeypatch.setattr(packing, "TOGETHER", 1000)
    assert together.equal(batches())
    assert together.isfinite().all()
