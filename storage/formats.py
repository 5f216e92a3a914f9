"""Formats of manifests: how their numbers are read, and what the first one called otherwise (`docs/format.md`, "Formats")."""

import re
from typing import Any


def parsed_format(stated: Any) -> tuple[int, int]:
    """(major, minor) of a stored `format`: `"2.0"`, or the number 1 of the time before there were minor ones.

    Raises:
        ValueError: it is neither.
    """
    if type(stated) is int and stated > 0:
        return stated, 0
    if not isinstance(stated, str) or re.fullmatch(r"([2-9]|[1-9]\d{1,8})\.(0|[1-9]\d{0,8})", stated) is None:
        raise ValueError(f"{str(stated)[:20]!r} is no format")
    major, _, minor = stated.partition(".")
    return int(major), int(minor)


def from_format_1(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest of format 1 as format 2.0 names them. Nothing is lost but `gate.then`, which nobody read."""
    parts = {name: dict(ref) for name, ref in fields["blobs"].items()}
    for ref in parts.values():
        ref["bytes"] = ref.pop("size")
    new = {**fields, "format": "2.0", "blobs": parts}
    new["consumed"] = [
        {**shard, "labels": [shard["labels"]]} if "labels" in shard else shard for shard in fields.get("consumed", ())
    ]
    renamed = {"then": "action", "to": "destination"}
    new["owed"] = [{renamed.get(name, name): value for name, value in debt.items()} for debt in fields.get("owed", ())]
    if "gate" in fields:
        gate = {name: value for name, value in fields["gate"].items() if name != "then"}
        new["gate"] = {"recent" if name == "window" else name: value for name, value in gate.items()}
    metrics = {"window": "recent", "epoch_held_out": "epoch_holdout"}
    new["metrics"] = {metrics.get(name, name): value for name, value in fields.get("metrics", {}).items()}
    return new
