"""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.storage.log import open_log as open_log
    from tidemill.tasks.batch import train as train
    from tidemill.tasks.online import drain as drain
    from tidemill.tasks.online import follow as follow
    from tidemill.tasks.settings import BatchSettings as BatchSettings
    from tidemill.tasks.settings import OnlineSettings as OnlineSettings
    from tidemill.tasks.training.spec import Spec as Spec

__all__ = ["BatchSettings", "OnlineSettings", "Spec", "drain", "follow", "open_log", "train"]

_HOME = {
    "BatchSettings": "tidemill.tasks.settings",
    "OnlineSettings": "tidemill.tasks.settings",
    "Spec": "tidemill.tasks.training.spec",
    "drain": "tidemill.tasks.online",
    "follow": "tidemill.tasks.online",
    "open_log": "tidemill.storage.log",
    "train": "tidemill.tasks.batch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
