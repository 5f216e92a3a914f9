"""Horovod in place of `torch.distributed`: `make test-horovod`, in an environment in which it is built."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.guarantees.audit import audit
from tests.guarantees.children import SPEC, bits, waiting
from tests.ranks.crews import INBOX, begin, registered
from tests.ranks.crews import SPEC as IN_PARTS
from tests.ranks.test_commands import FLAGS, command, ended, environment, started, torchrun
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.training.spec import Spec

pytestmark = pytest.mark.horovod
HOROVODRUN: Final = [str(Path(sys.executable).parent / "horovodrun"), "-np", "2", "--gloo"]


def follow(place: tuple[str, str], *more: str) -> list[str]:
    return ["follow", *place, "model", "--mode", "drain", *FLAGS, *more]


def place_of(name: str, folder: Path, spec: Spec) -> tuple[str, str]:
    """An inbox with all shards, and a registry with version 0."""
    base = str(folder / f"base-{spec.parts}")
    if not Path(base).exists():
        registered(str(folder / f"dataset-{spec.parts}"), base, spec)
    place = str(folder / name / "inbox"), str(folder / name / "registry")
    begin(base, *place)
    return place


def test_two_ranks_have_the_bits_that_they_have_with_gloo(tmp_path: Path) -> None:
    found = []
    for name, launcher in (("gloo", torchrun()), ("horovod", [*HOROVODRUN, *command()])):
        place = place_of(name, tmp_path, SPEC)
        backend = ["--backend", "horovod"] if name == "horovod" else []
        with started([*launcher, *follow(place, *backend)], tmp_path) as process:
            code, out, err = ended(process, tmp_path)
        assert code == 0, out + err
        assert "2 ranks train together" in out + err
        assert waiting(place[0]) == []
        found.append(bits(VersionLog(open_store(place[1]), "model")))
    assert found[0] == found[1]


def test_parts_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    place = place_of("parts", tmp_path, IN_PARTS)
    with started([*HOROVODRUN, *command(), *follow(place, "--backend", "horovod")], tmp_path) as process:
        code, out, err = ended(process, tmp_path)
    assert code != 0
    assert "parts: Horovod adds up in an order of its own" in out + err
    assert len(waiting(place[0])) == len(INBOX)


def test_ranks_of_horovod_that_were_not_asked_for_are_refused(tmp_path: Path) -> None:
    place = place_of("not-asked", tmp_path, SPEC)
    done = subprocess.run(
        command(*follow(place)),
        env=environment(HOROVOD_RANK="0", HOROVOD_SIZE="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "give --backend horovod" in done.stderr
    audit(VersionLog(open_store(place[1]), "model"), [])
