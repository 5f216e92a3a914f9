"""The loaded model behind MLflow's own server: `python on_mlflow.py REGISTRY MODEL PORT`, with one worker.

The model of MLflow is this module, which its server imports: nothing is pickled.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__)


def _load_pyfunc(path: str) -> Any:
    """What MLflow calls."""
    import torch

    import tidemill

    torch.set_num_threads(1)

    class Model:
        predictor = tidemill.load(os.environ["BENCHMARK_REGISTRY"], os.environ["BENCHMARK_MODEL"])

        def predict(self, frame: Any, params: Any = None) -> Any:
            return [row["prediction"] for row in self.predictor.predict(frame.to_dict("records"))]

    return Model()


if __name__ == "__main__":
    import mlflow.pyfunc

    registry, model, port = sys.argv[1:]
    os.environ |= {"BENCHMARK_REGISTRY": registry, "BENCHMARK_MODEL": model}
    os.environ["PYTHONPATH"] = f"{HERE.parent}:{os.environ['PYTHONPATH']}"
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    folder = f"{tempfile.mkdtemp()}/model"
    mlflow.pyfunc.save_model(folder, loader_module=HERE.stem, pip_requirements=[])
    serve = ["models", "serve", "-m", folder, "--env-manager", "local", "--workers", "1", "-h", "127.0.0.1", "-p", port]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *serve])
