"""How places lie to each other, whatever their URLs are spelled like; and what may not overlap."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.storage import case_blind
from tidemill.storage.errors import InvalidURL, PlacesOverlap
from tidemill.storage.overlap import (
    PLACES,
    Relation,
    allowed,
    allowed_places,
    check_holdout,
    inside,
    keep_out_of_dataset,
    keep_out_of_inbox,
    keep_out_of_registry,
    relation,
)
from tidemill.storage.urls import open_store

SAME, INSIDE, HOLDS, APART = Relation
MIRRORED = {SAME: SAME, INSIDE: HOLDS, HOLDS: INSIDE, APART: APART}


def check(one: str, other: str, expected: Relation) -> None:
    """Both ways round."""
    assert relation(open_store(one).url, open_store(other).url) is expected
    assert relation(open_store(other).url, open_store(one).url) is MIRRORED[expected]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`real/inbox/sub` and `other`, links to them from everywhere; the current folder is `real`."""
    for folder in ("real/inbox/sub", "real/inbox2", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "real/inbox/one.parquet").write_bytes(b"")
    os.symlink("real", tmp_path / "link")
    os.symlink(tmp_path / "real/inbox", tmp_path / "other/there")
    os.symlink("link/inbox/sub", tmp_path / "deep")
    os.symlink("real/not-yet", tmp_path / "dangling")
    os.symlink("loop", tmp_path / "loop")
    os.symlink(tmp_path / "other", tmp_path / "real/inbox/out")
    monkeypatch.chdir(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    return str(tmp_path)


SPELLINGS = [
    ("{t}/real/inbox", "{t}/real/inbox", SAME),
    ("{t}/real/inbox", "{t}/real/inbox/", SAME),
    ("{t}/real/inbox", "{t}/real//inbox", SAME),
    ("{t}/real/inbox", "/{t}/real/inbox", SAME),
    ("{t}/real/inbox", "//{t}/real/inbox", SAME),
    ("{t}/real/inbox", "file://{t}/real/inbox", SAME),
    ("{t}/real/inbox", "file:///{t}/real/inbox", SAME),
    ("{t}/real/inbox", "file://localhost{t}/real/inbox/", SAME),
    ("{t}/real/inbox", "{t}/real/./inbox", SAME),
    ("{t}/real/inbox", "{t}/real/x/../inbox", SAME),
    ("{t}/real/inbox", "inbox", SAME),
    ("{t}/real/inbox", "./inbox/", SAME),
    ("{t}/real/inbox", "../real/inbox", SAME),
    ("{t}/real/inbox", "~/there", SAME),
    ("{t}/real/inbox", "{t}/link/inbox", SAME),
    ("{t}/real/inbox", "{t}/other/there", SAME),
    ("{t}/real/inbox/sub", "{t}/deep", SAME),
    ("{t}/real", ".", SAME),
    ("{t}/real/not-yet", "{t}/dangling", SAME),
    ("{t}/real/not-yet", "{t}/link/not-yet", SAME),
    ("{t}/real/not/yet", "{t}/link/not//yet/", SAME),
    ("{t}/loop", "{t}/loop", SAME),
    ("{t}/deep", "{t}/link/inbox", INSIDE),
    ("{t}/deep", ".", INSIDE),
    ("{t}/other/there/sub", "inbox", INSIDE),
    ("{t}/other/there/not-yet", "inbox", INSIDE),
    ("{t}/dangling", "{t}/real", INSIDE),
    ("{t}/dangling/below", "{t}/real/not-yet", INSIDE),
    ("{t}/link/not/yet", "{t}/real/not", INSIDE),
    ("{t}/real/inbox/one.parquet", "{t}/link/inbox", INSIDE),
    ("{t}/real/inbox", "/", INSIDE),
    ("{t}/real/inbox", "{t}/real/inbox2", APART),
    ("{t}/real/inbox", "{t}/real/inbo", APART),
    ("{t}/real/inbox", "{t}/real/Inbox", APART),
    ("{t}/real/not", "{t}/real/not-yet", APART),
    ("{t}/real/not/a", "{t}/real/not/b", APART),
    ("{t}/other", "{t}/real/inbox", APART),  # the link from one to the other is not followed by a listing
    ("{t}/real/inbox/out", "{t}/real/inbox", APART),  # what a link leads to lies where it leads
    ("{t}/real/inbox/out/not-yet", "{t}/real/inbox", APART),
    ("{t}/loop", "{t}/real", APART),
    ("{t}/real/inbox/one.parquet", "{t}/real/inbox/two.parquet", APART),
    ("{t}/real", "s3://real", APART),
    ("{t}/real", "memory://real", APART),
]


@pytest.mark.parametrize(("one", "other", "expected"), SPELLINGS)
def test_a_local_place_is_known_by_what_it_is(tree: str, one: str, other: str, expected: Relation) -> None:
    check(one.format(t=tree), other.format(t=tree), expected)


@pytest.mark.parametrize("scheme", ["s3", "memory"])
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("bucket", "bucket", SAME),
        ("bucket", "bucket/", SAME),
        ("bucket/a/b", "bucket/a/b/", SAME),
        ("bucket/a/b", "bucket/a", INSIDE),
        ("bucket/a", "bucket", INSIDE),
        ("bucket/ab", "bucket/a", APART),
        ("bucket/a", "bucket/A", APART),
        ("bucket/a/b", "bucket/a/c", APART),
        ("bucket-b/a", "bucket/a", APART),
        ("bucket/a%20b", "bucket/a b", APART),
    ],
)
def test_a_prefix_is_compared_by_segments(scheme: str, one: str, other: str, expected: Relation) -> None:
    check(f"{scheme}://{one}", f"{scheme}://{other}", expected)


