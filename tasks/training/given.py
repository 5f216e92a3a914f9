"""The score of the answers that were given: predictions that stand in a log of requests, beside the labels that came later.

Shape legend: N rows of a row group, B those of them that have an answer of one version and a label, O outputs.
"""

from __future__ import annotations  # pa.Array[Any] takes its type parameter in the stubs only

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from tidemill.tasks.training.columns import as_tensor, one_array
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.groups import RowGroup
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import Score, zero
from tidemill.tasks.training.request_log import PREDICTION, PROBABILITIES, VERSION
from tidemill.tasks.training.scoring import Scoring, as_output


@dataclass(frozen=True)
class _Answers:
    """Of one row group, those that have a label."""

    version_B: Tensor
    """int64"""
    predicted: Tensor
    """As `loop.predict` gives them: [B] or [B, O]."""
    y: Tensor
    w_B: Tensor | None


def has_answers(schema: pa.Schema) -> bool:
    """Whether rows of this schema say what was answered, and by which version."""
    return {VERSION, PREDICTION} <= set(schema.names)


def score_answers(learner: Learner | Network, groups: Sequence[RowGroup]) -> dict[int, Score]:
    """Loss and metrics of the answers that stand in the rows, for each version that gave some, as `loop.score` has them.

    Rows without an answer or a label do not count. For regression the loss is that in the units of this learner.

    Raises:
        ColumnError: the answers are none of this model's task.
    """
    found = list(_answers(learner, groups))
    versions = {version for part in found for version in part.version_B.tolist()}
    return {version: _score(learner, version, found, groups[0].name) for version in sorted(versions)}


def _answers(learner: Learner | Network, groups: Sequence[RowGroup]) -> Iterator[_Answers]:
    features, spec = learner.features, learner.spec
    column = PREDICTION if features.labels is None else PROBABILITIES
    names = list(dict.fromkeys([*features.targets, *([] if spec.sample_weight is None else [spec.sample_weight])]))
    for group in groups:
        table = group.read([*names, VERSION, column])
        y_N, labelled_N = features.target(table, group.name)
        w_N = features.weights(table, group.name)
        versions, answers = one_array(table.column(VERSION)), one_array(table.column(column))
        if not pa.types.is_integer(versions.type):
            raise ColumnError(f"{VERSION!r} of {group.name} has type {versions.type}: no versions")
        usable_N = _valid(versions) & _valid(answers)
        if labelled_N is not None:
            usable_N &= labelled_N
        rows = usable_N.nonzero().squeeze(1)
        version_N = as_tensor(versions, None)[0].squeeze(1).long()
        predicted = _predicted(learner, answers, group.name)
        yield _Answers(version_N[rows], predicted[rows], y_N[rows], None if w_N is None else w_N[rows])


def _valid(array: pa.Array[Any]) -> Tensor:
    return as_tensor(array.is_valid(), None)[0].squeeze(1).bool()


def _predicted(learner: Learner | Network, answers: pa.Array[Any], where: str) -> Tensor:
    """[N] or [N, O]. Raises ColumnError: answers of another shape than this model's."""
    kind: Any = answers.type
    width = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    spec, features = learner.spec, learner.features
    if spec.task == "regression":
        expected = None if len(features.targets) == 1 else len(features.targets)
    elif features.labels is not None:
        expected = len(features.labels)
    else:
        expected = features.classes
    if width != expected or not pa.types.is_floating(kind if width is None else kind.value_type):
        raise ColumnError(f"the answers in {where} have type {kind}: they are none of this model's")
    values_NK, _ = as_tensor(answers, width)
    if width is None:
        return values_NK.squeeze(1)
    return values_NK[:, 1] if spec.task == "binary" else values_NK  # of two labels


def _score(learner: Learner | Network, version: int, found: Sequence[_Answers], where: str) -> Score:
    scoring = Scoring(learner, zero(torch.device("cpu")))
    for part in found:
        own = part.version_B == version
        if not own.any():
            continue
        predicted, w_B = part.predicted[own], None if part.w_B is None else part.w_B[own]
        values = predicted.double() if learner.spec.task == "regression" else predicted
        y = part.y[own]
        output = as_output(learner, predicted)
        scoring.add(
            output.to(learner.device), y.to(learner.device), w_B if w_B is None else w_B.to(learner.device), values, y
        )
    loss, metrics = scoring.result(f"the answers in {where}")
    return Score(scoring.rows, loss, metrics, scoring.left_out)
