"""What MLflow has of a model, and how it is told more: each thing is looked for before it is made.

The client is that of mlflow-skinny. Whatever MLflow answers, an error included, what counts is what it has when it is asked
again: a name may be taken by another publisher in between, and it says so in many ways.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, Metric, Param, Run, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tidemill.storage.errors import on_one_line
from tidemill.storage.log import VersionLog
from tidemill.tasks.errors import CannotPublish
from tidemill.tasks.publishing.folder import write_folder
from tidemill.tasks.publishing.telling import Input, Publication, milliseconds

BEGINS: Final = "tidemill.begins"
"""Tag of a registered model: sha256 of the manifest of version 0, which tells one model from another of the same name."""
SHA256: Final = "tidemill.sha256"
"""Tag of runs, logged models and model versions: of the version's manifest."""
VERSION: Final = "tidemill.version"
ALIASES: Final = "tidemill.aliases"
"""Tag of a registered model: a JSON list of the aliases that were set from here. Others are left alone."""
_METRICS_AT_ONCE: Final = 1000
"""MLflow takes no more in one request (https://mlflow.org/docs/latest/api_reference/rest-api.html, "Request Limits")."""
_INPUTS_AT_ONCE: Final = 500
_PARAM: Final = 6000
"""Characters that MLflow takes of a parameter's value; as above."""
_NAME: Final = 500
"""Characters that it takes of the name of a dataset."""
_DIGEST: Final = 36
"""Characters that it takes of a dataset's digest."""

T = TypeVar("T")


