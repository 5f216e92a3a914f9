"""What torchrun starts for a flow run: `torchrun ... -m tidemill.flows.rank`, as the `command` of a work pool's job.

Rank 0 becomes the flow run, as the worker would have started it; the others do what it says, and need no Prefect.
"""

import os
import sys

from tidemill.flows import terminal
from tidemill.tasks.ranks import launched


def main() -> None:
    """Be one of the ranks. Where no launcher has started several, be the flow run."""
    with terminal.attached("follow", lambda _: None):
        place = launched.enter()
        if place is not None and not place.leads:
            from tidemill.tasks.ranks.crew import serve

            serve(place)
            return
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])


if __name__ == "__main__":
    main()
