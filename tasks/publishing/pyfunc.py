"""What MLflow's `python_function` flavor loads: `MLmodel` names this module. Nothing is unpickled.

A model of the user's own code is loaded only where the environment allows its module (`TIDEMILL_FACTORIES`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tidemill.storage.chain import Version
from tidemill.storage.errors import CorruptObject
from tidemill.storage.manifest import decode, sha256
from tidemill.storage.pieces import Buffers
from tidemill.storage.segments import is_of
from tidemill.tasks.serving.predictor import Predictor
from tidemill.tasks.training.classes import PREDICTED
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.learner import Network
from tidemill.tasks.versions import check_environment_allows, resolved_of

if TYPE_CHECKING:
    import pandas as pd

MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
STATE: Final = "state.safetensors"


class Pyfunc:
    """A published version, as MLflow calls it."""

    def __init__(self, folder: Path) -> None:
        """Read what `folder.write_folder` has written below `data`.

        Raises:
            CorruptObject: the manifest or the weights are not what was committed.
            FactoryError: the model is of the user's own code, which the environment does not allow.
            StateMismatch: the model's code no longer fits its weights.
        """
        data = (folder / MANIFEST).read_bytes()
        version = Version(decode(data, str(folder / MANIFEST)), sha256(data))
        weights = (folder / WEIGHTS).read_bytes()
        if not is_of(version.manifest.blobs.weights, Buffers([memoryview(weights)])):
            raise CorruptObject(f"{folder / WEIGHTS} is not what was committed: publish the version again.")
        spec = resolved_of(version)
        check_environment_allows(spec)
        network = Network.load(spec, weights, (folder / STATE).read_bytes())
        self.predictor = Predictor.of(version, network)

    def predict(self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """A frame with the columns that `tidemill predict` writes. What pandas calls missing is null.

        Raises ColumnError: a column is missing or there twice, or holds what it cannot hold.
        """
        import pandas as pd

        columns = self.predictor.network.features.columns
        names = list(model_input.columns)
        if twice := next((column.name for column in columns if names.count(column.name) > 1), None):
            raise ColumnError(f"column {twice!r} occurs {names.count(twice)} times in the frame: give each name once")
        frame = model_input.astype(object).where(model_input.notna(), None)
        for column in columns:
            if (column.length or column.width) and column.name in frame:
                frame[column.name] = frame[column.name].map(_items)
        predicted = PREDICTED[:1] if self.predictor.labels is None else PREDICTED
        return pd.DataFrame(self.predictor.predict(frame.to_dict("records")), columns=list(predicted))


def _items(value: Any) -> Any:
    """A list as it was before pandas made an array of it, where integers with a null among them are float64, and the null NaN."""
    if isinstance(value, np.ndarray):
        return _items(value.tolist())
    if isinstance(value, list):
        return [_items(item) for item in value]
    if isinstance(value, float):
        return None if value != value else int(value) if value.is_integer() else value
    return value


def _load_pyfunc(path: str) -> Pyfunc:
    """MLflow's entry point."""
    return Pyfunc(Path(path))
