"""Everything that can go wrong between Tidemill and a store. Each message says what happened, where, and what to do."""


def on_one_line(text: str) -> str:
    """Text in which nothing ends a line or speaks to a terminal: keys are chosen by producers, who may mean to forge lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class StorageError(Exception):
    """Base of every error that `storage` raises on purpose. Its message is one line, whatever the keys in it."""

    def __str__(self) -> str:
        return on_one_line(super().__str__())


class InvalidURL(StorageError):
    """The URL names no store that Tidemill can use."""


class InvalidKey(StorageError):
    """The key cannot exist in this store (for example `..` on a local disk)."""


class StoreNotFound(StorageError):
    """The bucket or root folder itself does not exist: a wrong URL, never an empty store."""


class NotFound(StorageError):
    """No object at that key."""


class AlreadyExists(StorageError):
    """`create` lost: an object was there before."""


class PreconditionFailed(StorageError):
    """The object is not the one that the caller named by its etag."""


class PermissionDenied(StorageError):
    """The store refuses these credentials, or this operation."""


class Unavailable(StorageError):
    """The store did not answer properly until the retries ran out. Nothing is known about the last operation."""


class StoreFull(StorageError):
    """The disk or quota is full. Nothing was written; what was there is intact."""


class UnsupportedStore(StorageError):
    """The store lacks a guarantee that the version log is built on."""


class PlacesOverlap(StorageError):
    """Two places that must lie apart are one place, or one lies inside of the other. Nothing was written."""


class CorruptObject(StorageError):
    """Bytes differ from what was written: wrong length or sha256, or a broken chain of manifests."""


class UnknownModel(StorageError):
    """The registry holds no such model."""


class UnknownVersion(StorageError):
    """The model has no such version, or retention has removed its blobs."""


class UnknownAlias(StorageError):
    """The alias does not exist, or names a version that does not."""


class UnsupportedFormat(StorageError):
    """The manifest was written by a newer Tidemill."""


class HeadMoved(StorageError):
    """Another run committed first. What this run computed is void: reload the head and start the step again."""


class DatasetError(StorageError):
    """A dataset cannot be used as it is: empty, unreadable, or with files of different schemas."""


class DatasetChanged(DatasetError):
    """A file of the dataset changed, or went, while it was being read."""


class UnsupportedTable(DatasetError):
    """A dataset or an inbox is, holds or is a part of a table of Delta Lake, Iceberg or Hudi, and cannot be used as such."""

    def __init__(self, message: str, system: str = "", url: str = "") -> None:
        """`system`: whose table it is, and `url` where, if that is all that is wrong with it."""
        super().__init__(message)
        self.system, self.url = system, url


class NotReady(StorageError):
    """The shard is not a whole Parquet file yet; its producer may still be writing."""


class ShardRejected(StorageError):
    """The shard can never be used as it is; the message is the reason kept beside it in quarantine."""
