"""The promises of `tidemill.storage.store`, in words, each with its check and what follows if it does not hold.

A check returns what it saw, or raises `Broken`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tidemill.storage.certify import alone, together
from tidemill.storage.certify.trial import Trial


@dataclass(frozen=True, slots=True)
class Promise:
    """What a store must keep, and how that is seen."""

    words: str
    check: Callable[[Trial], str]
    follows: str
    """If it does not hold."""
    needed: bool = True
    """Nothing can live here without it. The others are limits that producers or operators can live with."""


_NO_REGISTRY: Final = "no registry may live here"
PROMISES: Final = (
    Promise(
        "of all that create one object, one wins",
        together.creates_once,
        f"two runs could both commit the same version, and one would be lost: {_NO_REGISTRY}",
    ),
    Promise(
        "only who knows an object replaces it, and one wins",
        together.replaces_what_is_known,
        f"of two moves of an alias at once, one would be lost: {_NO_REGISTRY}",
    ),
    Promise(
        "a delete takes only the object that it names",
        together.deletes_what_is_named,
        "Tidemill compares before it deletes: an object that is put in that very moment is lost. Let producers never reuse "
        "a key, or keep versions of the bucket's objects",
        needed=False,
    ),
    Promise(
        "what was done is seen by all at once",
        together.is_seen_at_once,
        f"a run could pass over a version, or train on a shard again: {_NO_REGISTRY} and no inbox",
    ),
    Promise(
        "an object is read whole, old or new",
        together.is_read_whole,
        "a shard or a manifest that is half old and half new would be read: use another place",
    ),
    Promise(
        "a read that names an object gets no other",
        alone.reads_what_was_named,
        "a dataset that changes while it is read would go unnoticed: use another place",
    ),
    Promise(
        "an etag tells other bytes",
        alone.etags_tell_objects_apart,
        "a file that was replaced would be taken for the one before: use another place",
    ),
    Promise(
        "a listing has every object",
        alone.listings_are_whole,
        "shards and versions would be passed over: use another place",
    ),
    Promise(
        "what is not there is not found",
        alone.missing_is_not_found,
        "runs would stop, or begin where they should not: grant the right to list, or use another place",
    ),
    Promise(
        "large objects are kept",
        alone.keeps_large_objects,
        "models and shards of this size cannot be stored: raise the limit of the proxy before the store",
    ),
    Promise(
        "keys are kept as they are",
        alone.keeps_keys_exactly,
        "let no producer use such keys",
        needed=False,
    ),
    Promise(
        "a key may be another key's folder",
        alone.keys_may_be_folders,
        "let no producer use one name as a key and as a folder",
        needed=False,
    ),
    Promise(
        "the store's clock is right",
        alone.clocks_agree,
        "ages of shards are told wrong, and waits for them end early or late: set the clock",
        needed=False,
    ),
)
"""In the order in which they are tried. The last ones are the limits."""
