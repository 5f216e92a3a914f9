"""The recipe of defaults (`recipe: 1`), against scikit-learn's default linear model and default MLP, on 22 and 13 tables.

    .venv/bin/python -m benchmarks.learning.defaults                    # ours; the peers' results are in defaults-peers.json
    .venv/bin/python -m benchmarks.learning.defaults --sets iris wine
    .venv/bin/python -m benchmarks.learning.defaults --peers            # also what is missing of the peers, which takes hours

Needs the `bench` extra and statsmodels. All columns are features, and the task is named.

Peers see numbers with the mean in place of nulls and a column that says so, standardised, and categories
one-hot. A ratio is ours over the better peer's, each in its mean over the splits: of rmse, or the geometric mean of that of the
error rate (half an error added to each) and that of the log loss, the better peer chosen for each. Writes a table (Markdown) and
all numbers (JSON lines) beside this file, unless only some sets were asked for.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.learning.sets import SETS, A, B, C, load, splits
from tidemill.tasks.batch import train
from tidemill.tasks.predict import predict
from tidemill.tasks.training.spec import Spec

if TYPE_CHECKING:
    import pandas as pd

HERE: Final = Path(__file__).parent
PEERS: Final = HERE / "defaults-peers.json"
FEW_EPOCHS: Final = {"flights": 20, "diamonds": 50, "ratdat": 50}
"""Of the peers' MLP where its 200 take hours: more would be better by little."""
BOUNDS: Final = {"half": 1.00, "classification": 1.03, "worst": 1.10, "worst of few rows": 1.20}
FEW_ROWS: Final = 300
Metrics = dict[str, float]


def scores(data: "pd.DataFrame", test: np.ndarray, task: str, predicted: np.ndarray) -> Metrics:
    """rmse; or error rate, half an error added, and log loss of probabilities [rows, classes]."""
    y = data["y"].to_numpy()
    if task == "regression":
        return {"rmse": float(np.sqrt(np.mean((predicted - y[test]) ** 2)))}
    classes, number = np.unique(y, return_inverse=True)
    p = predicted if predicted.ndim == 2 else np.stack([1 - predicted, predicted], 1)
    assert p.shape == (len(test), len(classes))
    p = np.clip(p / p.sum(1, keepdims=True), 1e-15, 1)
    wrong = np.sum(p.argmax(1) != number[test])
    return {
        "error": float((wrong + 0.5) / len(test)),
        "log_loss": float(-np.log(p[np.arange(len(test)), number[test]]).mean()),
    }


def trivial(data: "pd.DataFrame", train_rows: np.ndarray, test: np.ndarray, task: str) -> np.ndarray:
    """The mean, or how often each class occurs."""
    y = data["y"].to_numpy()
    if task == "regression":
        return np.full(len(test), y[train_rows].mean())
    _, number = np.unique(y, return_inverse=True)
    return np.tile(np.bincount(number[train_rows], minlength=number.max() + 1) / len(train_rows), (len(test), 1))


# ---- ours ------------------------------------------------------------------------------------------------------------
def ours(data: "pd.DataFrame", train_rows: np.ndarray, test: np.ndarray, task: str) -> tuple[np.ndarray, float, int]:
    """(predictions, seconds of the training, epochs): as `tidemill train` and `tidemill predict`, from Parquet files."""
    place = Path(tempfile.mkdtemp(prefix="tidemill-defaults-"))
    try:
        labels = data["y"]
        if task != "regression":
            labels = labels.astype("category").cat.codes.astype("int64")
        table = pa.Table.from_pandas(data.assign(y=labels), preserve_index=False).replace_schema_metadata(None)
        for name, rows in (("train", train_rows), ("test", test)):
            (place / name).mkdir()
            pq.write_table(table.take(rows), place / name / "rows.parquet")
        classes = int(labels.max()) + 1 if task == "multiclass" else None
        features = [column for column in table.column_names if column != "y"]
        asked = Spec(features=features, target="y", task=task, classes=classes, recipe=1)
        began = time.perf_counter()
        info = train(str(place / "train"), str(place / "registry"), "m", asked)
        seconds = time.perf_counter() - began
        predict(str(place / "registry"), "m", str(place / "test"), str(place / "predicted"))
        found = pq.read_table(place / "predicted" / "rows.parquet")["prediction"].combine_chunks()
        values = found.flatten().to_numpy().reshape(len(test), -1) if task == "multiclass" else found.to_numpy()
        return values.astype(np.float64), seconds, info.metrics["search"]["best_epochs"]
    finally:
        shutil.rmtree(place)


# ---- peers -----------------------------------------------------------------------------------------------------------
def peers(name: str, data: "pd.DataFrame", train_rows: np.ndarray, test: np.ndarray, task: str, seed: int) -> Any:
    """Metrics of scikit-learn's linear model and MLP as they are by default."""
    import pandas as pd
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    inputs = data.drop(columns="y")
    for column in inputs:
        if inputs[column].dtype.kind in "Mm":
            inputs[column] = inputs[column].astype("int64") / 1e9
    numbers = [column for column in inputs if pd.api.types.is_numeric_dtype(inputs[column])]
    words = [column for column in inputs if column not in numbers]
    inputs = inputs.astype(dict.fromkeys(numbers, float) | dict.fromkeys(words, object)).fillna(
        dict.fromkeys(words, "(null)")
    )
    encoder = make_column_transformer(
        (make_pipeline(SimpleImputer(add_indicator=True), StandardScaler()), numbers),
        (OneHotEncoder(handle_unknown="ignore"), words),
        sparse_threshold=0.0,
    )
    y = data["y"].to_numpy()
    x_train, x_test = encoder.fit_transform(inputs.iloc[train_rows]), encoder.transform(inputs.iloc[test])
    regression, epochs = task == "regression", FEW_EPOCHS.get(name, 200)
    models = {
        "linear": LinearRegression() if regression else LogisticRegression(max_iter=1000),
        "mlp": (MLPRegressor if regression else MLPClassifier)(random_state=seed, max_iter=epochs),
    }
    found = {}
    for kind, model in models.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x_train, y[train_rows])
        predicted = model.predict(x_test) if regression else model.predict_proba(x_test)
        found[kind] = scores(data, test, task, predicted)
    return found


