"""The user's own code that a spec names: what identifies it, and whether what is loaded is what would be recorded.

A spec names its model, loss and metrics by import path. Their code is the modules that are named, and whatever of the user's own
modules those import, directly or through each other, by import statements. A module is the user's own if it is not installed
(in site-packages) and not Python's, or if it is in a package that the spec names. What is loaded by other means
(`importlib`, plug-ins, data files) is not seen.

A module is identified by the sha256 of its file; what was defined in a notebook or a script (`__main__`) by its bytecode and the
values that it refers to.
"""

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import sysconfig
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.spec import Spec

_NOT_OWN: Final = ("torch", "torchmetrics", "tidemill")
"""Packages whose version stands in a version's environment."""
_PYTHON: Final = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "platstdlib"))
_IMPORTED_AT: Final = time.time()


class StaleCode(FactoryError):
    """The code of a model, loss or metric in this process is not what is on disk."""


@dataclass(frozen=True)
class Code:
    """The user's code that a spec names, as it was when this was made."""

    named: tuple[str, ...]
    """The import paths of the spec that are not torch's."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Module -> sha256 of its file."""
    defined: Mapping[str, str] = field(default_factory=dict)
    """Import path -> sha256 of what was defined without a file."""

    @property
    def identity(self) -> list[tuple[str, str]]:
        """Equal for equal code, whichever process asks. Empty if the spec names none."""
        return sorted([*self.files.items(), *self.defined.items()])

    def load(self) -> None:
        """Import what is named, and make sure that the modules in this process are those that are identified here.

        Raises:
            StaleCode: a module was edited after it was imported, or another one holds what it was before a reload.
        """
        before = {name for name in self.files if name in sys.modules}
        for path in self.named:
            with suppress(Exception, SystemExit):  # building the model says what is wrong with it
                importlib.import_module(path.partition(":")[0])
        loaded = {name: sys.modules[name] for name in self.files if name in sys.modules}
        for name, module in loaded.items():
            file = file_of(name)
            if name not in before and file is not None:
                _sources[name] = module.__spec__, _digest(file)
            if _loaded_from(name, module, file) != self.files[name]:
                raise StaleCode(
                    f"{file or name} has changed since this process imported it: what would be trained is not what would be "
                    f"recorded. Start again in a new process, or importlib.reload({name})"
                )
        for name, module in loaded.items():
            _check_held(name, module, loaded)
        if self.defined != code_of_paths(self.named).defined:
            raise StaleCode(f"{', '.join(self.defined)} was defined anew while this run began: run again")


def code_of(spec: Spec) -> Code:
    """The user's code that a spec names, as it is on disk now, or in this process where it has no file."""
    return code_of_paths(tuple(path for path in spec.import_paths if ":" in path))


def code_of_paths(paths: tuple[str, ...]) -> Code:
    """The same, of these import paths."""
    named = tuple(path for path in paths if path.partition(".")[0].partition(":")[0] not in _NOT_OWN)
    packages = {path.partition(":")[0].partition(".")[0] for path in named}
    defined: dict[str, str] = {}
    waiting = [path.partition(":")[0] for path in named]
    for path in named:
        module, _, attribute = path.partition(":")
        if _has_no_file(module):
            what = _Description()
            described = what.of(_defined(module, attribute))
            defined[path] = hashlib.sha256(json.dumps(described).encode()).hexdigest()
            waiting += sorted(what.modules)
    files: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name == "__main__":
            continue
        seen.add(name)
        file = file_of(name)
        if file is None or not (name.partition(".")[0] in packages or _is_own(name, file)):
            continue
        files[name] = _digest(file)
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += _imports(name, file)
    return Code(named, files, defined)