class Mirror:
    """A registered model of MLflow, and the experiment of the same name."""

    def __init__(self, uri: str, name: str, source: str, begins: str) -> None:
        """Find the two, or make them.

        Args:
            uri: Of the tracking server.
            name: Of both.
            source: URL of the model here.
            begins: sha256 of the manifest of its version 0.

        Raises:
            CannotPublish: MLflow cannot be reached, or has another model of this name.
        """
        self.name, self._uri = name, uri
        with self._told():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            tags = {BEGINS: begins, "tidemill.source": source}
            self._model = _made(
                lambda: _registered(self._client, name), lambda: self._client.create_registered_model(name, tags)
            )
            if self._model.tags.get(BEGINS) != begins:
                theirs = self._model.tags.get("tidemill.source", "somebody else")
                raise CannotPublish(
                    f"{uri} has a registered model {name!r} of {theirs}, which is not {source}: give another name (--name)."
                )
            self._experiment = _made(
                lambda: self._client.get_experiment_by_name(name),
                lambda: self._client.get_experiment(self._client.create_experiment(name)),
            ).experiment_id

    def published(self) -> dict[tuple[int, str], int]:
        """(number, sha256 of the manifest) -> version in MLflow: the lowest, if there are several."""
        with self._told():
            found = dict[tuple[int, str], int]()
            for version in _all(self._client.search_model_versions, f"name='{self.name}'"):
                if SHA256 in version.tags:
                    ours = int(version.tags[VERSION]), version.tags[SHA256]
                    found[ours] = min(found.get(ours, int(version.version)), int(version.version))
            return found

    def put(self, log: VersionLog, publication: Publication) -> int:
        """Make a version with its run and its model, or what is missing of them; returns its number in MLflow."""
        with self._told():
            version = publication.version
            tags = {SHA256: version.sha256, VERSION: str(version.number)}
            run = self._run(publication, tags)
            model = self._logged(log, publication, run, tags)
            self._client.set_terminated(run.info.run_id, "FINISHED", milliseconds(version.manifest))
            return int(self._registered_version(model, run, tags).version)

    def _run(self, publication: Publication, tags: dict[str, str]) -> Run:
        manifest, client = publication.version.manifest, self._client
        began = milliseconds(manifest)
        run = _made(
            lambda: _first(
                client.search_runs([self._experiment], f"tags.`{SHA256}` = '{tags[SHA256]}'", max_results=1)
            ),
            lambda: client.create_run(
                self._experiment, began, tags | {"mlflow.user": "tidemill"}, f"{manifest.kind}-{manifest.version}"
            ),
        )
        run_id = run.info.run_id
        points = iter([Metric(name, value, when, step) for name, value, step, when in publication.values])
        while some := list(islice(points, _METRICS_AT_ONCE)):
            client.log_batch(run_id, metrics=some)
        spec = manifest.resolved_spec or manifest.spec
        params = [
            Param(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for name, value in spec.items()
            if value is not None
        ]
        client.log_batch(
            run_id,
            params=[param for param in params if len(param.value) <= _PARAM],
            tags=[RunTag("tidemill.parent", manifest.parent.sha256 if manifest.parent else "")],
        )
        inputs = iter(publication.inputs)
        while rows := list(islice(inputs, _INPUTS_AT_ONCE)):
            client.log_inputs(run_id, [_dataset(each) for each in rows])
        return run

    def _logged(self, log: VersionLog, publication: Publication, run: Run, tags: dict[str, str]) -> LoggedModel:
        client = self._client
        model = _made(
            lambda: _first(client.search_logged_models([self._experiment], f"tags.`{SHA256}` = '{tags[SHA256]}'")),
            lambda: client.create_logged_model(
                self._experiment, name=self.name, source_run_id=run.info.run_id, tags=tags, model_type="tidemill"
            ),
        )
        if str(model.status) != "READY":
            with TemporaryDirectory() as folder:
                write_folder(Path(folder), log, publication.version, run.info.run_id, model.model_id)
                client.log_model_artifacts(model.model_id, folder)
            client.finalize_logged_model(model.model_id, "READY")
        return model

    def _registered_version(self, model: LoggedModel, run: Run, tags: dict[str, str]) -> ModelVersion:
        client = self._client

        def there() -> ModelVersion | None:
            found = _all(client.search_model_versions, f"name='{self.name}' and tag.`{SHA256}` = '{tags[SHA256]}'")
            return min(found, key=lambda version: int(version.version), default=None)

        return _made(
            there,
            lambda: client.create_model_version(
                self.name,
                f"models:/{model.model_id}",
                run.info.run_id,
                tags,
                await_creation_for=0,
                model_id=model.model_id,
            ),
        )

    def point(self, aliases: dict[str, int]) -> None:
        """Let the aliases name these versions of MLflow, and no others be left of those that were set from here."""
        with self._told():
            ours = set(json.loads(self._model.tags.get(ALIASES, "[]")))
            self._say(ours | aliases.keys())
            for alias, version in sorted(aliases.items()):
                self._client.set_registered_model_alias(self.name, alias, str(version))
            for alias in sorted(ours - aliases.keys()):
                self._client.delete_registered_model_alias(self.name, alias)
            self._say(aliases.keys())

    def _say(self, aliases: Any) -> None:
        """Note which aliases are ours: before any of them is set, and after the others are gone."""
        text = json.dumps(sorted(aliases))
        if self._model.tags.get(ALIASES, "[]") != text:
            self._client.set_registered_model_tag(self.name, ALIASES, text)
            self._model.tags[ALIASES] = text

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (MlflowException, OSError) as error:  # those of requests are OSErrors
            raise CannotPublish(
                f"MLflow at {self._uri}: {on_one_line(str(error))[:500]}. Nothing that is there is lost: publish again."
            ) from error


def _made(find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What there is, else what is made now. If that fails, somebody may have been faster, or only the answer was lost."""
    if (found := find()) is not None:
        return found
    try:
        return make()
    except (MlflowException, OSError):
        if (found := find()) is not None:
            return found
        raise


def _registered(client: MlflowClient, name: str) -> Any:
    return _first(client.search_registered_models(f"name='{name}'"))


def _first(found: Sequence[T]) -> T | None:
    return found[0] if found else None


def _all(search: Callable[..., Any], wanted: str) -> list[ModelVersion]:
    found, token = list[ModelVersion](), None
    while True:
        page = search(wanted, page_token=token)
        found += page
        if not (token := page.token):
            return found


def _dataset(rows: Input) -> DatasetInput:
    scheme = urlsplit(rows.url).scheme
    dataset = Dataset(
        name=rows.name[-_NAME:],
        digest=rows.digest[:_DIGEST],
        source_type=scheme if scheme in ("s3", "gs", "az") else "local",
        source=json.dumps({"uri": rows.url}),
        profile=json.dumps({"num_rows": rows.rows}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
