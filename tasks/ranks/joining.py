"""From what a launcher says to a group: all ranks meet, and tell each other what their bits depend on."""

import json
import logging

from tidemill.tasks.ranks.group import Group
from tidemill.tasks.ranks.launched import Place
from tidemill.tasks.ranks.messages import gathered
from tidemill.tasks.training.environment import differences, environment

logger = logging.getLogger("tidemill")


def joined(place: Place, timeout_seconds: float) -> Group:
    """The group of all ranks, once all are there. The leader warns of machines that may give other bits than its own."""
    group = _connected(place, timeout_seconds)
    own = environment()
    for rank, said in enumerate(gathered(group, json.dumps(own).encode())):
        if place.leads and (found := differences(own, json.loads(said), ("is", "there it is"))):
            logger.warning("rank %d may have other bits than rank 0: %s", rank, "; ".join(found))
    if place.leads:
        logger.info("%d ranks train together", place.size)
    return group


def _connected(place: Place, timeout_seconds: float) -> Group:
    # here, because one needs an extra package, and a build of torch may be without its distributed part
    if place.backend == "horovod":
        from tidemill.tasks.ranks.horovod import HorovodGroup

        return HorovodGroup(timeout_seconds)
    from tidemill.tasks.ranks.transport import connected

    return connected(place, timeout_seconds)
