"""One process makes again what ranks have trained with parts; what they have trained without, it leaves alone and says so."""

import logging
from pathlib import Path

import pytest

from tests.guarantees.audit import archive
from tests.guarantees.children import SPEC as WITHOUT_PARTS
from tests.guarantees.children import start_server
from tests.ranks.crews import INBOX, SPEC, begin, drained, registered
from tidemill.storage.log import open_log
from tidemill.tasks.reproduce import reproduce
from tidemill.tasks.training.spec import Spec


@pytest.mark.parametrize("spec", [SPEC, pytest.param(WITHOUT_PARTS, marks=pytest.mark.ranks)], ids=["parts", "none"])
def test_a_history_of_ranks_is_made_again_where_its_bits_do_not_depend_on_their_number(
    spec: Spec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start_server()
    dataset, base, inbox, registry = (str(tmp_path / name) for name in ("dataset", "base", "inbox", "registry"))
    registered(dataset, base, spec)
    begin(base, inbox, registry)
    assert [ended.how for ended in drained(2, inbox, registry, tmp_path)] == ["done", "done"]
    log = open_log(registry, "model")
    with caplog.at_level(logging.INFO, logger="tidemill.reproduce"):
        found = reproduce(log, [archive(INBOX.items())])
    assert found.findings == []
    versions = log.head().number
    if spec.parts is not None:
        assert (found.reproduced, found.skipped) == (versions, 0)
        assert "ranks" not in log.head().manifest.environment
    else:
        assert (found.reproduced, found.skipped) == (0, versions)
        assert log.head().manifest.environment["ranks"] == 2
        assert "was trained by 2 ranks without parts" in caplog.text