def test_a_folder_that_may_not_be_looked_into_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "closed/inbox").mkdir(parents=True)
    os.symlink("closed", tmp_path / "link")
    (tmp_path / "closed").chmod(0)
    try:
        check(f"{tmp_path}/closed/inbox", f"{tmp_path}/link/inbox", SAME)
        check(f"{tmp_path}/closed/inbox/reg", f"{tmp_path}/link/inbox", INSIDE)
    finally:
        (tmp_path / "closed").chmod(0o700)


# ---- mounts ----------------------------------------------------------------------------------------------------------
def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"only where {command[0]} is there and allowed: {error}")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """`bound` is a bind mount of `real/inbox`, and `holder/bound` one of `real/inbox/sub`."""
    for folder in ("real/inbox/sub/x", "bound", "holder/bound", "apart"):
        (tmp_path / folder).mkdir(parents=True)
    mounts = (("real/inbox", "bound"), ("real/inbox/sub", "holder/bound"))
    done = []
    try:
        for source, point in mounts:
            run("mount", "--bind", f"{tmp_path}/{source}", f"{tmp_path}/{point}")
            done.append(point)
        yield tmp_path
    finally:
        for point in reversed(done):
            subprocess.run(["umount", f"{tmp_path}/{point}"], check=True)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("bound", "real/inbox", SAME),
        ("bound/sub", "real/inbox/sub", SAME),
        ("bound/not-yet", "real/inbox/not-yet", SAME),
        ("bound", "real", INSIDE),
        ("bound/sub/x", "real", INSIDE),
        ("bound/not-yet", "real", INSIDE),
        ("real/inbox/reg", "bound", INSIDE),
        ("holder/bound", "bound", INSIDE),
        ("holder/bound/x", "real", INSIDE),
        ("real/inbox/sub/x", "holder", INSIDE),  # a listing of the holder goes through the mount
        ("bound/sub/x/not-yet", "holder", INSIDE),
        ("bound", "apart", APART),
        ("holder", "real", APART),
        ("real/inbox/not-yet", "holder", APART),
    ],
)
def test_a_bind_mount_is_the_folder_that_it_shows(mounted: Path, one: str, other: str, expected: Relation) -> None:
    check(f"{mounted}/{one}", f"{mounted}/{other}", expected)


@pytest.fixture
def folded(tmp_path: Path) -> Iterator[Path]:
    """A folder in which names that differ in case alone are one name, as on macOS and on FAT."""
    point = tmp_path / "mount"
    point.mkdir()
    with ExitStack() as until_then:
        try:
            until_then.enter_context(case_blind.mounted(point))
        except OSError as error:
            pytest.skip(f"only where FUSE is there and allowed: {error}")
        (point / "Disk").mkdir()
        yield point / "Disk"


def test_names_that_differ_in_case_are_one_place_where_the_file_system_says_so(folded: Path) -> None:
    (folded / "Inbox").mkdir()
    check(f"{folded}/Inbox", f"{folded}/INBOX", SAME)
    check(f"{folded}/inbox/Registry", f"{folded}/Inbox/registry", SAME)
    check(f"{folded}/inbox/registry", f"{folded}/Inbox", INSIDE)
    check(f"{folded}/New/A", f"{folded}/nEW", INSIDE)
    check(f"{folded}/straße", f"{folded}/STRASSE", SAME)
    check(f"{folded}/new", f"{folded}/newer", APART)


