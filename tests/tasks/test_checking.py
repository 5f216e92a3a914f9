"""What can be known to be wrong with a batch training by a few requests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tests.data import put, rows
from tests.storage.faults import hooked
from tidemill.storage.dataset import peek
from tidemill.storage.errors import DatasetError, UnsupportedTable
from tidemill.tasks.checking import check_training
from tidemill.tasks.training.errors import ColumnError, FactoryError
from tidemill.tasks.training.spec import Spec

MakeUrl = Callable[[str], str]
SPEC = Spec(target="y")


def test_one_file_is_looked_at_however_many_there_are(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {f"{i:03}.parquet": rows(10, i) for i in range(40)})
    reads: set[str] = set()
    stores = hooked(lambda call: reads.add(call.key) if call.verb == "read" else None)
    name, schema = peek(memory_url("dataset"), stores)
    assert (name, schema.names, len(reads)) == (f"{memory_url('dataset')}/000.parquet", ["a", "b", "y"], 1)


def test_hidden_and_other_files_are_passed_over(make_url: MakeUrl) -> None:
    url = make_url("dataset")
    put(url, {"_SUCCESS": b"", ".x.parquet": b"no", "notes.txt": b"no", "year=2020/part.PARQUET": rows(10, 0)})
    assert peek(url)[1].names == ["a", "b", "y", "year"]
    assert peek(f"{url}/year=2020/part.PARQUET")[1].names[:3] == ["a", "b", "y"]


def test_what_is_no_dataset_is_told_as_the_run_would(memory_url: MakeUrl) -> None:
    with pytest.raises(DatasetError, match="nothing holds no Parquet file"):
        check_training(memory_url("nothing"), SPEC)
    put(memory_url("empty"), {"notes.txt": b""})
    with pytest.raises(DatasetError, match=r"holds no Parquet file .* Passed over: 1 files that do not end"):
        check_training(memory_url("empty"), SPEC)
    put(memory_url("bad"), {"x.parquet": b"no Parquet"})
    with pytest.raises(DatasetError, match=r"x\.parquet"):
        check_training(memory_url("bad"), SPEC)
    put(memory_url("hudi"), {".hoodie/hoodie.properties": b"", "x.parquet": rows(10, 0)})
    with pytest.raises(UnsupportedTable):
        check_training(memory_url("hudi"), SPEC)
    put(memory_url("delta"), {"_delta_log/0.json": b"{}", "x.parquet": rows(10, 0)})
    with pytest.raises(DatasetError, match="this Delta table holds no version"):
        check_training(memory_url("delta"), SPEC)


def test_a_column_without_a_value_in_the_first_file_may_have_one_in_another(memory_url: MakeUrl) -> None:
    first = pa.table({"a": pa.nulls(5), "y": pa.nulls(5)})
    put(memory_url("dataset"), {"0.parquet": first, "1.parquet": rows(10, 0)})
    check_training(memory_url("dataset"), SPEC)
    check_training(memory_url("dataset"), Spec(features=["a"], target="y", sample_weight="a"))


def test_a_holdout_is_looked_at_too(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(10, 0)})
    put(memory_url("holdout"), {"0.parquet": rows(10, 0).drop_columns(["b"])})
    check_training(memory_url("dataset"), SPEC, memory_url("dataset"))
    with pytest.raises(ColumnError, match=r"column 'b' is missing from .*holdout/0\.parquet"):
        check_training(memory_url("dataset"), Spec(features=["a", "b"], target="y"), memory_url("holdout"))


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to import from; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("own:Net", None),
        ("own:Net.build", None),
        ("own:made", None),
        ("own:again", None),
        ("own:starred", None),
        ("own:Missing", "'own' has no attribute 'Missing'"),
        ("own:Nett", "did you mean 'Net'"),
        ("unknowable:Anything", None),
        ("broken:Net", None),
        ("folder.inner.deep:Deep", None),
        ("folder.inner.deep:Deap", "'folder.inner.deep' has no attribute 'Deap': did you mean 'Deep'"),
        ("folder.inner.nothing:Deep", None),  # of folders without __init__.py: the run says so
        ("nowhere:Net", "no module named 'nowhere'"),
        ("json.nothing:Net", "no module named 'json.nothing'"),
        ("json.decoder:JSONDecoder", None),
        ("os.path:join", None),
        ("sys:exit", None),
        ("__main__:Net", None),
    ],
)
def test_a_factory_is_looked_for_without_being_imported(modules: Path, path: str, told: str | None) -> None:
    (modules / "own.py").write_text(
        "import starry as again\nfrom starry import *\nif True:\n    made = 1\nclass Net:\n    def build(self): ...\n"
        "raise SystemError('never run')\n"
    )
    (modules / "starry.py").write_text("starred = 1\n")
    (modules / "unknowable.py").write_text("globals().update(Net=1)\n")
    (modules / "broken.py").write_text("class Net(:\n")
    (modules / "folder/inner").mkdir(parents=True)
    (modules / "folder/inner/deep.py").write_text("class Deep: ...\n")
    put(url := f"memory://checking-{modules.name}", {"0.parquet": rows(10, 0)})
    before = set(sys.modules)
    if told is None:
        check_training(url, Spec(target="y", model={"factory": path}))
    else:
        with pytest.raises(FactoryError, match=told):
            check_training(url, Spec(target="y", model={"factory": path}))
    assert set(sys.modules) == before


def test_losses_and_metrics_are_looked_for_too(memory_url: MakeUrl) -> None:
    put(memory_url("dataset"), {"0.parquet": rows(10, 0)})
    check_training(memory_url("dataset"), Spec(target="y", metrics=["torchmetrics:R2Score"]))
    with pytest.raises(FactoryError, match="loss 'nowhere:loss': no module named 'nowhere'"):
        check_training(memory_url("dataset"), Spec(target="y", loss="nowhere:loss"))
    with pytest.raises(FactoryError, match="metrics 'torchmetrics:R2Scor': 'torchmetrics' has no attribute 'R2Scor'"):
        check_training(memory_url("dataset"), Spec(target="y", metrics=["torchmetrics:R2Scor"]))
