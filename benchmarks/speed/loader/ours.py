"""Tidemill's loader, through the functions that a batch run uses."""

from typing import Any

from benchmarks.speed.loader import LOADERS, Passes
from benchmarks.speed.work import Work


def passes(work: Work, **settings: Any) -> Passes:
    """Passes over the dataset, with further settings of the spec."""
    from tidemill.storage.dataset import snapshot
    from tidemill.tasks.training.batches import Stream
    from tidemill.tasks.training.features import Features
    from tidemill.tasks.training.spec import Spec

    spec = Spec(features=work.features, target="y", batch_size=work.batch, standardize_features=False, **settings)
    groups = snapshot(work.folder).row_groups
    features = Features.resolve(spec, groups[0].schema).fit(groups, None)

    def one_pass(number: int) -> Any:
        return iter(
            Stream(
                groups,
                features,
                batch_size=spec.batch_size,
                window_bytes=spec.window_bytes,
                shuffle_seed=(spec.seed, "epoch", number),
            )
        )

    return one_pass


@LOADERS.case("ours")
def tidemill(work: Work) -> Passes:
    """Tidemill: shuffled in its default window of 16 MiB, half of `shuffle_bytes`."""
    return passes(work, **window(work))


@LOADERS.case("ours")
def tidemill_group_window(work: Work) -> Passes:
    """Tidemill with a window of one row group, as the streaming limit has."""
    return passes(work, shuffle_bytes=2 * window_of_a_group(work))


def window(work: Work) -> dict[str, int]:
    """The setting, if the work has one."""
    return {} if work.shuffle_bytes is None else {"shuffle_bytes": work.shuffle_bytes}


def window_of_a_group(work: Work) -> int:
    """Bytes of one row group as encoded: float32, the target and the place of each row included."""
    return work.group_rows * 4 * (len(work.features) + 2)
