"""Train a PyTorch model from Parquet on object storage: in batch, then online, exactly once.

    spec = tidemill.Spec(features=["distance", "carrier"], target="arr_delay", model={"factory": "mlp"})
    version = tidemill.train("./data", "./registry", "delays", spec)
    report = tidemill.drain("./inbox", "./registry", "delays")
    tidemill.load("./registry", "delays").predict([{"distance": 2475.0, "carrier": "AA"}])

Nothing is loaded before a name is used: `import tidemill` alone takes no time. Prefect is loaded by `train`, `drain` and `follow`
alone, and only where a Prefect server is set up: then they are flow runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tidemill.flows.calls import drain as drain
    from tidemill.flows.calls import follow as follow
    from tidemill.flows.calls import train as train
    from tidemill.storage.log import open_log as open_log
    from tidemill.tasks.batch import VersionInfo as VersionInfo
    from tidemill.tasks.choosing.backtest import backtest as backtest
    from tidemill.tasks.choosing.compare import compare as compare
    from tidemill.tasks.history.notebook import history as history
    from tidemill.tasks.online.report import OnlineReport as OnlineReport
    from tidemill.tasks.publishing.publish import publish as publish
    from tidemill.tasks.serving.following import Following as Following
    from tidemill.tasks.serving.loading import load as load
    from tidemill.tasks.serving.predictor import Predictor as Predictor
    from tidemill.tasks.settings import Archive as Archive
    from tidemill.tasks.settings import BatchSettings as BatchSettings
    from tidemill.tasks.settings import GateSettings as GateSettings
    from tidemill.tasks.settings import LabelSettings as LabelSettings
    from tidemill.tasks.settings import Limits as Limits
    from tidemill.tasks.settings import OnlineSettings as OnlineSettings
    from tidemill.tasks.settings import Retrain as Retrain
    from tidemill.tasks.settings import Triggers as Triggers
    from tidemill.tasks.training.spec import Spec as Spec

_HOME: Final = {
    "Archive": "tidemill.tasks.settings",
    "BatchSettings": "tidemill.tasks.settings",
    "Following": "tidemill.tasks.serving.following",
    "GateSettings": "tidemill.tasks.settings",
    "LabelSettings": "tidemill.tasks.settings",
    "Limits": "tidemill.tasks.settings",
    "OnlineReport": "tidemill.tasks.online.report",
    "OnlineSettings": "tidemill.tasks.settings",
    "Predictor": "tidemill.tasks.serving.predictor",
    "Retrain": "tidemill.tasks.settings",
    "Spec": "tidemill.tasks.training.spec",
    "Triggers": "tidemill.tasks.settings",
    "VersionInfo": "tidemill.tasks.batch",
    "backtest": "tidemill.tasks.choosing.backtest",
    "compare": "tidemill.tasks.choosing.compare",
    "drain": "tidemill.flows.calls",
    "follow": "tidemill.flows.calls",
    "history": "tidemill.tasks.history.notebook",
    "load": "tidemill.tasks.serving.loading",
    "open_log": "tidemill.storage.log",
    "publish": "tidemill.tasks.publishing.publish",
    "train": "tidemill.flows.calls",
}
"""Where each public name lives."""

__all__ = [
    "Archive",
    "BatchSettings",
    "Following",
    "GateSettings",
    "LabelSettings",
    "Limits",
    "OnlineReport",
    "OnlineSettings",
    "Predictor",
    "Retrain",
    "Spec",
    "Triggers",
    "VersionInfo",
    "backtest",
    "compare",
    "drain",
    "follow",
    "history",
    "load",
    "open_log",
    "publish",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
