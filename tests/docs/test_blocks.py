"""Every block of code in the README and in docs/ does what its page says."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import tidemill
from tests.conftest import BUCKET
from tests.docs import warm
from tests.docs.pages import PARSED, RUN, Block, blocks, pages
from tests.docs.session import Session, not_printed
from tests.s3_server import free_ports, wait_until
from tidemill.storage.urls import open_store

# One worker: one warm command, one folder of data. A page may have many commands, and the machine other work.
pytestmark = [pytest.mark.xdist_group("docs"), pytest.mark.slow, pytest.mark.timeout(600)]

ROOT: Final = Path(__file__).parents[2]
NOT_RUN: Final = 23
"""How many blocks of `bash` and `python` are not run, each with its reason in its page. Mend a page before you raise it."""
DIRECTIVES: Final = {"", "not run", "until", "fails", "file", "output"}
MY_BUCKET: Final = "my-bucket"
"""The name that pages give the reader's bucket. It stands for a prefix of the tests' bucket."""


def with_blocks() -> list[str]:
    """The pages that have a block to be run."""
    return [page for page in pages() if any(runs(block) for block in blocks(page))]


SPEC: Final = tidemill.Spec(
    features=["distance", "dep_delay", "carrier"],
    target="arr_delay",
    standardize_target=True,
    learning_rate=0.05,
    epochs=3,
)


def runs(block: Block) -> bool:
    return block.language in RUN and block.directive != "not run"


# ---- what is run -----------------------------------------------------------------------------------------------------
def flights(rows: int, *, seed: int) -> pa.Table:
    """Arrival delays that a model can learn: the delay at the start, minus what a long flight makes good, by carrier."""
    generator = torch.Generator().manual_seed(seed)
    distance = torch.randint(100, 3000, (rows,), generator=generator)
    departure = torch.randint(-10, 60, (rows,), generator=generator)
    carrier = torch.randint(0, 4, (rows,), generator=generator)
    noise = torch.randn(rows, generator=generator)
    arrival = departure - distance / 500 + 3 * carrier + 2 * noise
    return pa.table(
        {
            "distance": distance.tolist(),
            "dep_delay": departure.tolist(),
            "carrier": [("AA", "B6", "DL", "UA")[i] for i in carrier.tolist()],
            "arr_delay": [round(value, 1) for value in arrival.tolist()],
        }
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a dataset in ./data, two shards in ./inbox, new rows in ./new, and in ./registry the model
    `delays`, of which version 0 was made from the dataset, 1 to 3 from a shard each, which lies in ./archive now."""
    folder = tmp_path_factory.mktemp("reader")
    seed = itertools.count()

    def put(place: str, rows: int, *names: str) -> None:
        (folder / place).mkdir(exist_ok=True)
        for name in names:
            pq.write_table(flights(rows, seed=next(seed)), folder / place / f"{name}.parquet")

    put("data", 400, "january", "february")
    put("inbox", 100, "monday", "tuesday", "wednesday")
    put("new", 50, "today")
    dataset, inbox, registry = (str(folder / name) for name in ("data", "inbox", "registry"))
    tidemill.train(dataset, registry, "delays", SPEC)
    settings = {"limits": {"max_shards": 1}, "after_commit": {"archive_to": str(folder / "archive")}}
    tidemill.drain(inbox, registry, "delays", tidemill.OnlineSettings.model_validate(settings))
    put("inbox", 100, "thursday", "friday")
    return folder


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the PATH with a `tidemill` in it that starts at once."""
    folder = tmp_path_factory.mktemp("bin")
    socket = folder / "warm"
    log = folder / "warm.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.warm", str(socket)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    client = folder / "client.py"
    client.write_text(warm.CLIENT)
    script = folder / "tidemill"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -ISE {client} {socket} "$@"\n')
    script.chmod(0o755)
    try:
        wait_until(lambda: server.poll() is not None or socket.exists(), seconds=120, what="the warm command")
        assert server.poll() is None, log.read_text()
        yield folder
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def read(
    request: pytest.FixtureRequest, prepared: Path, command: Path, tmp_path: Path
) -> Callable[[list[Block]], None]:
    """Type the blocks of one page, and compare what is printed with what the page shows."""

    def reader(page: list[Block]) -> None:
        folder = shutil.copytree(prepared, tmp_path / "reader")
        (port,) = free_ports(1)
        stand_ins = {"/var/lib/node_exporter": str(folder), "--port 9400": "--port 0"}
        stand_ins |= {"--port 8000": f"--port {port}", "http://127.0.0.1:8000": f"http://127.0.0.1:{port}"}
        if any(MY_BUCKET in block.text for block in page if runs(block)):
            request.getfixturevalue("s3_server")
            place = f"{BUCKET}/{uuid.uuid4().hex}"
            for path in prepared.rglob("*"):
                if path.is_file():
                    open_store(f"s3://{place}").write(path.relative_to(prepared).as_posix(), path.read_bytes())
            stand_ins |= {MY_BUCKET: place, "https://s3.example.com": os.environ["AWS_ENDPOINT_URL_S3"]}
        paths = [str(command), str(Path(sys.executable).parent), os.environ["PATH"]]
        session = Session(folder, os.environ | {"PATH": os.pathsep.join(paths)}, stand_ins)
        try:
            for block in page:
                if block.directive == "output":
                    missing = not_printed(block.text, session.output)
                    assert missing is None, f"{block.where}: not printed: {missing}\n{session.output}"
                elif runs(block) or block.directive == "file":
                    session.run(block)
        finally:
            session.close()

    return reader


@pytest.mark.parametrize("page", with_blocks())
def test_the_blocks_of_a_page_do_what_it_says(page: str, read: Callable[[list[Block]], None]) -> None:
    read(blocks(page))


# ---- what is not -----------------------------------------------------------------------------------------------------
def test_each_block_that_is_not_run_has_its_reason() -> None:
    left_out = [block for page in pages() for block in blocks(page) if block.language in RUN and not runs(block)]
    assert not [block.where for block in left_out if len(block.argument) < 20], "say why"
    assert len(left_out) == NOT_RUN, "\n".join(f"{block.where}: {block.argument}" for block in left_out)


def test_each_marker_says_something_that_is_known() -> None:
    found = [block for page in pages() for block in blocks(page)]
    assert len(found) > 40  # they are read at all
    assert not [block.where for block in found if block.directive not in DIRECTIVES]
    assert not [block.where for block in found if block.directive == "output" and block.language != "text"]


@pytest.mark.parametrize("page", pages())
def test_json_and_yaml_can_be_read(page: str) -> None:
    for block in blocks(page):
        if block.language in PARSED and block.directive != "not run":
            assert (json.loads if block.language == "json" else yaml.safe_load)(block.text) is not None, block.where


# ---- that these tests can fail ---------------------------------------------------------------------------------------
def page_of(text: str, tmp_path: Path) -> list[Block]:
    (tmp_path / "page.md").write_text(text)
    return blocks("page.md", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\ntidemill status ./nothing\n```\n",
        "```bash\nfalse\ntrue\n```\n",
        "```bash\ntrue | false | true\n```\n",
        "```python\nassert 1 == 2\n```\n",
        "<!-- fails -->\n```bash\ntrue\n```\n",
        "<!-- until: never said -->\n```bash\necho other words\n```\n",
        "```bash\necho one\n```\n<!-- output -->\n```text\ntwo\n```\n",
        "```python\nprint('one')\n```\n\n<!-- output -->\n\n```text\none\none\n```\n",
    ],
)
def test_a_page_that_does_not_hold_fails(text: str, read: Callable[[list[Block]], None], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        read(page_of(text, tmp_path))


def test_blocks_of_a_page_share_a_folder_the_environment_and_python(
    read: Callable[[list[Block]], None], tmp_path: Path
) -> None:
    text = """
```bash
export SAID=hello
mkdir deeper && cd deeper
```
<!-- file: own.py -->
```python
VALUE = 41
```
```python
import os
import own
answer = own.VALUE + 1
```
```python
print(os.environ["SAID"], os.path.basename(os.getcwd()), answer)
```
<!-- output -->
```text
hello deeper 42
```
<!-- until: again -->
```bash
while true; do echo "$SAID again"; sleep 0.1; done
```
<!-- fails -->
```bash
tidemill status ./nothing
```
<!-- output -->
```text
...
Check the URL
```
"""
    read(page_of(text.replace("...\nCheck the URL\n", "...\n"), tmp_path))


@pytest.mark.parametrize("text", ["words\n\n    indented\n", "```\nno language\n```\n", "```bash\nno end\n"])
def test_a_block_that_cannot_be_told_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:"):
        page_of(text, tmp_path)
