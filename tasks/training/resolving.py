"""From the spec that was asked for to the one that is trained.

A spec may leave things open: which columns are features (patterns), the task, the number of classes. They are decided here, once,
from the schema of the dataset and from what the pass over it has learned. The resolved spec is stored in the version: online
training, predictions and reproductions go by it, so that nothing depends on a later default. A batch run is known by what was
asked.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from tidemill.tasks.training.classes import Label, Values, named
from tidemill.tasks.training.errors import ColumnError, SpecError
from tidemill.tasks.training.patterns import choose
from tidemill.tasks.training.recipe import filled
from tidemill.tasks.training.spec import Spec, Task

WHOLE_NUMBERS: Final = 20
"""A target of whole numbers with more distinct values is a quantity, unless the spec says otherwise."""
ROWS_A_LABEL: Final = 2
"""Fewer rows a label, on average, and the labels are ids or quantities."""
FEW: Final = 20
"""So many labels may have fewer rows than that each, as long as not every row has its own."""


@dataclass(frozen=True)
class Learned:
    """What the pass over the dataset has learned, as far as decisions hang on it."""

    rows: int
    """Of the training side."""
    labelled: int
    """Those of them that have all targets."""
    values: Values | None = None
    """Of the target; None: it was clear before the pass that the task is regression, or there are several."""
    useless: Mapping[str, str] = field(default_factory=dict)
    """Columns, of those that a pattern has chosen, that tell nothing -> why."""


class Resolved(BaseModel):
    """What a spec comes to on one dataset. Checkpoints hold it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: Spec
    """Nothing is left open in it."""
    labels: tuple[Label, ...] | None = None
    """Of the classes, in the order of their numbers. None: the target holds the numbers, or the task is regression."""
    class_counts: tuple[int, ...] | None = None
    """Rows of the training side of each class. None: regression, or several targets."""
    unused: dict[str, str] = {}
    """Columns that a pattern has met and that are no features -> why."""


def resolve(asked: Spec, schema: pa.Schema, learned: Learned | None, files: Sequence[pa.Schema] = ()) -> Resolved:
    """Decide what `asked` leaves open: a pure function of its arguments.

    Args:
        asked: The spec as it was asked for.
        schema: Of the dataset as a whole.
        learned: What the pass over the dataset has learned. None: before the pass, to know which columns it reads.
        files: The schemas of the dataset's files, each once: a pattern takes only columns that all of them have.

    Raises:
        ColumnError: features that match no column, or labels that cannot be classes of the task.
        SpecError: what is decided does not fit the rest of the spec.
    """
    chosen = choose(asked, schema, files)
    if learned is None:
        return Resolved(spec=_with(asked, features=chosen.columns), unused=chosen.unused)
    kept = tuple(column for column in chosen.columns if column.name not in learned.useless)
    unused = chosen.unused | dict(learned.useless)
    if not kept:
        why = "; ".join(f"{name!r} is {reason}" for name, reason in unused.items())
        raise ColumnError(f"no column of the dataset is left for features ({why}): name some")
    task, labels, counts = _classes(asked, learned)
    classes = len(counts) if task == "multiclass" and counts is not None else None
    spec = _with(asked, features=kept, task=task, classes=asked.classes or classes)
    spec = filled(spec, learned.labelled)
    return Resolved(spec=spec, labels=labels, class_counts=counts, unused=unused)


def _with(asked: Spec, **decided: Any) -> Spec:
    try:
        return Spec.model_validate(asked.model_dump() | decided)
    except ValidationError as error:
        found = "; ".join(details["msg"].removeprefix("Value error, ") for details in error.errors())
        told = ", ".join(
            f"{name} {value!r}" for name, value in decided.items() if name in ("task", "classes") and value
        )
        raise SpecError(f"the spec does not fit the dataset, which gives {told}: {found}") from error


# ---- labels ----------------------------------------------------------------------------------------------------------
def _classes(asked: Spec, learned: Learned) -> tuple[Task, tuple[Label, ...] | None, tuple[int, ...] | None]:
    """(task, labels if they are no numbers from 0, rows of each class on the training side)."""
    values, stated = learned.values, asked.stated_task
    if values is None:
        return stated or "regression", None, None
    if not values.rows:
        raise ColumnError(
            f"target {asked.targets[0]!r} is null in all {learned.rows} rows of the dataset: nothing can be learned"
        )
    found = values.sorted
    if stated is None and not values.text and not values.boolean and not _few(values):
        return "regression", None, None
    if values.none is not None:
        raise _refused(asked, values.none)
    task = stated or ("binary" if values.boolean or len(found) == 2 else "multiclass")
    numbered = 2 if stated == "binary" else asked.classes
    if numbered is not None and not values.text and all(0 <= int(value) < numbered for value in found):
        return task, None, _counts(values, range(numbered))  # class numbers, whether or not each occurs
    if values.boolean:
        return task, (False, True), _counts(values, range(2))
    if len(found) == 1:
        raise _refused(asked, f"is {found[0]!r} in all rows: nothing can be learned")
    if numbered is not None and len(found) != numbered:
        raise _refused(asked, f"has {len(found)} labels ({named(found)}), and {task} was asked for with {numbered}")
    if task == "binary" and len(found) != 2:
        raise _refused(asked, f"has {len(found)} labels ({named(found)}), and binary has two")
    many = len(found) > FEW and ROWS_A_LABEL * len(found) > values.rows
    if many or (len(found) > 2 and len(found) == values.rows):
        raise _refused(
            asked, f"has {len(found)} labels in {values.rows} rows, about one a row, as an id or free text has"
        )
    labels = None if found == list(range(len(found))) else tuple(found)
    return task, labels, _counts(values, found)


def _few(values: Values) -> bool:
    """Whether whole numbers are few enough to be labels, though nobody says that they are."""
    distinct = len(values.counts)
    return distinct == 2 or (2 < distinct <= WHOLE_NUMBERS and ROWS_A_LABEL * distinct <= values.rows)


def _counts(values: Values, labels: Iterable[int | str]) -> tuple[int, ...]:
    return tuple(values.counts.get(label, 0) for label in labels)


def _refused(asked: Spec, why: str) -> ColumnError:
    return ColumnError(
        f"target {asked.targets[0]!r} of the dataset {why}. Name another target, or mend the column"
        + ("" if asked.stated_task is None else ", or leave out task and classes: the target tells them")
    )
