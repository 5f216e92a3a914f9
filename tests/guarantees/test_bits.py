"""Nothing in the way from Parquet to the weights changes a bit: the example Net against the loop that one would write by hand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load

from examples.net import Net
from tidemill.tasks import batch
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec

ROWS, BATCH = 1000, 64


def test_an_epoch_without_shuffling_equals_the_hand_written_loop(tmp_path: Path) -> None:
    """1000 rows in 3 files of row groups of 77: neither boundary is one of a batch, and the last batch is short."""
    x = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(0))
    y = x.sum(1)
    columns = {f"x{i}": x[:, i].contiguous().numpy() for i in range(10)} | {"y": y.numpy()}
    table = pa.table(columns)
    (tmp_path / "dataset").mkdir()
    for number, start in enumerate(range(0, ROWS, 334)):
        part = table.slice(start, 334)
        pq.write_table(part, tmp_path / "dataset" / f"{number}.parquet", row_group_size=77)

    spec = Spec.model_validate(
        {
            "features": [f"x{i}" for i in range(10)],
            "target": "y",
            "model": {"factory": "examples.net:Net"},
            "batch_size": BATCH,
            "epochs": 1,
            "shuffle": False,
            "standardize_features": False,
            "seed": 3,
        }
    )
    taken = batch.take_snapshot(str(tmp_path / "dataset"))
    run = batch.open_run(taken, str(tmp_path / "registry"), "net", spec, BatchSettings(holdout=0))
    loss = batch.train_epoch(run, 0)
    version = batch.register(run, batch.evaluate(run))
    trained = load(run.log.read_blob(version.manifest.blobs.weights))

    torch.manual_seed(3)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    total = 0.0
    count = -(-ROWS // BATCH)
    for x_BF, y_B in zip(x.tensor_split(count), y.tensor_split(count), strict=True):  # they differ by at most one row
        optimizer.zero_grad()
        mean = torch.nn.functional.mse_loss(net(x_BF), y_B.unsqueeze(1))
        mean.backward()
        optimizer.step()
        total += mean.item() * len(x_BF)

    assert trained.keys() == net.state_dict().keys()
    for name, weights in net.state_dict().items():
        assert torch.equal(trained[name], weights), name
    assert abs(loss - total / ROWS) < 1e-5
