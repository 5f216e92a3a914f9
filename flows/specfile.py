"""The file behind `train --spec`: JSON or YAML, with plain words and numbers read as everybody means them.

YAML 1.1, which PyYAML reads, takes `1e-4` for text, `no` and `on` for booleans, `010` for 8, `12:30` for 750 and `2024-01-01`
for a date. Its successor, YAML 1.2 (the core schema, https://yaml.org/spec/1.2.2/#103-core-schema), does not; nor does this.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """The safe loader, with the plain scalars of YAML 1.2, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if (twice := next((key for key in keys if keys.count(key) > 1), None)) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {}

for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
    )


def _integer(loader: Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read(path: str) -> Any:
    """What a file holds.

    Raises:
        ValueError: it cannot be read; the message is one line and says where it is wrong.
    """
    try:
        return yaml.load(Path(path).read_bytes(), Loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path} cannot be read{where}: {error.problem or error.context}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
