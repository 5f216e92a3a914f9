"""Which leaves of a Parquet schema belong to a column, and which hold text."""

from collections.abc import Collection

import pyarrow as pa
import pyarrow.parquet as pq


def is_below(path: str, columns: Collection[str]) -> bool:
    """True if a leaf of the schema belongs to one of the columns, whose names may have dots of their own."""
    parts = path.split(".")
    return any(".".join(parts[:i]) in columns for i in range(1, len(parts) + 1))


def string_leaves(schema: pq.ParquetSchema) -> list[str]:
    """Paths of the columns of text and bytes, those inside of lists included, JSON and others that are kept as text too."""
    plain = {field.name for field in schema.to_arrow_schema() if _is_string(field.type)}
    leaves = [schema.column(i) for i in range(len(schema))]
    return [
        leaf.path
        for leaf in leaves
        if leaf.path in plain
        or (leaf.max_repetition_level and leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL")
    ]


def _is_string(kind: pa.DataType) -> bool:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _is_string(kind.storage_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return texts or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
