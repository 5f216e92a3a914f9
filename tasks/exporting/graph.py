"""A version as one function of tensors that torch can trace: preprocessing, network, the target's unit.

What `Features.encode` and `loop.predict` do, without shapes or branches that depend on the data. That both give the same
numbers is checked for each version that is exported (`checking.py`).

Shape legend: B rows, S numbers of one row without null indicators, F with them, C ids, I null indicators, V those of vectors,
T targets, O outputs.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tidemill.tasks.exporting.layout import in_float32, indicated_vectors
from tidemill.tasks.training.calling import told, usual_types
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Network
from tidemill.tasks.training.losses import is_column
from tidemill.tasks.training.steps import forward_of


class Graph(nn.Module):
    """The inputs that `layout.py` names to predictions, float32 [B] or [B, O].

    Regression: in the target's unit. Binary: the probability of class 1. Multiclass: the probabilities of all classes.
    """

    def __init__(self, network: Network, types: Mapping[str, str], example: Mapping[str, Tensor]) -> None:
        """The graph of a version.

        Args:
            network: Of the version, in evaluation mode.
            types: Of the columns it was trained on, by Arrow's names: see `layout.in_float32`.
            example: Inputs of a few rows, which tell the shape of the output.

        Raises:
            ModelError: the network fails on them.
        """
        super().__init__()
        self._spec, features = network.spec, network.features
        self.network = network.served
        self.numbers = _Numbers(features, types) if features.scaled else None
        self.target = _Target(features)
        with torch.no_grad():
            x_BF, ids_BC = self._inputs(**example)
            output = self._forward(x_BF, ids_BC)
        self._column = is_column(self._spec, output, len(x_BF))

    def forward(self, numbers: Tensor | None = None, ids: Tensor | None = None, nulls: Tensor | None = None) -> Tensor:
        output = self._forward(*self._inputs(numbers, ids, nulls))
        return cast(Tensor, self.target(output.squeeze(1) if self._column else output))

    def _inputs(
        self, numbers: Tensor | None = None, ids: Tensor | None = None, nulls: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.numbers is not None:
            return self.numbers(numbers, nulls), ids
        assert ids is not None, "a row has numbers or ids"
        return ids.new_zeros((ids.shape[0], 0), dtype=torch.float32), ids

    def _forward(self, x_BF: Tensor, ids_BC: Tensor | None) -> Tensor:
        with told("the model, in evaluation mode,", x_BF, ids_BC), usual_types():
            return forward_of(self._spec, torch.device("cpu"))(self.network, x_BF, ids_BC)


class _Numbers(nn.Module):
    """[B, S] float64 to [B, F] float32: as `packing.pack` scales, and the null indicators behind."""

    center_S: Tensor
    scale_S: Tensor
    float32_S: Tensor
    plain_I: Tensor
    order_I: Tensor

    def __init__(self, features: Features, types: Mapping[str, str]) -> None:
        super().__init__()
        center_F, scale_F = features.scaling
        self.register_buffer("center_S", center_F[: features.scaled].clone())
        self.register_buffer("scale_S", scale_F[: features.scaled].clone())
        float32 = [in_float32(column, types) for column in features.columns for _ in range(column.numbers)]
        self.register_buffer("float32_S", torch.tensor(float32))
        self._some_float32 = any(float32)
        self._limit = features.soft_limit
        places, at = dict[str, int](), 0
        for column in features.columns:
            places[column.name] = at
            at += column.numbers
        vectors = [column.name for column in indicated_vectors(features)]
        plain = [name for name in features.indicated if name not in vectors]
        self.register_buffer("plain_I", torch.tensor([places[name] for name in plain], dtype=torch.int64))
        order = [(plain + vectors).index(name) for name in features.indicated]
        self.register_buffer("order_I", torch.tensor(order, dtype=torch.int64))

    def forward(self, numbers_BS: Tensor, nulls_BV: Tensor | None) -> Tensor:
        null_BS = numbers_BS.isnan()
        x_BS = torch.where(null_BS, 0.0, self._scaled(numbers_BS))
        if self._limit is not None:  # in float64, which holds the square of any float32
            z_BS = x_BS.double()
            x_BS = (z_BS / ((z_BS / self._limit).square() + 1).sqrt()).float()
        if not len(self.order_I):
            return x_BS
        null_BI = null_BS.index_select(1, self.plain_I)
        if nulls_BV is not None:
            null_BI = torch.cat([null_BI, nulls_BV], 1).index_select(1, self.order_I)
        return torch.cat([x_BS, null_BI.float()], 1)

    def _scaled(self, numbers_BS: Tensor) -> Tensor:
        whole_BS = ((numbers_BS - self.center_S) / self.scale_S).float()
        if not self._some_float32:
            return whole_BS
        half_BS = (numbers_BS.float() - self.center_S.float()) / self.scale_S.float()
        return torch.where(self.float32_S, half_BS, whole_BS)


class _Target(nn.Module):
    """Outputs to predictions: as `loop.predict` gives them."""

    mean_T: Tensor
    std_T: Tensor
    range_2T: Tensor
    scaled_range_2T: Tensor

    def __init__(self, features: Features) -> None:
        super().__init__()
        self._task, seen = features.task, features.statistics
        self._scales = features.standardize_target and seen is not None
        self._limits = features.limit_predictions and seen is not None and seen.target_range is not None
        if seen is None:
            return
        self.register_buffer("mean_T", seen.target_mean.clone())
        self.register_buffer("std_T", seen.target_std.clone())
        if seen.target_range is not None:
            scaled_2T = (seen.target_range - self.mean_T) / self.std_T if self._scales else seen.target_range
            self.register_buffer("range_2T", seen.target_range.clone())
            self.register_buffer("scaled_range_2T", scaled_2T.float())

    def forward(self, output: Tensor) -> Tensor:
        if self._limits:
            output = output.clamp(*self.scaled_range_2T.unbind())
        if self._task == "binary":
            return output.sigmoid()
        if self._task == "multiclass":
            return output.softmax(1)
        values = output.double()
        if self._scales:
            values = values * self.std_T + self.mean_T
        if self._limits:  # scaled and back, a limit is no longer exactly what it was
            values = values.clamp(*self.range_2T.unbind())
        return values.float()
