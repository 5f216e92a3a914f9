"""Many places at once: the same as `relation` says of each two of them."""

import itertools
from pathlib import Path

from tidemill.storage.crowding import crowded
from tidemill.storage.overlap import Relation, relation
from tidemill.storage.urls import open_store


def test_it_says_of_all_what_relation_says_of_each_two(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    names = ["", "/a", "/a/b", "/a/b/new/deep", "/a/b/new", "/a/bc", "/c", "/c/b", "/d/new", "/d"]
    urls = {open_store(f"{tmp_path}{name}").url for name in names}
    urls |= {f"s3://bucket{name}" for name in ("", "/a", "/a/b", "/ab", "/a/b/c")} | {"s3://bucket2/a", "memory://x/a"}
    inboxes = sorted(urls)[::2]
    others = sorted(urls - set(inboxes))
    found = set(crowded(inboxes, others))
    wanted = set()
    for inbox, place in itertools.product(inboxes, sorted(urls)):
        lies = relation(inbox, place)
        if inbox != place and lies is not Relation.APART:
            wanted.add((inbox, lies, place))
    assert found == wanted
    assert {lies for _, lies, _ in found} == {Relation.SAME, Relation.INSIDE, Relation.HOLDS}


def test_a_place_that_is_an_inbox_and_something_else_is_found() -> None:
    assert list(crowded(["s3://b/x"], ["s3://b/x"])) == [("s3://b/x", Relation.SAME, "s3://b/x")]
    assert list(crowded(["s3://b/x", "s3://b/y"], ["s3://b/z", "s3://b/z/1"])) == []
