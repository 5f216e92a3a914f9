"""The command that answers requests."""

from typing import Annotated

from cyclopts import Parameter

from tidemill.flows import launch
from tidemill.flows.commands.shared import Name, Registry
from tidemill.tasks.settings import ServeSettings


def serve(
    registry: Registry,
    model: Name,
    /,
    *,
    settings: Annotated[ServeSettings, Parameter(name="*")] = ServeSettings(),
) -> None:
    """Answer requests for predictions over HTTP with the version that an alias names. It is followed.

    POST /predict takes rows as JSON, as an Arrow stream or as a Parquet file; /openapi.json says what a row has. /health, /ready
    and /metrics are for who watches. SIGTERM or Ctrl-C ends the server after the requests that are under way. Where the
    environment variable TIDEMILL_TOKEN is set, who asks must send it as bearer token. Needs tidemill[serve].

    For example:

        tidemill serve ./registry flights
        tidemill serve s3://bucket/registry flights --host 0.0.0.0 --workers 4 --log-to s3://bucket/inbox
    """
    launch.find_own_modules()
    from tidemill.tasks.serving.running import serve as run

    run(registry, model, settings)
