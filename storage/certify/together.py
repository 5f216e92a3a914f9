"""What a store must keep among several who call it at once: one check for each promise."""

from typing import Final

from tidemill.storage.certify.hands import TOGETHER, Call
from tidemill.storage.certify.trial import NO_ETAG, Broken, Trial, refused, value
from tidemill.storage.errors import AlreadyExists, NotFound, PermissionDenied, PreconditionFailed, StorageError
from tidemill.storage.store import ObjectInfo, Promises

_TORN_BYTES: Final = 2**20


# ---- one wins --------------------------------------------------------------------------------------------------------
def creates_once(trial: Trial) -> str:
    store = trial.store
    store.create("create/alone", b"first")
    refused(AlreadyExists, lambda: store.create("create/alone", b"second"), "a second create succeeded")
    if store.read("create/alone") != b"first":
        raise Broken("a create that was refused changed the object")

    def bytes_are_of(number: int, winner: int) -> None:
        if (found := store.read(f"create/{number}")) != _tag(winner):
            raise Broken(f"the object of the winner has other bytes: {found!r}")

    return trial.one_winner(
        "create",
        lambda number: [Call("create", f"create/{number}", {"data": _tag(place)}) for place in range(TOGETHER)],
        bytes_are_of,
    )


def replaces_what_is_known(trial: Trial) -> str:
    store = trial.store
    old = store.write("replace/alone", b"first")
    store.replace("replace/alone", b"second", if_match=old.etag)
    stale = "a replace that named an older object succeeded"
    refused(PreconditionFailed, lambda: store.replace("replace/alone", b"third", if_match=old.etag), stale)
    if store.read("replace/alone") != b"second":
        raise Broken("a replace that was refused changed the object")
    nothing = "a replace of nothing made an object"
    refused(NotFound, lambda: store.replace("replace/missing", b"", if_match=NO_ETAG), nothing)
    etags = _prepared(trial, "replace")

    def bytes_are_of(number: int, winner: int) -> None:
        if (found := store.read(f"replace/{number}")) != _tag(winner):
            raise Broken(f"the object of the winner has other bytes: {found!r}")

    return trial.one_winner(
        "replace",
        lambda number: [
            Call("replace", f"replace/{number}", {"data": _tag(place), "if_match": etags[number]})
            for place in range(TOGETHER)
        ],
        bytes_are_of,
    )


def deletes_what_is_named(trial: Trial) -> str:
    store = trial.store
    old = store.write("delete/alone", b"first")
    new = store.write("delete/alone", b"second")
    try:
        stale = "a delete that named an older object removed the newer one"
        refused(PreconditionFailed, lambda: store.delete("delete/alone", if_match=old.etag), stale)
        store.delete("delete/alone", if_match=new.etag)
        refused(NotFound, lambda: store.stat("delete/alone"), "a deleted object is still there")
        etags = _prepared(trial, "delete")
        return trial.one_winner(
            "delete",
            lambda number: [Call("delete", f"delete/{number}", {"if_match": etags[number]}) for _ in range(TOGETHER)],
            lambda number, _: refused(
                NotFound, lambda: store.stat(f"delete/{number}"), "a deleted object is still there"
            ),
        )
    except PermissionDenied as error:
        raise Broken(f"these credentials may not delete: {error}") from error
    except (Broken, StorageError):
        store.promises = Promises()  # from here on as Tidemill does it there
        raise


def _prepared(trial: Trial, folder: str) -> list[str]:
    """Etags of one object for each round."""
    keys = [f"{folder}/{number}" for number in range(trial.effort.rounds)]
    return [info.etag for info in trial.many(lambda key: trial.store.write(key, b"before"), keys)]


def _tag(place: int) -> bytes:
    return f"writer {place}".encode()


# ---- what others see -------------------------------------------------------------------------------------------------
def is_seen_at_once(trial: Trial) -> str:
    for number in range(trial.effort.looks):
        key = f"seen/{number}"
        made = _done_by_one(trial, Call("create", key, {"data": b"old"}))
        if None in _seen(trial, key):
            raise Broken("an object that was just created was not there for others")
        other = _done_by_one(trial, Call("replace", key, {"data": b"newer", "if_match": made.etag}))
        if {info.etag if info else None for info in _seen(trial, key)} != {other.etag}:
            raise Broken("others saw the old object, or none, after it was replaced")
        if any(value(data) != b"newer" for data in trial.hands.together([Call("read", key)] * TOGETHER)):
            raise Broken("others read old bytes after an object was replaced")
        try:
            trial.store.delete(key, if_match=other.etag)
        except PermissionDenied:
            continue
        if any(_seen(trial, key)):
            raise Broken("an object that was just deleted was still there for others")
    return f"{trial.effort.looks} rounds, {TOGETHER} at once"


def _done_by_one(trial: Trial, call: Call) -> ObjectInfo:
    info: ObjectInfo = value(trial.hands.together([call])[0])
    return info


def _seen(trial: Trial, key: str) -> list[ObjectInfo | None]:
    """What everybody sees at `key`: half of them in a listing."""
    found = list[ObjectInfo | None]()
    for result in trial.hands.together([Call("list", "seen/"), Call("stat", key)] * (TOGETHER // 2)):
        if isinstance(result, NotFound):
            found.append(None)
        elif isinstance(listed := value(result), list):
            found.append(next((info for info in listed if info.key == key), None))
        else:
            found.append(listed)
    return found


def is_read_whole(trial: Trial) -> str:
    old, new = b"a" * _TORN_BYTES, b"b" * _TORN_BYTES
    keys = [f"whole/{number}" for number in range(2 * trial.effort.looks)]
    trial.many(lambda key: trial.store.write(key, old), keys)
    seen = 0
    for key in keys:
        readers = [Call("read", key, later_seconds=0.002 * place) for place in range(TOGETHER - 1)]
        for data in trial.hands.together([Call("write", key, {"data": new}), *readers])[1:]:
            seen += 1
            if value(data) not in (old, new):
                raise Broken("a read beside a write returned a part of each, or a part of one")
    return f"{seen} reads beside {len(keys)} writes"
