"""What a spec names by import path, and which modules may be imported for it.

Importing runs code. A spec that the user hands over may name anything; one that was read from storage only what is defined
in modules that the environment allows.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch import nn

from tidemill.tasks.training.calling import first_line, frames_of, importing
from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.spec import Spec

ALLOWED_MODULES: Final = "TIDEMILL_FACTORIES"
"""Environment variable: modules, separated by commas, that specs read from storage may import from."""

_KERAS: Final = {
    "keras": "pip install 'tidemill[keras]', and set KERAS_BACKEND=torch in the environment",
    **dict.fromkeys(("tensorflow", "jax"), "if Keras asks for it, set KERAS_BACKEND=torch in the environment"),
}
"""By a module that is missing: what to do."""


def check_allowed(spec: Spec, modules: Sequence[str]) -> None:
    """Refuse a model, loss or metric that is neither built in nor defined in one of `modules` or below. Imports nothing else.

    It must be defined there, not only be within reach: `mymodels:os.system` is nothing of mymodels. Modules of `torch.nn` as
    the model, functions of `torch.nn.functional` as the loss and classes of torchmetrics as metrics need no leave: they run
    no code that a spec could choose.

    Raises:
        FactoryError: all names that are refused, at once.
    """
    asked = [name for name in spec.import_paths if not _is_torchs(spec, name)]
    if refused := [name for name in asked if not _below(name.partition(":")[0], modules)]:
        missing = list(dict.fromkeys(name.partition(":")[0] for name in refused))
        named = ", ".join(map(repr, refused))
        raise FactoryError(
            f"the spec's {named} {'comes' if len(refused) == 1 else 'come'} from storage, and "
            f"{', '.join(f'module {module!r}' for module in missing)} is not among those that may be imported for it "
            f"({', '.join(modules) or 'none'}): if it is your code, set {ALLOWED_MODULES}={','.join([*modules, *missing])}"
        )
    for name in asked:
        origin = getattr(imported(name, "the spec's"), "__module__", None)
        if not isinstance(origin, str) or not _below(origin, modules):
            raise FactoryError(
                f"the spec's {name!r} comes from storage, and what it names was imported from {origin or 'elsewhere'!r}: name "
                f"it where it is defined, and allow that module in {ALLOWED_MODULES} if it is your code"
            )


def _is_torchs(spec: Spec, name: str) -> bool:
    """Whether a name is torch's or torchmetrics' own, in the one place where it does what it is for and nothing else."""
    module = name.partition(":")[0]
    if name in spec.metrics and _below(module, ["torchmetrics"]):
        return True  # called without arguments, and refused if it is no metric
    if name == spec.model.factory and _below(module, ["torch.nn"]):
        found = imported(name, "the spec's")
        return isinstance(found, type) and issubclass(found, nn.Module) and _below(found.__module__, ["torch.nn"])
    if name == spec.loss_name and module == "torch.nn.functional":
        return getattr(imported(name, "the spec's"), "__module__", None) in ("torch.nn.functional", "torch._C._nn")
    return False


def _below(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def imported(name: str, setting: str) -> Callable[..., Any]:
    """The class or function at `package.module:attribute`; `setting` names its place in the spec in messages.

    Raises:
        FactoryError: the module cannot be imported, or has no such attribute that can be called.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with importing():
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        remedy = _KERAS.get(error.name or "", "install its package, or start from its folder")
        raise FactoryError(f"{setting} {name!r}: no module named {error.name!r}: {remedy}") from error
    except (
        Exception,
        SystemExit,
    ) as error:  # importing runs the user's code: a script may end itself with its exit code
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
