"""What is read of a history: each manifest once, and none that is not part of it."""

import pytest

from tests.storage.faults import Call, hooked
from tests.tasks.history.made import Story
from tidemill.storage.errors import CorruptObject, UnknownModel
from tidemill.storage.log import VersionLog
from tidemill.storage.manifest import checked
from tidemill.tasks.history.notebook import history
from tidemill.tasks.history.reading import HistoryReader, gates


def story(versions: int = 5) -> Story:
    told = Story()
    told.batch()
    for number in range(1, versions):
        told.online([1.0 + number, 2.0 + number], decision="refused" if number == 3 else "promoted")
    return told


def test_a_history_has_the_versions_oldest_first_with_their_shards_and_decisions() -> None:
    told = story()
    found = history(told.log.store.url, "flights")
    assert [version.number for version in found.versions] == [0, 1, 2, 3, 4]
    assert [shard.score["mae"] for _, shard in found.shards] == [2, 3, 3, 4, 4, 5, 5, 6]
    assert [(version.number, gate.decision) for version, gate in gates(found)] == [
        (1, "promoted"),
        (2, "promoted"),
        (3, "refused"),
        (4, "promoted"),
    ]
    assert found.batch is not None
    assert found.batch.version == 0
    assert found.metric == "mae"


@pytest.mark.parametrize(
    ("spec", "metric"),
    [
        ({"task": "regression", "loss": "l1"}, "mae"),
        ({"task": "regression", "loss": None}, "rmse"),
        ({"task": "binary"}, "loss"),
        ({"task": None}, "rmse"),
        ({}, "rmse"),
    ],
)
def test_without_a_decision_of_the_gate_the_metric_is_that_of_the_task(spec: dict[str, object], metric: str) -> None:
    told = Story(spec=spec)
    told.batch()
    assert history(told.log.store.url, "flights").metric == metric


def test_a_reader_reads_each_manifest_once_and_what_is_new_the_next_time() -> None:
    told = story(40)
    read: list[str] = []

    def note(call: Call) -> None:
        if (call.verb, call.phase) == ("read", "before") and "/log/" in call.key:
            read.append(call.key)

    reader = HistoryReader(VersionLog(hooked(note)(told.log.store.url), "flights"))
    assert len(reader.read().versions) == 40
    assert len(read) == 40 + 1  # the parent of the head twice: when the head is found, too
    read.clear()
    told.online([3.0])
    assert [version.number for version in reader.read().versions] == list(range(41))
    assert len(read) <= 4


def test_only_the_last_versions_are_kept_and_the_batch_training_before_them_is_found_by_the_records_of_runs() -> None:
    told = story(20)
    told.log.store.write("flights/runs/abc/done.json", checked({"version": 0}))
    told.log.store.write("flights/runs/abc/run.json", checked({"after": -1}))
    found = HistoryReader(told.log, last=4).read()
    assert [version.number for version in found.versions] == [16, 17, 18, 19]
    assert found.batch is not None
    assert found.batch.version == 0


def test_a_batch_training_before_them_that_left_no_record_is_said_to_be_unknown() -> None:
    assert HistoryReader(story(20).log, last=4).read().batch is None


def test_a_registry_that_was_restored_is_read_anew() -> None:
    told = story(6)
    reader = HistoryReader(told.log)
    assert reader.read().head.version == 5
    told.rewind(2)
    for score in (9.0, 9.5, 9.75):
        told.online([score])
    found = reader.read()
    assert found.versions[-1].shards[0].score == {"mae": 9.75}
    assert [version.number for version in found.versions] == list(range(6))
    assert found.versions[3].shards[0].score == {"mae": 9.0}


def test_an_altered_manifest_and_a_wrong_name_are_errors() -> None:
    told = story()
    data = told.log.store.read(told.log.manifest_key(2))
    told.log.store.write(told.log.manifest_key(2), data.replace(b'"rows": 100', b'"rows": 999'))
    with pytest.raises(CorruptObject, match="edited or damaged"):
        HistoryReader(told.log).read()
    with pytest.raises(UnknownModel, match="Did you mean 'flights'"):
        history(told.log.store.url, "flight")


def test_a_version_that_does_not_follow_from_the_one_before_is_an_error() -> None:
    told, other = story(4), story(2)
    other.online([7.0, 8.0])
    told.log.store.write(told.log.manifest_key(2), other.log.store.read(other.log.manifest_key(2)))
    with pytest.raises(CorruptObject, match="made from another version"):
        HistoryReader(told.log).read()
