"""The pass over a dataset before training: from the spec that was asked for to the resolved one and its fitted features."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import torch

from tidemill.tasks.training.classes import MOST, Values
from tidemill.tasks.training.errors import ColumnError
from tidemill.tasks.training.features import Counted, Features, learning
from tidemill.tasks.training.groups import RowGroup, Split
from tidemill.tasks.training.patterns import choose
from tidemill.tasks.training.resolving import Learned, Resolved, resolve
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.statistics import Moments
from tidemill.tasks.training.survey import Survey


def fit(
    asked: Spec,
    schemas: Sequence[tuple[str, pa.Schema]],
    schema: pa.Schema,
    groups: Sequence[RowGroup],
    split: Split | None = None,
) -> tuple[Resolved, Features]:
    """Resolve a spec on a dataset and learn the statistics of its columns, in one streaming pass.

    Args:
        asked: The spec as it was asked for.
        schemas: Each distinct schema of the dataset's files, with the name of a row group that has it.
        schema: Of the dataset as a whole.
        groups: Its row groups.
        split: The side whose rows are trained on; None: all rows.

    Raises:
        ColumnError: a column that is missing or cannot be used, or labels that cannot be classes.
        SpecError: what the dataset decides does not fit the rest of the spec.
    """
    files = [found for _, found in schemas]
    before = resolve(asked, schema, None, files)
    open_target = len(asked.targets) == 1 and asked.stated_task != "regression"
    features = Features.resolve(before.spec, schema, () if open_target else None)
    for name, found in schemas:
        features.check(found, name, begun=False)
    survey = Survey(
        asked.targets[0] if open_target else None,
        sorted(choose(asked, schema, files).by_pattern),
        asked.targets if asked.stated_task in (None, "regression") else (),
        Values(most=max(MOST, asked.classes or 0)),
    )
    with learning(groups) as activity:
        counted = features.count(groups, split, survey, activity)
    learned = Learned(
        counted.rows, counted.labelled, survey.values if open_target else None, _useless(survey, features, counted)
    )
    resolved = resolve(asked, schema, learned, files)
    if resolved.spec.task == "regression":
        _check_differences(asked.targets, survey, counted)
    final = Features.resolve(resolved.spec, schema, resolved.labels)
    places = {column.name: i for i, column in enumerate(features.columns)}
    counted = counted.of([places[column.name] for column in final.columns])
    if (counts := resolved.class_counts) is not None:
        if resolved.labels is not None:
            counted = replace(counted, targets=[Moments.of_counts(counts)])
        if final.class_weighting == "balanced" or final.classes is not None:
            counted = replace(counted, class_counts=torch.tensor(counts))
    return resolved, final.with_statistics(counted)


def _check_differences(targets: Sequence[str], survey: Survey, counted: Counted) -> None:
    """Raises ColumnError: the values of a target differ, and are one as float32, so that any model would learn them in vain."""
    low_T, high_T = counted.range_2T
    one_T = (low_T.float() == high_T.float()) & torch.isfinite(low_T.float())
    for name, is_one in zip(targets, one_T.tolist(), strict=True):
        low, high = survey.ends.get(name, (None, None))
        if is_one and low != high:
            raise ColumnError(
                f"target {name!r} of the dataset has values that differ by less than float32, as which they are trained on and "
                "predicted, can hold: subtract a constant from them, or multiply them where they are close to 0"
            )


def _useless(survey: Survey, features: Features, counted: Counted) -> dict[str, str]:
    """Columns that a pattern has chosen and that tell nothing -> why."""
    names = [column.name for column in features.columns]
    constant = {
        column.name: not moments.m2_K.any()
        for column, moments in zip(features.columns, counted.inputs, strict=True)
        if not column.buckets
    }
    return survey.useless(counted.rows, dict(zip(names, counted.nulls, strict=True)), constant)