# ---- what lies inside ------------------------------------------------------------------------------------------------
def test_keys_of_a_place_inside_another_are_told_by_what_they_are(tree: str) -> None:
    is_inside = inside(open_store(f"{tree}/link").url, open_store(f"{tree}/other/there").url)
    assert [key for key in ("inbox/a", "inbox/sub/b", "inbox2/c", "inbox", "d") if is_inside(key)] == [
        "inbox/a",
        "inbox/sub/b",
        "inbox",
    ]
    one_file = inside(open_store(f"{tree}/real").url, open_store(f"{tree}/link/inbox/one.parquet").url)
    assert [one_file("inbox/one.parquet"), one_file("inbox/two.parquet")] == [True, False]
    nothing = inside(open_store(f"{tree}/real").url, open_store(f"{tree}/other").url)
    assert not nothing("inbox/a")


def test_keys_inside_a_prefix_are_told_by_segments() -> None:
    is_inside = inside("s3://bucket/data", "s3://bucket/data/holdout")
    assert [is_inside(key) for key in ("holdout/a", "holdout", "holdout2/a", "x/holdout/a")] == [
        True,
        True,
        False,
        False,
    ]
    assert not inside("s3://bucket/data", "s3://bucket/other")("a")


# ---- what may not overlap --------------------------------------------------------------------------------------------
def test_no_place_may_be_hold_or_lie_in_an_inbox(tree: str) -> None:
    inbox = open_store(f"{tree}/real/inbox").url
    for place, verb in ((f"{tree}/other/there", "is"), (f"{tree}/deep", "lies inside"), (f"{tree}/link", "holds")):
        with pytest.raises(
            PlacesOverlap, match=rf"^the registry, file://.* {verb} the inbox file://.*beside each other"
        ):
            keep_out_of_inbox(inbox, [("the registry", open_store(place).url)])
    keep_out_of_inbox(inbox, [("the registry", open_store(f"{tree}/other").url)])


def test_a_message_names_the_folder_that_a_link_leads_to(tree: str) -> None:
    with pytest.raises(PlacesOverlap, match=rf"file://{tree}/deep \(that is {tree}/real/inbox/sub\)"):
        keep_out_of_inbox(open_store("inbox").url, [("archive_to", open_store(f"{tree}/deep").url)])


def test_what_is_written_may_not_lie_in_a_dataset_which_it_may_hold(tree: str) -> None:
    dataset = open_store(f"{tree}/real/inbox").url
    for place in ("other/there", "deep"):
        with pytest.raises(PlacesOverlap, match="would be read as data, or replace it; choose a place outside"):
            keep_out_of_dataset(dataset, [("the output", open_store(f"{tree}/{place}").url)])
    keep_out_of_dataset(dataset, [("the output", open_store(f"{tree}/link").url)])


def test_an_archive_may_not_reach_the_manifests_of_the_model() -> None:
    for place in ("s3://b", "s3://b/registry", "s3://b/registry/model", "s3://b/registry/model/log"):
        with pytest.raises(PlacesOverlap, match="where the registry keeps this model"):
            keep_out_of_registry("s3://b/registry/model", "archive_to", place)
    keep_out_of_registry("s3://b/registry/model", "archive_to", "s3://b/dataset/archive")


def test_a_dataset_may_hold_its_holdout_but_not_lie_in_it() -> None:
    check_holdout("s3://b/data", "s3://b/data/holdout")
    check_holdout("s3://b/data", "s3://b/holdout")
    for holdout in ("s3://b/data", "s3://b"):
        with pytest.raises(PlacesOverlap, match="nothing would be left to train on"):
            check_holdout("s3://b/data", holdout)


# ---- where a record may reach ----------------------------------------------------------------------------------------
def test_places_of_the_environment_are_parsed_once_and_compared_like_all(
    tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACES, f" {tree}/other/there/, memory://m/archive ,")
    places = allowed_places()
    assert allowed(open_store("inbox/sub").url, places)
    assert allowed("memory://m/archive", places)
    assert not allowed("memory://m", places)
    assert not allowed(open_store(f"{tree}/other").url, places)
    monkeypatch.delenv(PLACES)
    assert allowed_places() == ()


def test_a_place_of_the_environment_that_names_no_store_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACES, "ftp://bucket")
    with pytest.raises(InvalidURL, match=r"TIDEMILL_PLACES, URLs separated by commas: ftp:// is not known here"):
        allowed_places()
