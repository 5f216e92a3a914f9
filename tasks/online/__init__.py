"""Online training, one room for each part of the protocol in docs/guarantees.md.

Read in this order: `step` (the protocol), `places`, `selection`, `reading`, `turns`, `work`, `commit`, `gate`; then what they
use: `delayed`, `labels`, `triggers`, `report`. `doors` has `drain` and `follow`, which take step after step.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidemill.tasks.online.doors import drain as drain
    from tidemill.tasks.online.doors import follow as follow

__all__ = ["drain", "follow"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tidemill.tasks.online import doors  # here, because it needs torch, which takes seconds

    return getattr(doors, name)
