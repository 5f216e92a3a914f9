"""Which rows of a shard of labels are used: features that were consumed have their keys. Kept in the manifests, bit by bit.

Shape legend: L rows of a shard of labels.
"""

import base64
import binascii
import zlib
from typing import Any

import numpy as np

from tidemill.storage.errors import CorruptObject
from tidemill.storage.manifest import OpenLabels


def encoded(used_L: Any) -> str:
    """bool [L] as the field `used` of a manifest."""
    return base64.b64encode(zlib.compress(np.packbits(used_L, bitorder="little").tobytes())).decode()


def decoded(labels: OpenLabels) -> Any:
    """bool [L] of the rows of a shard of labels that earlier versions have used.

    Raises:
        CorruptObject: the field is not what Tidemill wrote.
    """
    size = (labels.rows + 7) // 8
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(labels.used, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise CorruptObject(
            f"{labels.inbox}/{labels.key}: the manifest does not say which rows are used: {error}"
        ) from error
    if len(data) != size or not unpacker.eof:
        raise CorruptObject(
            f"{labels.inbox}/{labels.key}: the manifest does not say which of its {labels.rows} rows are used"
        )
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=labels.rows, bitorder="little").astype(bool)
