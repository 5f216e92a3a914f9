"""A model in a real MLflow server: the same as in its registry, whatever has ended `publish` on the way."""

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.data import SPEC, put, rows
from tests.s3_server import free_ports, wait_until
from tidemill.storage.aliases import promote
from tidemill.storage.log import VersionLog, open_log
from tidemill.storage.retention import collect_garbage
from tidemill.tasks import batch, online
from tidemill.tasks.errors import CannotPublish
from tidemill.tasks.publishing.publish import Published, publish
from tidemill.tasks.settings import Limits, OnlineSettings

pytestmark = [
    pytest.mark.mlflow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

KILLS: Final = 20
SERVER: Final = Path(__file__).parents[3] / ".venv-mlflow" / "bin"
"""An environment of its own: the server's packages do not go with ours. `make test-mlflow` makes it."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    places = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                SERVER / "python",
                "-m",
                "mlflow",
                "server",
                *places,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--workers",
                "1",
            ],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PATH": f"{SERVER}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
        )

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return httpx.get(f"{uri}/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(answers, seconds=180, what="start of MLflow's server")
        yield uri
    finally:
        process.terminate()
        process.wait(60)
        gc.collect()  # MLflow's client leaves its connections to it


@pytest.fixture
def registry(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


def model(registry: str, name: str, shards: int = 4) -> VersionLog:
    """Version 0 of a batch training, then one for each shard; the gate is open."""
    folder = Path(registry).parent
    put(str(folder / "dataset"), {"a.parquet": rows(100, 0)})
    batch.train(str(folder / "dataset"), registry, name, SPEC)
    if shards:
        put(str(folder / f"inbox-{name}"), {f"{i}.parquet": rows(30, i + 1) for i in range(shards)})
        online.drain(
            str(folder / f"inbox-{name}"),
            registry,
            name,
            OnlineSettings(mode="drain", grace_seconds=0, limits=Limits(max_shards=1)),
        )
    return open_log(registry, name)


class There:
    """What the server has of a model, asked over HTTP as anybody would."""

    def __init__(self, uri: str, name: str) -> None:
        self._url = f"{uri}/api/2.0/mlflow"
        self.model = self._get("registered-models/get", name=name)["registered_model"]
        found = self._get("model-versions/search", filter=f"name='{name}'", max_results=1000)
        self.versions = {
            int(each["version"]): each | {"tags": {tag["key"]: tag["value"] for tag in each["tags"]}}
            for each in found.get("model_versions", [])
        }
        experiment = self._get("experiments/get-by-name", experiment_name=name)["experiment"]
        self.experiment = experiment["experiment_id"]
        self.runs = self._post("runs/search", experiment_ids=[self.experiment], max_results=1000).get("runs", [])
        self.logged = self._post("logged-models/search", experiment_ids=[self.experiment]).get("models", [])

    def _get(self, path: str, **wanted: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self._url}/{path}", params=wanted, timeout=60).raise_for_status().json()
        return answer

    def _post(self, path: str, **wanted: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.post(f"{self._url}/{path}", json=wanted, timeout=60).raise_for_status().json()
        return answer

    def metric(self, run: str, name: str) -> list[tuple[int, float]]:
        """(step, value), in the order of the steps."""
        points = self._get("metrics/get-history", run_id=run, metric_key=name, max_results=1000).get("metrics", [])
        return sorted((int(point["step"]), float(point["value"])) for point in points)

    @property
    def ours(self) -> dict[int, str]:
        """Number here -> sha256 of the manifest."""
        return {
            int(each["tags"]["tidemill.version"]): each["tags"]["tidemill.sha256"] for each in self.versions.values()
        }

    @property
    def aliases(self) -> dict[str, int]:
        """Alias -> number here."""
        named = {each["alias"]: int(each["version"]) for each in self.model.get("aliases", [])}
        return {alias: int(self.versions[number]["tags"]["tidemill.version"]) for alias, number in named.items()}


def assert_mirrored(there: There, log: VersionLog, numbers: list[int], aliases: dict[str, int]) -> None:
    """Each version once, with one run that has ended and one model that is ready; the aliases; numbers with their steps."""
    assert there.ours == {number: log.version(number).sha256 for number in numbers}
    assert len(there.versions) == len(there.runs) == len(there.logged) == len(numbers)
    assert {run["info"]["status"] for run in there.runs} == {"FINISHED"}
    assert {logged["info"]["status"] for logged in there.logged} == {"LOGGED_MODEL_READY"}
    assert there.aliases == aliases
    for run in there.runs:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        manifest = log.version(int(tags["tidemill.version"])).manifest
        assert (
            int(run["info"]["end_time"]) == int(run["info"]["start_time"]) == int(manifest.created.timestamp() * 1000)
        )
        if manifest.kind == "batch":
            losses = manifest.metrics["epoch_loss"]
            assert there.metric(run["info"]["run_id"], "epoch_loss") == list(enumerate(losses))
        else:
            rmse = [(manifest.version, shard.score["rmse"]) for shard in manifest.consumed]
            assert there.metric(run["info"]["run_id"], "score/rmse") == [pytest.approx(point) for point in rmse]
            inputs = run["inputs"]["dataset_inputs"]
            assert {(each["dataset"]["name"], each["dataset"]["digest"]) for each in inputs} == {
                (shard.key, shard.sha256[:36]) for shard in manifest.consumed
            }


def test_versions_metrics_lineage_and_aliases_are_those_of_the_log(server: str, registry: str) -> None:
    log = model(registry, "plain", shards=2)
    done = publish(registry, "plain", server)
    promoted = [0, *(n for n in (1, 2) if getattr(log.version(n).manifest.gate, "decision", "") == "promoted")]
    assert (sorted(done.made), done.present) == (promoted, 0)
    assert_mirrored(There(server, "plain"), log, promoted, {"champion": promoted[-1]})
    assert publish(registry, "plain", server) == done.model_copy(update={"made": {}, "present": len(promoted)})

    # Our alias is the truth: MLflow's own is set back, and one that is gone here goes there.
    promote(log, "champion", log.version(0))
    promote(log, "canary", log.version(promoted[-1]))
    publish(registry, "plain", server)
    assert There(server, "plain").aliases == {"champion": 0, "canary": promoted[-1]}
    log.store.delete("plain/aliases/canary.json")
    publish(registry, "plain", server)
    assert There(server, "plain").aliases == {"champion": 0}


def test_what_is_not_this_model_is_left_alone(server: str, registry: str, tmp_path: Path) -> None:
    model(registry, "twice", shards=0)
    publish(registry, "twice", server)
    other = str(tmp_path / "other" / "registry")
    (tmp_path / "other").mkdir()
    put(str(tmp_path / "other" / "dataset"), {"a.parquet": rows(50, 9)})
    batch.train(str(tmp_path / "other" / "dataset"), other, "twice", SPEC)
    with pytest.raises(
        CannotPublish, match=r"registered model 'twice' of .*/twice, which is not .*: give another name"
    ):
        publish(other, "twice", server)
    assert publish(other, "twice", server, "another").made == {0: 1}


def test_a_server_that_is_away_is_told_in_one_line(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model(registry, "m", shards=0)
    (port,) = free_ports(1)
    with pytest.raises(CannotPublish, match=f"MLflow at http://127.0.0.1:{port}: .*publish again"):
        publish(registry, "m", f"http://127.0.0.1:{port}")


def test_versions_whose_weights_are_gone_are_counted(server: str, registry: str) -> None:
    log = model(registry, "swept", shards=3)
    promote(log, "champion", log.head())
    collect_garbage(log, keep=1)
    done = publish(registry, "swept", server)
    assert 0 in done.gone
    assert set(done.made) & set(done.gone) == set()
    assert There(server, "swept").aliases == {"champion": log.head().number}


def attempt(registry: str, name: str, uri: str, kill_at: int, moment: str) -> Published | None:
    """What a process of its own has done, or None: it was killed."""
    command = [sys.executable, "-m", "tests.tasks.publishing.killed", registry, name, uri, str(kill_at), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == -9:
        return None
    assert done.returncode == 0, done.stderr
    return Published.model_validate(json.loads(done.stdout.splitlines()[-1]))


def test_after_twenty_kills_the_registries_are_equal(server: str, registry: str) -> None:
    """At requests drawn at random, before they are sent or after their answer; each attempt goes on after the last."""
    log = model(registry, "killed", shards=4)
    draw = random.Random(0)
    killed = 0
    while killed < KILLS:
        moment = draw.choice(("before", "after"))
        if attempt(registry, "killed", server, draw.randint(1, 12), moment) is None:
            killed += 1
            continue
        # All is there: killed further while aliases are set, on a model with more versions
        put(f"{Path(registry).parent}/inbox-killed", {f"more-{killed}.parquet": rows(30, 100 + killed)})
        online.drain(
            f"{Path(registry).parent}/inbox-killed", registry, "killed", OnlineSettings(mode="drain", grace_seconds=0)
        )
    attempt(registry, "killed", server, 0, "before")
    gates = [log.version(number).manifest.gate for number in range(log.head().number + 1)]
    wanted = [0, *(number for number, gate in enumerate(gates) if gate is not None and gate.decision == "promoted")]
    assert_mirrored(There(server, "killed"), log, wanted, {"champion": wanted[-1]})
