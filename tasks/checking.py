"""What can be known to be wrong with a batch training before anything slow starts: a few requests, and neither torch nor Prefect.

The run finds the same by itself, after torch is imported, the dataset is listed and maybe a server is started.
"""

import ast
import importlib.util
import sys
from collections.abc import Callable
from typing import Final

import pyarrow as pa

from tidemill.storage.dataset import peek
from tidemill.storage.store import Store
from tidemill.storage.urls import open_store
from tidemill.tasks.code import file_of
from tidemill.tasks.training.errors import ColumnError, FactoryError
from tidemill.tasks.training.families import is_untyped
from tidemill.tasks.training.inputs import check_weight, field_of, input_of, target_family
from tidemill.tasks.training.patterns import choose, did_you_mean
from tidemill.tasks.training.spec import Spec

STARS: Final = 3
"""How many modules, one in the other, are looked at for what `import *` brings."""


def check_training(
    dataset: str | None,
    spec: Spec,
    holdout: str | None = None,
    stores: Callable[[str], Store] = open_store,
    version: int | None = None,
) -> None:
    """Look at the columns of the first file of a dataset, and of a holdout, and at what the spec names by import path.

    `dataset` is None where rows are chosen: they may lie in files that are unlike the first. Of a table, `version` is looked at.

    Raises:
        StorageError: a dataset is not there or has no file to read.
        ColumnError: a column is missing or cannot be used.
        FactoryError: a module or an attribute is not there.
    """
    _check_code(spec)
    for url, of in ((dataset, version), (holdout, None)):
        if url is not None:
            _check_columns(spec, *peek(url, stores, of))


def _check_columns(spec: Spec, name: str, schema: pa.Schema) -> None:
    if isinstance(spec.target, str) and spec.target not in schema.names:
        raise ColumnError(f"target {spec.target!r} is missing from {name}: {did_you_mean(spec.target, schema.names)}")
    open_target = len(spec.targets) == 1 and spec.stated_task != "regression"
    for target in spec.targets:
        if not is_untyped(field_of(schema, target, name).type):  # another file may have a type for it
            target_family(target, schema, name, text=open_target)
    if spec.sample_weight is not None:
        check_weight(spec.sample_weight, schema, name)
    for column in choose(spec, _typed(schema)).columns:
        if not is_untyped(field_of(schema, column.name, name).type):
            input_of(column, schema)


def _typed(schema: pa.Schema) -> pa.Schema:
    """The schema with some type for each column that this file has no value of: other files may have one."""
    return pa.schema([field.with_type(pa.float64()) if is_untyped(field.type) else field for field in schema])


# ---- the user's own code ---------------------------------------------------------------------------------------------
def _check_code(spec: Spec) -> None:
    """Raises FactoryError if a module is not there, or if its source does not define what the spec names. Imports nothing."""
    settings = (("model.factory", spec.model.factory), ("loss", spec.loss), *(("metrics", m) for m in spec.metrics))
    for setting, path in settings:
        if path is None or ":" not in path:
            continue
        module, _, attribute = path.partition(":")
        if module == "__main__":
            continue
        if _is_missing(module):
            raise FactoryError(
                f"{setting} {path!r}: no module named {module!r}: install its package, or start from its folder"
            )
        names = _names(module)
        if names is not None and attribute.partition(".")[0] not in names:
            raise FactoryError(
                f"{setting} {path!r}: {module!r} has no attribute {attribute!r}: "
                f"{did_you_mean(attribute, sorted(name for name in names if not name.startswith('_')))}"
            )


def _is_missing(module: str) -> bool:
    """Whether no file can be a module; not where it may be made by other means than a file."""
    if module in sys.modules or file_of(module) is not None:
        return False
    package = module.rpartition(".")[0]
    if not package:
        return importlib.util.find_spec(module) is None
    above = file_of(package)
    return _is_missing(package) if above is None else above.name == "__init__.py"


def _names(module: str, depth: int = 0) -> set[str] | None:
    """The names that a module's source binds, at any depth; None if they cannot be known without running it."""
    file = file_of(module)
    if file is None or file.suffix != ".py" or depth > STARS:
        return None
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it says so
        return None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.names[0].name != "*":
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            more = None if node.level else _names(str(node.module), depth + 1)
            if more is None:
                return None
            names |= more
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Name) and node.id in ("globals", "vars", "setattr"):
            return None
    return None if "__getattr__" in names else names
