"""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.storage.log import open_log as open_log
    from tidemill.tasks.settings import BatchSettings as BatchSettings
    from tidemill.tasks.settings import OnlineSettings as OnlineSettings
    from tidemill.tasks.training.spec import Spec as Spec

__all__ = ["BatchSettings", "OnlineSettings", "Spec", "open_log"]

_HOME = {
    "BatchSettings": "tidemill.tasks.settings",
    "OnlineSettings": "tidemill.tasks.settings",
    "Spec": "tidemill.tasks.training.spec",
    "open_log": "tidemill.storage.log",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