# ---- modules on disk -------------------------------------------------------------------------------------------------
def file_of(name: str) -> Path | None:
    """The file that a module is, or would be, loaded from. Imports nothing."""
    spec: importlib.machinery.ModuleSpec | None = None
    places: list[str] | None = None  # where the next part of the name is looked for; None: everywhere
    parts = name.split(".")
    for end, part in enumerate(parts, 1):
        above, full = places, ".".join(parts[:end])
        try:
            finder = importlib.util.find_spec if above is None else importlib.machinery.PathFinder.find_spec
            spec = finder(full, above)  # type: ignore[arg-type]  # one of them is for no list
            places = (
                None if spec is None or spec.submodule_search_locations is None else [*spec.submodule_search_locations]
            )
        except (
            KeyError
        ):  # a folder without __init__.py inside another: its path is that of the one above, once it is imported
            spec, places = None, [os.path.join(place, part) for place in above or ()]
        except (ImportError, ValueError, AttributeError):
            return None
        if places is None and end < len(parts):
            return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    file = Path(spec.origin)
    return file if file.is_file() else None


def _is_own(name: str, file: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not (installed or str(file).startswith(_PYTHON) or name.partition(".")[0] in _NOT_OWN)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _imports(name: str, file: Path) -> Iterator[str]:
    """The modules that a module's import statements may name."""
    if file.suffix != ".py":
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # importing it says so
        return
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


# ---- modules in this process -----------------------------------------------------------------------------------------
_sources: dict[str, tuple[importlib.machinery.ModuleSpec | None, str]] = {}
"""Module -> (its `__spec__`, which a reload replaces, and the sha256 of the file that it was loaded from)."""


def _loaded_from(name: str, module: types.ModuleType, file: Path | None) -> str | None:
    """The sha256 of the file that a module in this process was loaded from, or None if that is no longer there.

    Sure if Tidemill imported it, or if the file has not changed since the process began. Otherwise its functions, its classes
    and its constants are compared with those of the file.
    """
    spec = module.__spec__
    if name in _sources and _sources[name][0] is spec:
        return _sources[name][1]
    if file is None:
        return None
    stated, digest = file.stat(), _digest(file)
    unchanged = max(stated.st_mtime, stated.st_ctime) < min(_process_began(), _IMPORTED_AT)
    if not unchanged and not _has_code_of(module, file):
        return None
    _sources[name] = spec, digest
    return digest


def _process_began() -> float:
    """Seconds since the epoch; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _has_code_of(module: types.ModuleType, file: Path) -> bool:
    if file.suffix != ".py":
        return False
    source = file.read_bytes()
    try:
        tree = ast.parse(source)
        compiled = compile(source, str(file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    on_disk = {json.dumps(_Description().of(code)) for code in _nested(compiled)}
    loaded = {json.dumps(_Description().of(function.__code__)) for function in _functions(module)}
    return loaded <= on_disk and all(
        _Description().of(vars(module).get(name)) == _Description().of(value) for name, value in _constants(tree)
    )


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _nested(constant)


def _functions(owner: object) -> Iterator[types.FunctionType]:
    """The functions that a module or class defines, methods among them."""
    module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(owner, "__module__", None)
    within = f"{owner.__qualname__}." if isinstance(owner, type) else ""
    for value in list(vars(owner).values()):
        if isinstance(value, type):
            if value.__module__ == module and value.__qualname__.startswith(within):
                yield from _functions(value)
            continue
        for part in (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value,):
            function: Any = getattr(part, "__func__", part)
            with suppress(ValueError):  # wrapped in itself
                function = inspect.unwrap(function)
            # What a decorator such as dataclass writes has no file.
            if (
                isinstance(function, types.FunctionType)
                and function.__module__ == module
                and not function.__code__.co_filename.startswith("<")
            ):
                yield function


def _constants(tree: ast.Module) -> Iterator[tuple[str, object]]:
    """Names that a module gives a literal once, at its top, and the literal."""
    given: dict[str, list[object]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            given.setdefault(node.id, []).append(node)
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None and len(given[target.id]) == 1:
                with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    yield target.id, ast.literal_eval(value)


def _check_held(name: str, module: types.ModuleType, loaded: Mapping[str, types.ModuleType]) -> None:
    """A module that was reloaded has new functions and classes; who imported them by name still holds the old ones.

    Raises StaleCode.
    """
    for held, value in list(vars(module).items()):
        origin = getattr(value, "__module__", None)
        if not isinstance(value, type | types.FunctionType) or not isinstance(origin, str):
            continue
        if origin == name or origin not in loaded:
            continue
        now = vars(loaded[origin]).get(value.__qualname__)
        if now is not value and _Description(origin).of(now) != _Description(origin).of(value):
            raise StaleCode(
                f"module {name!r} holds {held!r} as it was before {origin!r} was reloaded: importlib.reload({name}) too, or "
                "start again in a new process"
            )


# ---- code without a file ---------------------------------------------------------------------------------------------
def _has_no_file(module: str) -> bool:
    """Whether a module is a notebook's or a script's own, or was made by hand."""
    return module == "__main__" or (module in sys.modules and sys.modules[module].__spec__ is None)


def _defined(module: str, attribute: str) -> object:
    with suppress(Exception):  # building the model says what is wrong with it
        found: object = sys.modules[module]
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    return None


class _Description:
    """JSON for a function, a class or a value: equal for equal code, in whichever process."""

    def __init__(self, *modules: str) -> None:
        """Of classes and functions, those of `modules` and those without a file are described by what they hold."""
        self.modules: set[str] = set()
        """Of all other classes, functions and modules that are referred to."""
        self._inside = modules
        self._seen: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | complex | str | bytes):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, tuple | list):
            return [type(value).__name__, *map(self.of, value)]
        if isinstance(value, set | frozenset):
            return [type(value).__name__, *sorted(json.dumps(self.of(item)) for item in value)]
        if isinstance(value, dict):
            return ["dict", *sorted(json.dumps([self.of(key), self.of(item)]) for key, item in value.items())]
        if isinstance(value, types.CodeType):
            return self._code(value)
        if id(value) in self._seen:
            return f"as before {self._seen[id(value)]}"
        self._seen[id(value)] = len(self._seen)
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self.of(value.__func__)]
        if isinstance(value, property):
            return ["property", *map(self.of, (value.fget, value.fset, value.fdel))]
        if isinstance(value, types.ModuleType):
            self.modules.add(value.__name__)
            return f"module {value.__name__}"
        if isinstance(value, types.FunctionType | type):
            if self._is_elsewhere(value.__module__):
                self.modules.add(value.__module__)
                return f"{value.__module__}:{value.__qualname__}"
            return self._function(value) if isinstance(value, types.FunctionType) else self._class(value)
        return f"a {type(value).__module__}:{type(value).__qualname__}"

    def _is_elsewhere(self, module: str) -> bool:
        return module not in self._inside and not _has_no_file(module)

    def _code(self, code: types.CodeType) -> list[Any]:
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        names = [list(code.co_names), list(code.co_varnames), list(code.co_freevars), list(code.co_cellvars)]
        body = [code.co_code.hex(), code.co_exceptiontable.hex()]
        return [code.co_qualname, counts, names, body, [self.of(constant) for constant in code.co_consts]]

    def _function(self, function: types.FunctionType) -> list[Any]:
        names = {name for code in (function.__code__, *_nested(function.__code__)) for name in code.co_names}
        used = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
        held = []
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                held.append(self.of(cell.cell_contents))
        defaults = [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        return ["function", self._code(function.__code__), defaults, held, [[n, self.of(v)] for n, v in used.items()]]

    def _class(self, made: type) -> list[Any]:
        own = {
            name: value
            for name, value in sorted(vars(made).items())
            if not name.startswith("__")
            or isinstance(value, types.FunctionType | staticmethod | classmethod | property)
        }
        bases = [self.of(base) for base in made.__bases__]
        return ["class", made.__qualname__, bases, [[name, self.of(value)] for name, value in own.items()]]
