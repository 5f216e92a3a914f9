"""The maintenance flow: retention and garbage collection."""

from prefect import flow
from pydantic import PositiveInt

from tidemill.tasks import wrappers


@flow(name="maintenance", flow_run_name="maintain-{model}", validate_parameters=True)
def maintenance(registry: str, model: str, keep: PositiveInt = 20) -> int:
    """Remove the blobs of versions out of retention, and those of attempts that were never committed.

    Args:
        registry: URL below which models live.
        model: Name of the model.
        keep: How many of the newest versions keep their weights and state; aliased versions always do. Manifests stay.

    Returns:
        How many blobs were removed.
    """
    return len(wrappers.collect_garbage(registry, model, keep))
