"""`tidemill.train`, `drain` and `follow`: flow runs where a Prefect server is set up, plain Python where there is none.

Whoever calls `tidemill.tasks` has no Prefect in any case; whoever calls or deploys `tidemill.flows`, a flow run. In a notebook,
what is under way is shown below the cell.
"""

from os import PathLike
from typing import TYPE_CHECKING

from tidemill.flows import launch, server
from tidemill.flows.display import in_notebook
from tidemill.tasks.settings import BatchSettings, OnlineSettings
from tidemill.tasks.training.spec import Spec

if TYPE_CHECKING:
    import pyarrow as pa

    from tidemill.tasks.batch import VersionInfo
    from tidemill.tasks.online.report import OnlineReport


@in_notebook()
def train(
    dataset: "str | pa.Table", registry: str, model: str, spec: Spec, settings: BatchSettings = BatchSettings()
) -> "VersionInfo":
    """Train a model from a Parquet dataset, register it as the new head, and move the alias to it.

    Killed and called again with the same arguments, it continues after its last checkpoint and ends with the same bits. A
    step that finds a store away is tried again for about a minute. Where a Prefect server is set up (`PREFECT_API_URL`, or a
    profile that names one), the training is a flow run of it; that of a table in memory never is, since a table is no
    parameter that a server could keep.

    Args:
        dataset: URL of a folder of Parquet files, or of a single one: a local path, `file://` or `s3://bucket/prefix`. Or a
            table in memory: it is known by its contents, and whoever trains the version again needs the same table.
        registry: URL below which models live.
        model: Name of the model in the registry; made if it is new.
        spec: What to train: columns, model, loss, optimizer, batch size, epochs, seed.
        settings: How to evaluate, and which alias to move.

    Raises:
        StorageError: the dataset or the registry cannot be used; the classes below it say why.
        TrainingError: the spec does not fit the dataset, the model cannot be built, or training diverged.
        TypeError: an argument is no such thing, such as a frame of pandas.
    """
    if not isinstance(dataset, str):
        import pyarrow as pa  # here, because who gives a table has it

        if not isinstance(dataset, pa.Table):
            raise TypeError(
                f"dataset is a URL, as text, or a pyarrow.Table, not {type(dataset).__name__}: of a path give str(path); a "
                "frame of pandas becomes a table by pyarrow.Table.from_pandas, one of polars by its to_arrow()"
            )
    _must_be_text(registry=registry, model=model)
    _must_be(Spec, spec=spec)
    _must_be(BatchSettings, settings=settings)
    by_prefect = isinstance(dataset, str) and server.is_set_up()
    return launch.train(dataset, registry, model, spec, settings, by_prefect=by_prefect)


@in_notebook()
def drain(inbox: str, registry: str, model: str, settings: OnlineSettings = OnlineSettings()) -> "OnlineReport":
    """Train a registered model on the shards that are in an inbox, then stop.

    Each commit makes a new version and removes what it contains. SIGTERM or Ctrl-C ends the run once the step in hand is
    committed, if this is the main thread; SIGKILL at any moment costs only the work since the last commit. A step that finds
    a store away is tried again for about a minute. Where a Prefect server is set up, the run is a flow run of it.

    Args:
        inbox: URL where producers drop Parquet shards: a local path, `file://` or `s3://bucket/prefix`.
        registry: URL below which models live.
        model: Name of a model that `train` has registered; its spec comes from the head version.
        settings: Limits of one commit, what becomes of consumed shards, when the champion moves. `mode` is not looked at.

    Raises:
        StorageError: a place cannot be used, or the history is damaged; the classes below it say why.
        TrainingError: the model cannot be built, or fails on whatever it is trained on.
        GateClosed: too many versions in a row were refused, and the settings say that a person must decide.
        TypeError: an argument is no such thing, such as a path for a URL.
    """
    _must_be_text(inbox=inbox, registry=registry, model=model)
    _must_be(OnlineSettings, settings=settings)
    given = settings.model_copy(update={"mode": "drain"})
    return launch.train_online(inbox, registry, model, given, by_prefect=server.is_set_up())


@in_notebook()
def follow(inbox: str, registry: str, model: str, settings: OnlineSettings = OnlineSettings()) -> "OnlineReport":
    """As `drain`, but go on looking into the inbox every `poll_seconds`, until a signal or `stop_after_seconds` ends it."""
    _must_be_text(inbox=inbox, registry=registry, model=model)
    _must_be(OnlineSettings, settings=settings)
    given = settings.model_copy(update={"mode": "follow"})
    return launch.train_online(inbox, registry, model, given, by_prefect=server.is_set_up())


def _must_be_text(**named: object) -> None:
    """Raises TypeError: what is given by this name is none."""
    for name, given in named.items():
        if not isinstance(given, str):
            hint = ": of a path give str(path)" if isinstance(given, PathLike) else ""
            raise TypeError(f"{name} is text, not {type(given).__name__}{hint}")


def _must_be(kind: type, **named: object) -> None:
    """Raises TypeError: what is given by this name is of another kind."""
    for name, given in named.items():
        if not isinstance(given, kind):
            raise TypeError(
                f"{name} is a tidemill.{kind.__name__}, not {type(given).__name__}: of a dict make one by "
                f"tidemill.{kind.__name__}(**{name})"
            )
