"""The policies of docs/policies/.

Whoever has them and nothing else can do all that Tidemill does, and a bucket that has one keeps the protocol.
"""

import ast
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import botocore.session
import pytest
from botocore import xform_name

import tidemill
from tests.conftest import BUCKET
from tests.flows.data import NOT_PARQUET, SPEC, parquet
from tests.guarantees.iam_like import POLICIES, IamLike, allowed, policy, several
from tests.s3_server import S3
from tidemill.storage.aliases import resolve
from tidemill.storage.audit import audit
from tidemill.storage.disposal import quarantined, requeue
from tidemill.storage.errors import PermissionDenied, StorageError
from tidemill.storage.log import open_log
from tidemill.storage.probe import check_inbox
from tidemill.storage.retention import collect_garbage
from tidemill.storage.s3 import S3Store
from tidemill.storage.urls import open_store
from tidemill.tasks.exporting.export import export
from tidemill.tasks.predict import predict

NAMES: Final = sorted(path.stem for path in POLICIES.glob("*.json"))
ACTIONS: Final = {
    "abort_multipart_upload": {"s3:AbortMultipartUpload"},
    "complete_multipart_upload": {"s3:PutObject"},
    "create_multipart_upload": {"s3:PutObject"},
    "delete_object": {"s3:DeleteObject", "s3:DeleteObjectVersion"},
    "get_object": {"s3:GetObject"},
    "head_bucket": {"s3:ListBucket"},
    "head_object": {"s3:GetObject"},
    "list_multipart_uploads": {"s3:ListBucketMultipartUploads"},
    "list_object_versions": {"s3:ListBucketVersions"},
    "list_objects_v2": {"s3:ListBucket"},
    "put_object": {"s3:PutObject"},
    "upload_part": {"s3:PutObject"},
}
"""The permissions of each operation that the store sends (https://docs.aws.amazon.com/AmazonS3/latest/API/)."""


class Place:
    """A bucket laid out as the policies have it, behind a door that asks for them."""

    def __init__(self, door: IamLike) -> None:
        self.door = door
        self.name = f"{BUCKET}/{uuid.uuid4().hex}"

    def url(self, part: str) -> str:
        return f"s3://{self.name}/{part}"

    def only(self, *policies: str) -> None:
        """From now on, who asks has these policies and no other; `bucket` is the bucket's."""
        self.door.statements = [statement for name in policies for statement in policy(name, self.name)]

    def produce(self) -> None:
        """A dataset, two shards, and one that is none."""
        self.door.statements = [{"Effect": "Allow", "Action": "s3:PutObject", "Resource": "*"}]
        open_store(self.url("dataset")).write("part-0.parquet", parquet(200, seed="data"))
        self.only("producer")
        inbox = open_store(self.url("inbox"))
        for key, data in (("a", parquet(50, seed="a")), ("b", NOT_PARQUET), ("c", parquet(50, seed="c"))):
            inbox.write(f"{key}.parquet", data)

    def drain(self, **settings: Any) -> tidemill.OnlineReport:
        archive = {"archive_to": self.url("dataset/archive")}
        online = tidemill.OnlineSettings.model_validate({"after_commit": archive, "grace_seconds": 0, **settings})
        return tidemill.drain(self.url("inbox"), self.url("registry"), "m", online)

    def use(self) -> None:
        """All that a trainer does with a bucket."""
        tidemill.train(self.url("dataset"), self.url("registry"), "m", SPEC)
        report = self.drain()
        assert (report.shards, report.rejected) == (2, 1)
        log = open_log(self.url("registry"), "m", writable=True)
        log.rollback(resolve(log, "0"))
        assert isinstance(log.store, S3Store)
        log.store._call(
            "create_multipart_upload", f"m/blobs/00000000-{uuid.uuid4().hex}.x"
        )  # as a killed run leaves it
        collect_garbage(log, keep=1)
        assert list(log.store.unfinished("m/")) == []
        predict(self.url("registry"), "m", self.url("dataset"), self.url("predictions"), "head", [])
        predict(self.url("registry"), "m", self.url("dataset"), self.url("predictions"), "head", [])
        export(self.url("registry"), "m", f"{self.url('predictions')}/m.pt2", "torch")


