"""Which lists of pairs are taken, and which are refused before anything begins."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tidemill.storage.errors import InvalidURL, PlacesOverlap
from tidemill.tasks.settings import Archive, GateSettings, LabelSettings, Limits, OnlineSettings
from tidemill.tasks.tenants.pairs import Pair, PairsError, check, pairs_of

MakeUrl = Callable[[str], str]
ALL = OnlineSettings(limits=Limits(max_shards=8, max_rows=1000))


def pair(called: str, /, **more: object) -> dict[str, object]:
    return {"inbox": f"s3://b/inbox/{called}", "registry": "s3://b/registry", "model": called, **more}


def test_a_pair_is_called_as_its_model_and_has_the_settings_of_all_but_for_its_own() -> None:
    own = {"limits": {"max_shards": 2}, "after_commit": {"archive_to": "s3://b/archive/y"}}
    pairs = pairs_of([pair("x"), pair("x2", model="x", registry="s3://b/other", name="y", settings=own)], "pairs.yaml")
    settings = check(pairs, ALL)
    assert settings == {
        "x": ALL,
        "y": ALL.model_copy(
            update={
                "limits": Limits(max_shards=2, max_rows=1000),
                "after_commit": Archive(archive_to="s3://b/archive/y"),
            }
        ),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "pairs.yaml must hold one list of pairs"),
        ([], "pairs.yaml must hold one list of pairs"),
        ({"pairs": [pair("x")]}, "pairs.yaml must hold one list of pairs"),
        (["x"], "pairs.yaml, pair 1: Input should be a valid dictionary"),
        ([pair("x", settings={"gate": 3})], "pairs.yaml, pair 1, gate: Input should be a valid dictionary"),
        ([pair("")], "pairs.yaml, pair 1, model: String should match"),
        ([pair("50%s")], "pairs.yaml, pair 1, model: String should match"),
        ([pair("x"), pair("y", name="x")], "pairs.yaml: two pairs are called 'x': give one of them another name"),
        ([pair("x"), {"inbox": "i", "model": "m"}], "pairs.yaml, pair 2, registry: Field required"),
        ([pair("x", learner=3)], "pairs.yaml, pair 1, learner: Extra inputs are not permitted"),
        ([pair("x", name="a/b")], "pairs.yaml, pair 1, name: String should match"),
        ([pair("x", settings={"port": 80})], "port can only be set for all pairs together"),
        ([pair("x", settings={"limits": {"shards": 3}})], "pairs.yaml, pair 1, limits, shards: Extra inputs"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_with_its_place(given: object, message: str) -> None:
    with pytest.raises(PairsError) as caught:
        pairs_of(given, "pairs.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "instance of" not in str(caught.value)  # who writes a file knows of none


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([pair("x"), pair("y", model="x", name="y")], "x and y are one model, s3://b/registry/x"),
        (
            [pair("x", settings={"gate": {"after_refusals": "stop"}})],
            "pair x: after_refusals needs champion='move'",
        ),
    ],
)
def test_two_pairs_are_never_one_model_nor_of_one_name(given: list[object], message: str) -> None:
    settings = ALL.model_copy(update={"gate": GateSettings(champion="score")})
    with pytest.raises(PairsError, match=message.replace("'", ".")):
        check(
            pairs_of(given, "pairs.yaml") if "stop" not in str(given) else (Pair.model_construct(**given[0]),), settings
        )


@pytest.mark.parametrize(
    "other",
    [
        {"inbox": "s3://b/inbox/x"},
        {"inbox": "s3://b/inbox/x/y"},
        {"inbox": "s3://b/inbox"},
        {"registry": "s3://b/inbox/x/registry"},
        {"settings": {"after_commit": {"archive_to": "s3://b/inbox/x/old"}}},
        {"settings": {"labels": {"inbox": "s3://b/inbox/x", "key": "id"}}},
        {"settings": {"gate": {"holdout_dataset": "s3://b"}}},
    ],
)
def test_what_arrives_for_one_is_never_in_reach_of_another(other: dict[str, object]) -> None:
    with pytest.raises(PlacesOverlap, match="x"):
        check(pairs_of([pair("x"), pair("y", **other)], "pairs.yaml"), ALL)


def test_models_that_keep_their_shards_may_share_an_inbox() -> None:
    keep = {"after_commit": "keep"}
    shared = [pair("x", settings=keep), pair("y", inbox="s3://b/inbox/x", settings=keep)]
    assert set(check(pairs_of(shared, "pairs.yaml"), ALL)) == {"x", "y"}


def test_one_folder_by_two_names_is_seen(tmp_path: Path) -> None:
    (tmp_path / "inbox").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "inbox")
    pairs = [
        Pair(inbox=f"{tmp_path}/inbox", registry=f"{tmp_path}/r", model="x"),
        Pair(inbox=f"{tmp_path}/link/new", registry=f"{tmp_path}/r", model="y"),
    ]
    with pytest.raises(PlacesOverlap, match="lies inside"):
        check(pairs, ALL)


def test_a_url_that_names_no_store_is_refused() -> None:
    """With whose it is, of a thousand."""
    for other, message in (
        ({"inbox": "ftp://b/x"}, "the inbox of x: ftp:// is not known"),
        ({"registry": ""}, "the registry of x: '' names no store"),
        ({"settings": {"after_commit": {"archive_to": "s3:/b"}}}, "the archive of x: "),
        ({"settings": {"labels": {"inbox": "", "key": "id"}}}, "the labels inbox of x: "),
    ):
        with pytest.raises(InvalidURL, match=f"^{message}"):
            check(pairs_of([pair("x", **other)], "pairs.yaml"), ALL)


def test_two_pairs_of_one_name_are_refused_from_python_too() -> None:
    given = [Pair.model_validate(pair("x")), Pair.model_validate(pair("y", name="x"))]
    with pytest.raises(PairsError, match="two pairs are called 'x'"):
        check(given, ALL)


def test_labels_that_arrive_in_the_inbox_of_their_features_are_no_matter_of_two() -> None:
    own = {"after_commit": "keep", "labels": {"inbox": "s3://b/inbox/x", "key": "id"}}
    with pytest.raises(PlacesOverlap, match=r"^the labels inbox of x is its inbox, s3://b/inbox/x: "):
        check(pairs_of([pair("x", settings=own)], "pairs.yaml"), ALL)


def test_a_name_that_is_a_page_of_all_goes_with_no_port() -> None:
    pairs = pairs_of([pair("x"), pair("metrics")], "pairs.yaml")
    check(pairs, ALL)
    with pytest.raises(PairsError, match="a pair is called 'metrics', and /metrics of the port is of all pairs"):
        check(pairs, ALL.model_copy(update={"port": 0}))


def test_a_thousand_pairs_are_checked_in_a_moment() -> None:
    labels = LabelSettings(inbox="s3://b/labels", key="id")
    given = [
        pair(f"m{i}", settings={"labels": labels.model_dump() | {"inbox": f"s3://b/labels/m{i}"}}) for i in range(1000)
    ]
    assert len(check(pairs_of(given, "pairs.yaml"), ALL)) == 1000
