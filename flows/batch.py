"""The batch flow: snapshot, epochs, evaluation, registration. Composition only."""

from prefect import flow

from tidemill.flows.telling import telling
from tidemill.tasks import batch, wrappers
from tidemill.tasks.settings import BatchSettings
from tidemill.tasks.training.spec import Spec


@flow(name="batch-training", flow_run_name="train-{model}", validate_parameters=True)
def batch_training(
    dataset: str, registry: str, model: str, spec: Spec, settings: BatchSettings = BatchSettings()
) -> batch.VersionInfo:
    """Train a model from a Parquet dataset, register it as the new head, and move the alias to it.

    Killed and run again with the same arguments, it continues after its last checkpoint and ends with the same bits.

    Args:
        dataset: URL of a folder of Parquet files, or of a single one: a local path, `file://` or `s3://bucket/prefix`.
        registry: URL below which models live.
        model: Name of the model in the registry; made if it is new.
        spec: What to train: columns, model, loss, optimizer, batch size, epochs, seed.
        settings: How to evaluate, and which alias to move.
    """
    with telling(registry, model) as told:
        made = batch.train_by(wrappers.batch_steps, dataset, registry, model, spec, settings)
        told.registered(made, settings.alias)
        return made
