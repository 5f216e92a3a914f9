"""The commands that train and predict."""

import logging
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tidemill.flows import launch, torchrun, usage, views
from tidemill.flows.commands.shared import (
    AT_LEAST_ONE,
    AsJson,
    Dataset,
    Inbox,
    Name,
    PairsFile,
    Registry,
    Which,
    opened,
    read_pairs,
    tell,
)
from tidemill.flows.flags import FollowFlags, SpecFlags
from tidemill.tasks.ranks.launched import Backend, Place
from tidemill.tasks.settings import LEARNERS, BatchSettings, OnlineSettings, RowSettings

_FOLLOWING = FollowFlags()
ByPrefect = Annotated[
    bool,
    Parameter(
        negative="",
        help="Make it a Prefect flow run, which it is in any case where a Prefect server is set up (PREFECT_API_URL or a "
        "profile); where none is, a temporary server starts first, which takes up to a minute.",
    ),
]
Ranks = Annotated[
    int,
    AT_LEAST_ONE,
    Parameter(
        help="Train by this many processes of this machine, each of which computes its share of every batch; torchrun starts "
        "them. Where torchrun has started this command itself, there are as many as it says (docs/scale.md).",
    ),
]
TheBackend = Annotated[
    Backend,
    Parameter(
        help="What carries tensors among ranks: torch (gloo; NCCL on CUDA devices), or horovod, whose horovodrun has then "
        "started this command.",
    ),
]


def _serve(place: Place) -> None:
    """Be one of a leader's crew, to the end."""
    from tidemill.tasks.ranks.crew import serve

    logging.getLogger("tidemill").setLevel(logging.WARNING)  # what goes on, the leader tells
    launch.find_own_modules()
    serve(place)


def _run_by_ranks(ranks: int, place: Place | None) -> None:
    """Have ranks run this command, and end with its exit code, if several were asked for and this is none of them."""
    if ranks > 1 and place is None:
        raise SystemExit(torchrun.run(ranks, usage.given.get()))


def train(
    dataset: Dataset,
    registry: Registry,
    model: Name,
    /,
    *,
    spec: Annotated[SpecFlags, Parameter(name="*")],
    settings: Annotated[BatchSettings, Parameter(name="*")] = BatchSettings(),
    file: Annotated[
        Path | None, Parameter("--spec", help="JSON or YAML file of the spec's settings; flags override it.")
    ] = None,
    prefect: ByPrefect = False,
    ranks: Ranks = 1,
    backend: TheBackend = "torch",
    as_json: AsJson = False,
) -> None:
    """Train MODEL from a Parquet DATASET, register it as the new head, and move the alias to it.

    Killed and started again with the same arguments, it continues after its last checkpoint and ends with the same bits.
    Features are names of columns, patterns, !NAME for all but that one, or JSON for more; quote * and ! in a shell. Without
    them, all columns that can be used are features. The target may hold numbers or labels (text, booleans, whole numbers).
    Where no file is given, nor any of --model, --optimizer, --learning-rate, --batch-size and --epochs, these are chosen by the
    dataset, with held-out rows (--recipe 1). Models of your own are found in the current folder.

    For example:

        tidemill train ./data ./registry flights --target delayed
        tidemill train ./data ./registry flights --target delayed --features '*' '!flight_id'
        tidemill train ./data ./registry flights --target delay --features distance carrier --epochs 20
        tidemill train ./data ./registry flights --spec spec.yaml
        tidemill train ./data ./registry flights --target delayed --last 90d --time-column date --where "carrier <> 'AA'"
        tidemill train ./data ./registry flights --target delay \\
            --features distance '{"name": "carrier", "kind": "category"}' \\
            --model.factory mymodels:Net --model.arguments '{"width": 32}'
    """
    if (place := torchrun.entered(ranks, backend)) is not None and not place.leads:
        _serve(place)
        return
    asked = spec.spec(from_file=file is not None)
    launch.before_training(dataset, registry, model, asked, settings, ranks)
    _run_by_ranks(ranks, place)
    launch.find_own_modules()
    by_prefect = launch.by_prefect(prefect)
    tell(views.trained(launch.train(dataset, registry, model, asked, settings, by_prefect=by_prefect)), as_json)


