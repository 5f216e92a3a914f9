"""Which columns a spec's `features` stand for: names, patterns such as `dep_*`, all but some (`!id`), several with commas."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

import pyarrow as pa

from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.families import family_of, is_untyped, told
from tidemill.tasks.training.request_log import is_reserved
from tidemill.tasks.training.spec import Column, Spec

_WILD: Final = "*?["
NAMED: Final = 20
"""Columns that a message names."""


@dataclass(frozen=True)
class Chosen:
    """The columns that `features` stand for."""

    columns: tuple[Column, ...]
    """Each with the name of one column."""
    by_pattern: frozenset[str] = frozenset()
    """Those that were not named: one that turns out to be of no use is left out."""
    unused: dict[str, str] = field(default_factory=dict)
    """Columns that a pattern has met and that cannot be used: why."""


def choose(spec: Spec, schema: pa.Schema, files: Sequence[pa.Schema] = ()) -> Chosen:
    """The columns of a dataset that the features of a spec stand for.

    An entry that is the name of a column means that column, whatever characters the name has. Patterns match in the way of a
    shell, in the order of the schema, never a target nor the sample weight, and no column that another entry names. Columns that
    `!` names are left out of what patterns match; if there are only such entries, they are left out of all columns.

    Args:
        spec: The spec as it was asked for.
        schema: Of the dataset as a whole.
        files: The schemas of its files, each once. A pattern takes only what all of them have, and mean alike.

    Raises:
        ColumnError: an entry matches no column, or no column is left.
    """
    entries = [part for column in spec.features for part in _parts(column, schema)]
    without = [entry.name[1:] for entry in entries if _excludes(entry, schema)]
    entries = [entry for entry in entries if not _excludes(entry, schema)] or [Column(name="*")]
    named = {entry.name for entry in entries if not _is_pattern(entry, schema)}
    apart = {*spec.targets, *([] if spec.sample_weight is None else [spec.sample_weight])}
    for pattern in without:
        _must_match(f"!{pattern}", pattern, schema)
    chosen: dict[str, Column] = {}
    by_pattern: set[str] = set()
    unused: dict[str, str] = {}
    for entry in entries:
        if not _is_pattern(entry, schema):
            if entry.name in chosen:
                raise ColumnError(f"features name {entry.name!r} more than once: name each column once")
            chosen[entry.name] = entry
            continue
        for name in _must_match(entry.name, entry.name, schema):
            if name in named or name in apart or name in chosen or any(_matches(name, one) for one in without):
                continue
            if (reason := _unusable(name, schema, files)) is not None:
                unused[name] = reason
                continue
            by_pattern.add(name)
            chosen[name] = entry.model_copy(update={"name": name})
    if not chosen:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in list(unused.items())[:NAMED])
        if not set(schema.names) - apart:
            beside = "the target" if spec.sample_weight is None else "the target and the sample weight"
            raise ColumnError(f"the dataset has no column beside {beside}: nothing can be learned from")
        raise ColumnError(f"no column of the dataset is left for features{f' ({why})' if why else ''}: name some")
    return Chosen(tuple(chosen.values()), frozenset(by_pattern), unused)


def _parts(column: Column, schema: pa.Schema) -> list[Column]:
    """An entry with commas as several, unless a column has that name."""
    if "," not in column.name or column.name in schema.names:
        return [column]
    names = [name for part in column.name.split(",") if (name := part.strip())]
    return [column.model_copy(update={"name": name}) for name in names]


def _excludes(column: Column, schema: pa.Schema) -> bool:
    return column.name.startswith("!") and len(column.name) > 1 and column.name not in schema.names


def _is_pattern(column: Column, schema: pa.Schema) -> bool:
    return column.name not in schema.names and any(sign in column.name for sign in _WILD)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _must_match(entry: str, pattern: str, schema: pa.Schema) -> list[str]:
    """Names of the columns that a pattern matches, each once, in the order of the schema."""
    found = [name for name in dict.fromkeys(schema.names) if _matches(name, pattern)]
    if not found:
        raise ColumnError(
            f"features: {entry!r} matches no column of the dataset: {did_you_mean(pattern, schema.names)}"
        )
    return found


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A hint for a name that is none of `names`."""
    if not names:
        return "it has no column"
    near = difflib.get_close_matches(name, names, n=1) or [n for n in names if n.casefold() == name.casefold()]
    if near:
        return f"did you mean {near[0]!r}?"
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"it has {', '.join(map(repr, names[:NAMED]))}{more}"


def _unusable(name: str, schema: pa.Schema, files: Sequence[pa.Schema]) -> str | None:
    """Why a column that a pattern matches cannot be an input; None if it can, as far as schemas tell."""
    if is_reserved(name):
        return "of a log of requests, and no feature"
    if len(schema.get_all_field_indices(name)) > 1:
        return "the dataset has several columns of this name"
    kind = schema.field(name).type
    if is_untyped(kind):
        return "null in all rows"
    family = family_of(kind)
    if family is None:
        return f"of type {told(kind)}, which cannot be an input"
    for file in files:
        if len(file.get_all_field_indices(name)) != 1:
            return "not in every file"
        other = file.field(name).type
        if not is_untyped(other) and family_of(other) != family:
            return f"{told(kind)} in one file, {told(other)} in another"
    return None
