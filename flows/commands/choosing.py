"""The commands that tell which spec is the better one. No model that is in use is changed by them."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from pydantic import ValidationError

from tidemill.flows import launch, views
from tidemill.flows.commands.shared import AsJson, Dataset, Name, Registry, opened, tell
from tidemill.flows.usage import UsageError
from tidemill.tasks.choosing.results import BACKTESTED_IN, COMPARED_IN
from tidemill.tasks.settings import HOLDOUT, Device, RowSettings
from tidemill.tasks.training.spec import Spec

OnDevice = Annotated[Device, Parameter(help="Where tensors are computed; auto takes an accelerator if there is one.")]


def compare(
    dataset: Dataset,
    /,
    *,
    specs: Annotated[list[Path], Parameter(help="JSON or YAML files, as for `train --spec`: two or more.")],
    to: Annotated[
        str,
        Parameter(help="URL of a registry for a model of each spec and the report, compare.html; made if it is new."),
    ] = COMPARED_IN,
    holdout: Annotated[
        float | None,
        Parameter(
            validator=Number(gt=0, lt=1),
            help=f"Share of the rows that no spec is trained on and all are scored on; left out: {HOLDOUT}.",
        ),
    ] = None,
    holdout_dataset: Annotated[
        str | None, Parameter(help="URL of a dataset to score on instead; all rows are then trained on.")
    ] = None,
    device: OnDevice = "auto",
    rows: Annotated[RowSettings, Parameter(name="*")] = RowSettings(),
    as_json: AsJson = False,
) -> None:
    """Train several specs on the same rows of DATASET, score them on the same others, and print one table, the best first.

    Each difference to the best has its standard error, over the held-out rows in pairs. All specs have one target and one task. A
    file with only a target and recipe: 1 is what `tidemill train` does by default. Killed and started again with the same
    arguments, it goes on, and prints the same table.

    For example:

        tidemill compare ./data --specs linear.yaml mlp.yaml recipe.yaml
        tidemill compare ./data --specs small.yaml large.yaml --holdout-dataset ./new --to s3://bucket/compared
    """
    from tidemill.tasks.checking import check_training
    from tidemill.tasks.training.errors import SpecError, TrainingError

    if holdout is not None and holdout_dataset is not None:
        raise UsageError("give either --holdout, a share of the rows, or --holdout-dataset, not both")
    named = _named(specs)
    launch.find_own_modules()
    launch.datasets_exist(dataset, holdout_dataset)
    chosen = rows.where is not None or rows.last is not None
    for name, spec in named.items():
        try:
            check_training(None if chosen else dataset, spec, holdout_dataset, version=rows.table_version)
        except TrainingError as error:
            raise SpecError(f"{name}: {error}") from error
    from tidemill.tasks.choosing.compare import compare as run

    share = HOLDOUT if holdout is None else holdout
    found = run(dataset, named, to, holdout=share, holdout_dataset=holdout_dataset, device=device, rows=rows)
    tell(views.compared(found), as_json)


def backtest(
    registry: Registry,
    model: Name,
    /,
    *,
    archive: Annotated[list[str], Parameter(help="URLs where consumed shards were archived, or kept.")],
    spec: Annotated[Path, Parameter(help="JSON or YAML file of the other spec, as for `train --spec`.")],
    to: Annotated[
        str, Parameter(help="URL of a registry for the model of the backtest and its report; made if it is new.")
    ] = BACKTESTED_IN,
    dataset: Annotated[
        str | None, Parameter(help="URL of the dataset to train the start on; left out: the one that the log names.")
    ] = None,
    device: OnDevice = "auto",
    as_json: AsJson = False,
) -> None:
    """Go through what MODEL was trained on online with another spec, in the order of the log, beside what really ran.

    Each shard is scored before it is trained on. The start is a batch training with the other spec on the dataset that the log
    names, or the log's own batch version if that was made by the same spec: then the scores are those of the log. Killed and
    started again with the same arguments, it goes on, and prints the same table. The registry is only read.

    For example:

        tidemill backtest ./registry flights --archive ./data/archive --spec other.yaml
        tidemill show ./registry flights 0 | jq .spec > own.json
        tidemill backtest ./registry flights --archive ./data/archive --spec own.json --to ./own
    """
    asked = _spec(spec)
    launch.must_exist(*archive)
    launch.datasets_exist(dataset)
    opened(registry, model).head()
    launch.find_own_modules()
    from tidemill.tasks.choosing.backtest import backtest as run

    tell(views.backtested(run(registry, model, asked, archive, to, dataset=dataset, device=device)), as_json)


def _named(paths: list[Path]) -> dict[str, Spec]:
    """The specs by the names of their files; by whole paths where two files have one name."""
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise UsageError(f"--specs names {next(name for name in names if names.count(name) > 1)} more than once")
    return {name: _spec(path) for name, path in zip(names, paths, strict=True)}


def _spec(path: Path) -> Spec:
    from tidemill.flows.specfile import read

    try:
        fields = read(str(path))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path} must hold one mapping of settings: features: [...], target: ..., and so on")
    try:
        return Spec.model_validate({str(name): value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        problems = [
            ": ".join(
                [
                    *([".".join(map(str, found["loc"]))] if found["loc"] else []),
                    found["msg"].removeprefix("Value error, "),
                ]
            )
            for found in error.errors()
        ]
        raise UsageError(f"{path}: {'; '.join(problems)}") from error