def follow(
    inbox: Inbox | None = None,
    registry: Registry | None = None,
    model: Name | None = None,
    /,
    *,
    pairs: PairsFile = None,
    learners: Annotated[
        int,
        AT_LEAST_ONE,
        Parameter(
            help="With --pairs: the most models of which learner and champion stay in memory. Others are read again.",
        ),
    ] = LEARNERS,
    settings: Annotated[FollowFlags, Parameter(name="*")] = _FOLLOWING,
    prefect: ByPrefect = False,
    ranks: Ranks = 1,
    backend: TheBackend = "torch",
    as_json: AsJson = False,
) -> None:
    """Train MODEL on the shards that arrive in INBOX; commit new versions; remove what they contain.

    SIGTERM, Ctrl-C or --stop-after-seconds ends the run after the commit in hand. After SIGKILL, at any moment, start it again:
    no shard is lost, and none is trained on twice. With --pairs many models take turns in one process, one commit each; what one
    of them fails of holds up no other, and makes the exit code 1.

    For example:

        tidemill follow ./inbox ./registry flights
        tidemill follow ./inbox ./registry flights --mode drain --limits.max-shards 8
        tidemill follow s3://bucket/inbox s3://bucket/registry flights \\
            --after-commit.archive-to s3://bucket/data/archive
        tidemill follow --pairs pairs.yaml --learners 64
    """
    given = settings.settings()
    place = torchrun.entered(ranks, backend)
    if pairs is not None:
        if inbox is not None or prefect or ranks > 1 or place is not None:
            raise usage.UsageError(
                "--pairs stands in place of INBOX, REGISTRY and MODEL, and is neither a flow run nor one of ranks. In Prefect "
                "each model has a run of its own (the deployment `tenants` of prefect.yaml)"
            )
        _follow_many(pairs, given, learners, as_json)
        return
    if place is not None and not place.leads:
        _serve(place)
        return
    if inbox is None or registry is None or model is None:
        raise usage.UsageError("follow needs INBOX, REGISTRY and MODEL, or --pairs FILE")
    if learners != LEARNERS:
        raise usage.UsageError("--learners is for --pairs: one model has one learner")
    launch.before_following(inbox, registry, model, given, ranks)
    _run_by_ranks(ranks, place)
    launch.find_own_modules()
    by_prefect = launch.by_prefect(prefect)
    tell(views.followed(launch.train_online(inbox, registry, model, given, by_prefect=by_prefect)), as_json)


def _follow_many(file: Path, settings: OnlineSettings, learners: int, as_json: bool) -> None:
    from tidemill.tasks.tenants.pairs import PairsError

    launch.find_own_modules()
    pairs = read_pairs(file)
    try:
        report = launch.train_many(pairs, settings, learners)
    except PairsError as error:
        raise usage.UsageError(f"--pairs {file}: {error}") from error
    tell(views.followed_many(report), as_json)
    if report.failing:
        raise SystemExit(1)


def predict(
    registry: Registry,
    model: Name,
    dataset: Dataset,
    output: Annotated[str, Parameter(help="URL of a folder for the predictions. An earlier result there is replaced.")],
    /,
    *,
    version: Which = "champion",
    columns: Annotated[list[str] | None, Parameter(help="Columns to copy beside the prediction.")] = None,
    rows: Annotated[RowSettings, Parameter(name="*")] = RowSettings(),
    as_json: AsJson = False,
) -> None:
    """Write the predictions of a version for every row of DATASET below OUTPUT, one file for each of its files.

    For example:

        tidemill predict ./registry flights ./data ./predictions
        tidemill predict ./registry flights ./data ./predictions --version 12 --columns date carrier
    """
    from tidemill.storage import aliases

    launch.datasets_exist(dataset)
    aliases.resolve(opened(registry, model), version)
    launch.find_own_modules()
    from tidemill.tasks.predict import predict as run

    done = run(registry, model, dataset, output, version, columns or [], rows)
    predictions, files = views.count(done.rows, "prediction"), views.count(done.files, "file")
    tell((done, f"{predictions} of version {done.version} in {files} below {done.output}"), as_json)