# ---- the table -------------------------------------------------------------------------------------------------------
def mean(runs: list[Metrics]) -> Metrics:
    return {metric: float(np.mean([run[metric] for run in runs])) for metric in runs[0]}


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the splits, the ratio, and by how many standard errors ours is worse than the trivial prediction."""
    means = {
        kind: mean([run[kind] for run in runs]) for kind in ("trivial", "linear", "mlp", "ours") if kind in runs[0]
    }
    found: dict[str, Any] = {"set": name, "splits": len(runs), **means}
    if "linear" in means:
        ratios = [means["ours"][m] / min(means["linear"][m], means["mlp"][m]) for m in means["ours"]]
        found["ratio"] = math.exp(np.mean(np.log(ratios)))
    metric = "rmse" if "rmse" in means["ours"] else "log_loss"
    worse = np.array([run["ours"][metric] - run["trivial"][metric] for run in runs])
    error = worse.std(ddof=1) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
    found["worse_than_trivial"] = bool(worse.mean() > error)
    found["seconds"] = float(np.mean([run["seconds"] for run in runs]))
    found["epochs"] = float(np.median([run["epochs"] for run in runs]))
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    def cell(metrics: Metrics) -> str:
        return " / ".join(f"{value:.4g}" for value in metrics.values())

    text = "| set | rows | task | trivial | linear | MLP | ours | ratio | epochs | seconds |\n" + "| --- " * 10 + "|\n"
    for line in lines:
        half = next(half for half, sets in (("A", A), ("B", B), ("C", C)) if line["set"] in sets)
        known = [cell(line[kind]) if kind in line else "" for kind in ("trivial", "linear", "mlp", "ours")]
        ratio = f"{line['ratio']:.3f}" if "ratio" in line else ""
        text += f"| {half} {line['set']} | {line['rows']} | {SETS[line['set']].task} | {' | '.join(known)} | {ratio} | "
        text += f"{line['epochs']:.0f} | {line['seconds']:.1f} |\n"
    return text


def verdict(lines: list[dict[str, Any]]) -> list[str]:
    """One line for each bound, by what was measured."""
    rated = [line for line in lines if "ratio" in line]

    def geometric(some: list[dict[str, Any]]) -> float:
        return math.exp(np.mean([math.log(line["ratio"]) for line in some])) if some else math.nan

    found = []
    for half, sets in (("A", A), ("B", B), ("C", C)):
        some = [line for line in rated if line["set"] in sets]
        classes = [line for line in some if SETS[line["set"]].task != "regression"]
        if some:
            found.append(
                f"{half}: geometric mean {geometric(some):.3f} of {len(some)} (at most {BOUNDS['half']:.2f}); "
                f"classification {geometric(classes):.3f} (at most {BOUNDS['classification']:.2f})"
            )
    for few in (False, True):
        bound = BOUNDS["worst of few rows" if few else "worst"]
        some = [line for line in rated if (line["rows"] < FEW_ROWS) == few]
        if some:
            worst = max(some, key=lambda line: line["ratio"])
            size = f"below {FEW_ROWS} rows" if few else f"from {FEW_ROWS} rows on"
            found.append(f"worst set {size}: {worst['set']} {worst['ratio']:.3f} (at most {bound:.2f})")
    worse = [line["set"] for line in lines if line["worse_than_trivial"]]
    found.append(f"worse than the mean or the base rates beyond a standard error: {', '.join(worse) or 'none'}")
    return found


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.defaults", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=None)
    options.add_argument("--splits", type=int, default=5, help="at most, of small tables")
    options.add_argument("--peers", action="store_true", help="measure the peers too where their results are missing")
    given = options.parse_args()
    torch.set_num_threads(1)
    known: dict[str, list[Any]] = json.loads(PEERS.read_text()) if PEERS.exists() else {}
    lines: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for name in given.sets or SETS:
        data, task = load(name), SETS[name].task
        runs = []
        for number, (train_rows, test) in enumerate(splits(name, data, given.splits)):
            if given.peers and len(known.setdefault(name, [])) == number:
                known[name].append(peers(name, data, train_rows, test, task, number))
                PEERS.write_text(json.dumps(known, indent=1))
            predicted, seconds, epochs = ours(data, train_rows, test, task)
            run = {"ours": scores(data, test, task, predicted), "seconds": seconds, "epochs": epochs}
            run["trivial"] = scores(data, test, task, trivial(data, train_rows, test, task))
            runs.append(run | (known[name][number] if len(known.get(name, [])) > number else {}))
            raw.append({"set": name, "split": number} | runs[-1])
        measured = [run for run in runs if "linear" in run] or runs
        lines.append(summary(name, measured) | {"rows": len(data)})
        print(markdown(lines[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    report = markdown(lines) + "\n" + "".join(f"- {line}\n" for line in verdict(lines))
    if given.sets is None:
        (HERE / "defaults.md").write_text(report)
        (HERE / "defaults.jsonl").write_text("".join(json.dumps(line) + "\n" for line in raw))
    print(report)


if __name__ == "__main__":
    main()
