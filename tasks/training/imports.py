"""What a spec names by import path, and which modules may be imported for it.

Importing runs code. A spec that the user hands over may name anything; one that was read from storage only what is defined
in modules that the environment allows.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from tidemill.tasks.training.calling import first_line, frames_of, importing
from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.spec import Spec

ALLOWED_MODULES: Final = "TIDEMILL_FACTORIES"
"""Environment variable: modules, separated by commas, that specs read from storage may import from."""


def check_allowed(spec: Spec, modules: Sequence[str]) -> None:
    """Refuse a model, loss or metric that is neither built in nor defined in one of `modules` or below. Imports nothing else.

    It must be defined there, not only be within reach: `mymodels:os.system` is nothing of mymodels. Metrics of torchmetrics
    are allowed: nothing but their class is called, without arguments.

    Raises FactoryError.
    """
    for name in spec.import_paths:
        if name in spec.metrics and name.startswith("torchmetrics."):
            continue
        module = name.partition(":")[0]
        if not _below(module, modules):
            raise FactoryError(
                f"the spec's {name!r} comes from storage, and module {module!r} is not among those that may be imported for "
                f"it ({', '.join(modules) or 'none'}): if it is your code, set {ALLOWED_MODULES}={','.join([*modules, module])}"
            )
        origin = getattr(imported(name, "the spec's"), "__module__", None)
        if not isinstance(origin, str) or not _below(origin, modules):
            raise FactoryError(
                f"the spec's {name!r} comes from storage, and what it names was imported from {origin or 'elsewhere'!r}: name "
                f"it where it is defined, and allow that module in {ALLOWED_MODULES} if it is your code"
            )


def _below(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def imported(name: str, setting: str) -> Callable[..., Any]:
    """The class or function at `package.module:attribute`; `setting` names its place in the spec in messages.

    Raises FactoryError.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with importing():
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise FactoryError(
            f"{setting} {name!r}: no module named {error.name!r}: install its package, or start from its folder"
        ) from error
    except Exception as error:  # importing runs the user's code
        where = "; ".join(frames_of(error))
        raise FactoryError(
            f"{setting} {name!r}: importing it raised {type(error).__name__}: {first_line(error)}{f' ({where})' if where else ''}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise FactoryError(f"{setting} {name!r}: {module_name!r} has no attribute {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise FactoryError(f"{setting} {name!r} is a {type(found).__name__}: name a class or function")
    return found  # type: ignore[no-any-return]  # callable() leaves Any as it was