@pytest.fixture
def place(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with IamLike(s3_server.endpoint) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", door.endpoint)
        yield Place(door)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_one_that_iam_reads(name: str) -> None:
    """https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_grammar.html"""
    document = json.loads((POLICIES / f"{name}.json").read_text())
    assert document.keys() == {"Version", "Statement"}
    assert document["Version"] == "2012-10-17"
    sids = [statement["Sid"] for statement in document["Statement"]]
    assert len(sids) == len(set(sids))
    for statement in document["Statement"]:
        needed = {"Sid", "Effect", "Action", "Resource"} | ({"Principal"} if name == "bucket" else set())
        assert needed <= statement.keys() <= needed | {"Condition"}
        assert statement["Sid"].isalnum()
        assert statement["Effect"] == ("Deny" if name == "bucket" else "Allow")


def test_every_operation_that_the_store_names_is_in_a_policy() -> None:
    """Those too that are sent seldom: after a delete that compared nothing, in a bucket that keeps versions."""
    operations = {xform_name(name) for name in botocore.session.get_session().get_service_model("s3").operation_names}
    literals = {
        node.value
        for path in (Path(__file__).parents[2] / "storage").glob("s3*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    sent = literals & operations
    assert sent >= {"list_objects_v2", "put_object", "list_object_versions"}  # they are found at all
    stated = {action for name in ("trainer", "minio") for one in policy(name, "b") for action in several(one["Action"])}
    assert {action for name in sent for action in ACTIONS[name]} == stated


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
@pytest.mark.usefixtures("make_url")
@pytest.mark.parametrize("bucket", [(), ("bucket",)], ids=["", "bucket"])
def test_the_trainers_policy_suffices_and_has_nothing_to_spare(place: Place, bucket: tuple[str, ...]) -> None:
    """With the bucket's policy too: nothing that it denies is ever sent."""
    place.produce()
    place.only("trainer", *bucket)
    place.door.used.clear()
    place.use()
    assert place.door.refused == []
    stated = [action for one in policy("trainer", place.name) for action in several(one["Action"])]
    assert place.door.used == set(stated)
    place.only("reader")
    assert audit(open_log(place.url("registry"), "m")).findings == []


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
@pytest.mark.usefixtures("make_url")
def test_each_statement_of_the_trainers_policy_is_needed(place: Place) -> None:
    """Each lets a request through that no other does."""
    place.produce()
    place.only("trainer")
    place.use()
    asked = {(one.method, one.path) for one, _ in place.door.asked}
    kinds = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "DELETE": "s3:DeleteObject"}
    kinds |= {"PUT": "s3:PutObject", "POST": "s3:PutObject"}
    statements = policy("trainer", place.name)
    for left_out in statements:
        others = [statement for statement in statements if statement is not left_out]
        missed = [
            path
            for method, path in asked
            if not allowed(
                others, kinds[method] if "/" in path[1:] else "s3:ListBucket", f"arn:aws:s3:::{path[1:]}", {}
            )
        ]
        assert missed, left_out["Sid"]


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
@pytest.mark.usefixtures("make_url")
def test_the_operators_and_the_readers_policies_suffice(place: Place) -> None:
    place.produce()
    place.only("trainer")
    place.use()
    log = open_log(place.url("registry"), "m", writable=True)
    place.only("trainer", "operator")
    (name,) = quarantined(log)
    requeue(log, name, lambda _: True)
    place.only("reader")
    assert [v.number for v in log.history(log.head(), 5)]
    with pytest.raises(PermissionDenied):
        log.rollback(log.head())
    assert place.door.refused != []


@pytest.mark.parametrize("make_url", ["s3"], indirect=True)
@pytest.mark.usefixtures("make_url")
def test_a_bucket_with_its_policy_refuses_what_breaks_the_protocol(place: Place) -> None:
    place.produce()
    place.only("trainer", "bucket")
    place.use()
    registry, inbox = open_store(place.url("registry")), open_store(place.url("inbox"))
    check_inbox(inbox)  # what runs do: it compares when it deletes
    place.only("producer")
    inbox.write("later.parquet", parquet(50, seed="later"))
    place.door.statements = [
        {"Effect": "Allow", "Action": f"s3:{verb}Object", "Resource": "*"} for verb in ("Get", "Put", "Delete")
    ]
    place.door.statements += policy("bucket", place.name)
    alias = registry.stat("m/aliases/champion.json")
    for offence in (
        lambda: registry.write("m/log/00000000.json", b"{}"),
        lambda: registry.replace("m/log/00000000.json", b"{}", if_match=registry.stat("m/log/00000000.json").etag),
        lambda: registry.delete("m/log/00000000.json"),
        lambda: registry.write("m/aliases/champion.json", b"{}"),
        lambda: inbox.delete("later.parquet"),
    ):
        with pytest.raises(StorageError):
            offence()
    assert len(place.door.refused) == 5
    inbox.delete("later.parquet", if_match=inbox.stat("later.parquet").etag)
    registry.replace("m/aliases/champion.json", registry.read("m/aliases/champion.json"), if_match=alias.etag)
