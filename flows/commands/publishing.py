"""The command that brings a model registry of others up to date."""

import os
from typing import Annotated

from cyclopts import Parameter

from tidemill.flows import launch, views
from tidemill.flows.commands.shared import AsJson, Name, Registry, opened, tell


def publish(
    registry: Registry,
    model: Name,
    /,
    *,
    to: Annotated[str, Parameter(help="URI of an MLflow tracking server, such as http://127.0.0.1:5000.")],
    name: Annotated[
        str | None, Parameter(help="Of the registered model and the experiment in MLflow; left out: the model's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring MLflow up to date with a model: versions, metrics, what they were trained on, aliases.

    Published are the versions of batch trainings, those that the gate promoted, and those that an alias names. What is there
    already is found again, whatever has ended an earlier call. Aliases of MLflow that bear the name of one of the model's are set
    to where that stands. Needs the extra mlflow. The registry is only read: run it beside a training, as often as you like, but
    once at a time.

    For example:

        tidemill publish ./registry flights --to http://127.0.0.1:5000
    """
    opened(registry, model).head()
    launch.find_own_modules()
    # MLflow would try a server that is away for minutes, and prints the URLs of runs on stdout
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from tidemill.tasks.publishing.publish import publish as run

    done = run(registry, model, to, name)
    made = f"{views.count(len(done.made), 'version')} published, {done.present} there already"
    words = [f"{done.name} at {done.uri}: {made}"]
    if done.gone:
        words.append(f"retention has removed {views.count(len(done.gone), 'version')} before they were published")
    words += [f"alias {alias} names version {version}" for alias, version in sorted(done.aliases.items())]
    tell((done, "\n".join(words)), as_json)
