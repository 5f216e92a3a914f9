"""Networks with sparse gradients, each with tables of several kinds: those that only gradients write to, and others."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidemill.tasks.training.models import Inputs

WIDTH = 3


class Tables(nn.Module):
    """One table for each column of ids, of the kind that is asked for."""

    def __init__(self, inputs: Inputs, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        self.tables = nn.ModuleList(
            self._made(kind, count + 1) for kind, count in zip(kinds, inputs.buckets, strict=True)
        )
        if "shared" in kinds:  # a second column looks up in the first table too
            self.tables[kinds.index("shared")].weight = self.tables[0].weight
        self.out = nn.Linear(inputs.numbers + WIDTH, 1)

    @staticmethod
    def _made(kind: str, rows: int) -> nn.Module:
        if kind in ("sum", "mean"):
            return nn.EmbeddingBag(rows, WIDTH, mode=kind, sparse=True)
        return nn.Embedding(
            rows,
            WIDTH,
            sparse=kind != "dense",
            padding_idx=1 if kind == "padded" else None,
            max_norm=0.5 if kind == "max_norm" else None,
        )

    def forward(self, x_BF: Tensor, ids_BC: Tensor) -> Tensor:
        embedded_BE = torch.zeros(len(x_BF), WIDTH)
        for kind, table, ids_B in zip(self.kinds, self.tables, ids_BC.unbind(1), strict=True):
            if kind == "sometimes" and x_BF[0, 0] < 0:
                continue
            if kind == "writes" and self.training:  # not in the forward pass that ends a training
                with torch.no_grad():
                    table.weight[ids_B[0] - 1] *= 0.9
            if kind in ("sum", "mean"):  # each row's bag holds its id twice, and that of the next row
                bags_B3 = torch.stack([ids_B, ids_B, ids_B.roll(1)], 1)
                embedded_BE = embedded_BE + table(bags_B3)
            else:
                embedded_BE = embedded_BE + table(ids_B)
            if kind == "tied":  # a gradient for every row too
                embedded_BE = embedded_BE + functional.linear(embedded_BE, table.weight).mean(1, keepdim=True)
        return self.out(torch.cat([x_BF, embedded_BE], 1))
