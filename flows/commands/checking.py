"""The command that tries a place before anything depends on it."""

from typing import Annotated

from cyclopts import Parameter

from tidemill.flows import views
from tidemill.flows.commands.shared import AT_LEAST_ONE, AsJson, tell


def check(
    url: Annotated[str, Parameter(help="URL of a registry, a dataset or an inbox, or of where one shall be.")],
    /,
    *,
    rounds: Annotated[
        int,
        AT_LEAST_ONE,
        Parameter(help="How often each race is run: more find what goes wrong more seldom."),
    ] = 100,
    as_json: AsJson = False,
) -> None:
    """Try a place: whether the store keeps each promise that Tidemill is built on, and how fast it is.

    Four processes race for the same objects, 8 calls at once; listings, ranges, keys, etags and clocks are tried; each verb
    is timed. All is written in a hidden folder of its own below URL, which is removed at the end, and also when the command is
    stopped. Nothing else is touched. The place must exist. It takes seconds on a local disk, a minute or so where a request takes
    30 ms, and about 8,000 requests.

    Exit codes: 0 every promise holds that Tidemill needs, 1 one does not, or it could not be found out.

    For example:

        tidemill check ./registry
        tidemill check s3://bucket/registry --rounds 1000
        tidemill check s3://bucket/inbox --json
    """
    from tidemill.storage.certify.run import certify
    from tidemill.storage.certify.trial import Effort

    found = certify(url, Effort(rounds=rounds))
    tell(views.certified(found), as_json)
    if not found.fit:
        raise SystemExit(1)
