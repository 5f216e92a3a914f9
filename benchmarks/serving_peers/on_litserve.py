"""The loaded model behind LitServe: `python on_litserve.py REGISTRY MODEL PORT`, with one worker."""

import sys
from typing import Any

import litserve
import torch

import tidemill


class Api(litserve.LitAPI):
    def __init__(self, registry: str, model: str) -> None:
        super().__init__()
        self.registry, self.model = registry, model

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.predictor = tidemill.load(self.registry, self.model)

    def decode_request(self, request):  # a type would make it a parameter of the query
        return request

    def predict(self, given: Any) -> Any:
        return self.predictor.predict(given)

    def encode_response(self, output: Any) -> Any:
        return {"predictions": [row["prediction"] for row in output]}


if __name__ == "__main__":
    registry, model, port = sys.argv[1:]
    server = litserve.LitServer(Api(registry, model), accelerator="cpu", workers_per_device=1)
    server.run(port=int(port), host="127.0.0.1", num_api_servers=1, generate_client_file=False, log_level="warning")
