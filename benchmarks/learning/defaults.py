"""`tidemill train DATA REG m --target y`, against scikit-learn's default linear model and default MLP, on 22 and 13 tables.

    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults                  # what is missing, and the table
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults --again          # ours anew: about an hour
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults --sets iris wine
    OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.learning.defaults --peers          # also of the peers: hours

Needs the `bench` extra. Ours is told the target and nothing else. Peers see numbers with the mean in place of nulls and a column
that says so, standardised, and categories one-hot. A ratio is ours over the better peer's, each in its mean over the splits: of
rmse, or the geometric mean of that of the error rate (half an error added to each) and that of the log loss, the better peer
chosen for each.

Beside this file: `defaults.jsonl` has the numbers of each split as soon as it is measured, `defaults-peers.json` those of the
peers, `defaults.md` the table and the verdict, of all that has been measured.
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
from tidemill.storage.log import open_log
from tidemill.tasks.batch import train
from tidemill.tasks.predict import predict
from tidemill.tasks.training.spec import RECIPE, Spec

if TYPE_CHECKING:
    import pandas as pd

HERE: Final = Path(__file__).parent
PEERS: Final = HERE / "defaults-peers.json"
RUNS: Final = HERE / "defaults.jsonl"
TABLE: Final = HERE / "defaults.md"
FEW_EPOCHS: Final = {"flights": 20, "diamonds": 50, "ratdat": 50}
"""Of the peers' MLP where its 200 take hours: more would be better by little."""
HALVES: Final = {"A": A, "B": B, "C": C}
HALF: Final = 1.00
CLASSIFICATION: Final = 1.03
WORST: Final = 1.10
WORST_OF_FEW: Final = 1.20
"""Bounds of the ratio: of the geometric mean, of that of classification alone, of the worst set, of the worst of few rows."""
FEW_ROWS: Final = 300
Metrics = dict[str, float]
Run = dict[str, Any]


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
    """(predictions, seconds of CPU of the training, epochs): as `tidemill train` and `tidemill predict`, from Parquet files.

    Predictions are values [rows] or probabilities [rows, classes].
    """
    place = Path(tempfile.mkdtemp(prefix="tidemill-defaults-"))
    try:
        table = pa.Table.from_pandas(data, preserve_index=False).replace_schema_metadata(None)
        for name, rows in (("train", train_rows), ("test", test)):
            (place / name).mkdir()
            pq.write_table(table.take(rows), place / name / "rows.parquet")
        began = time.process_time()
        info = train(str(place / "train"), str(place / "registry"), "m", Spec(target="y", recipe=RECIPE))
        seconds = time.process_time() - began
        chosen = (open_log(str(place / "registry"), "m").head().manifest.resolved_spec or {})["task"]
        assert chosen == task, f"{chosen} was chosen for the target, which is for {task}"
        predict(str(place / "registry"), "m", str(place / "test"), str(place / "predicted"))
        found = pq.read_table(place / "predicted" / "rows.parquet")
        column = found["probabilities" if "probabilities" in found.column_names else "prediction"].combine_chunks()
        lists = pa.types.is_fixed_size_list(column.type)
        values = column.flatten().to_numpy().reshape(len(test), -1) if lists else column.to_numpy()
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


def summary(name: str, runs: list[Run]) -> dict[str, Any]:
    """Means over the splits, the ratio, and whether ours is worse than the trivial prediction by a standard error."""
    kinds = [kind for kind in ("trivial", "linear", "mlp", "ours") if all(kind in run for run in runs)]
    means = {kind: mean([run[kind] for run in runs]) for kind in kinds}
    found: dict[str, Any] = {"set": name, "rows": runs[0]["rows"], "splits": len(runs), **means}
    if "linear" in means:
        ratios = [means["ours"][m] / min(means["linear"][m], means["mlp"][m]) for m in means["ours"]]
        found["ratio"] = math.exp(np.mean(np.log(ratios)))
    metric = "rmse" if "rmse" in means["ours"] else "log_loss"
    worse = np.array([run["ours"][metric] - run["trivial"][metric] for run in runs])
    error = worse.std(ddof=1) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
    found["worse_than_trivial"] = bool(worse.mean() > error)
    found["cpu_seconds"] = float(np.mean([run["cpu_seconds"] for run in runs]))
    found["epochs"] = float(np.median([run["epochs"] for run in runs]))
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    def cell(metrics: Metrics) -> str:
        return " / ".join(f"{value:.4g}" for value in metrics.values())

    text = "| set | rows | splits | task | mean or base rates | linear | MLP | recipe | ratio | epochs | seconds of CPU |\n"
    text += "| --- " * 11 + "|\n"
    for line in lines:
        half = next(half for half, sets in HALVES.items() if line["set"] in sets)
        known = [cell(line[kind]) if kind in line else "" for kind in ("trivial", "linear", "mlp", "ours")]
        ratio = f"{line['ratio']:.3f}" if "ratio" in line else ""
        text += f"| {half} {line['set']} | {line['rows']} | {line['splits']} | {SETS[line['set']].task} | "
        text += f"{' | '.join(known)} | {ratio} | {line['epochs']:.0f} | {line['cpu_seconds']:.1f} |\n"
    return text


def verdict(lines: list[dict[str, Any]]) -> list[str]:
    """One line for each bound, by what was measured."""

    def held(value: float, bound: float) -> str:
        return f"{value:.3f} ({'holds' if value <= bound else 'FAILS'}: at most {bound:.2f})"

    def geometric(some: list[dict[str, Any]]) -> float:
        return math.exp(np.mean([math.log(line["ratio"]) for line in some]))

    rated = [line for line in lines if "ratio" in line]
    found = []
    for half, sets in HALVES.items():
        some = [line for line in rated if line["set"] in sets]
        if some:
            found.append(f"geometric mean of {half}, {len(some)} of {len(sets)}: {held(geometric(some), HALF)}")
        if classes := [line for line in some if SETS[line["set"]].task != "regression"]:
            found.append(f"classification of {half} alone, {len(classes)}: {held(geometric(classes), CLASSIFICATION)}")
    both = [line for line in rated if line["set"] in A | B and SETS[line["set"]].task != "regression"]
    if both:
        found.append(f"classification of A and B alone, {len(both)}: {held(geometric(both), CLASSIFICATION)}")
    for few, bound in ((False, WORST), (True, WORST_OF_FEW)):
        some = [line for line in rated if (line["rows"] < FEW_ROWS) == few]
        if some:
            worst = max(some, key=lambda line: line["ratio"])
            size = f"below {FEW_ROWS} rows" if few else f"from {FEW_ROWS} rows on"
            found.append(f"worst set {size}: {worst['set']} {held(worst['ratio'], bound)}")
    worse = [line["set"] for line in lines if line["worse_than_trivial"]]
    found.append(
        "log loss above that of the base rates, or rmse above that of the mean, by more than a standard error over the "
        f"splits: {', '.join(worse) or 'none'} of {len(lines)}"
    )
    return found


# ---- what was measured ----------------------------------------------------------------------------------------------
def stored() -> dict[tuple[str, int], Run]:
    """(set, split) -> what was measured by the recipe of today."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(run["set"], run["split"]): run for run in runs if run["recipe"] == RECIPE}


def store(runs: dict[tuple[str, int], Run]) -> None:
    order = list(SETS)
    some = [runs[key] for key in sorted(runs, key=lambda key: (order.index(key[0]), key[1]))]
    RUNS.write_text("".join(json.dumps(run) + "\n" for run in some))


def report(runs: dict[tuple[str, int], Run], known: dict[str, list[Any]]) -> str:
    """The table and the verdict. Of a set whose peers were measured on fewer splits, those splits count."""
    lines = []
    for name in SETS:
        of_set = [run | _at(known.get(name, []), split) for (of, split), run in sorted(runs.items()) if of == name]
        if of_set:
            lines.append(summary(name, [run for run in of_set if "linear" in run] or of_set))
    return markdown(lines) + "\n" + "".join(f"- {line}\n" for line in verdict(lines))


def _at(found: list[Any], split: int) -> Any:
    return found[split] if split < len(found) else {}


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.defaults", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    options.add_argument("--splits", type=int, default=5, help="at most, of small tables")
    options.add_argument("--again", action="store_true", help="measure what defaults.jsonl has of this recipe anew")
    options.add_argument("--peers", action="store_true", help="measure the peers too where their results are missing")
    given = options.parse_args()
    torch.set_num_threads(1)
    known: dict[str, list[Any]] = json.loads(PEERS.read_text()) if PEERS.exists() else {}
    runs = stored()
    for name in given.sets:
        data, task = load(name), SETS[name].task
        for number, (train_rows, test) in enumerate(splits(name, data, given.splits)):
            if given.again or (name, number) not in runs:
                predicted, seconds, epochs = ours(data, train_rows, test, task)
                run = {"set": name, "split": number, "rows": len(data), "recipe": RECIPE}
                run |= {"ours": scores(data, test, task, predicted), "cpu_seconds": round(seconds, 2), "epochs": epochs}
                runs[name, number] = run | {"trivial": scores(data, test, task, trivial(data, train_rows, test, task))}
                store(runs)
            if given.peers and len(known.setdefault(name, [])) == number:
                known[name].append(peers(name, data, train_rows, test, task, number))
                PEERS.write_text(json.dumps(known, indent=1))
            print(runs[name, number] | _at(known.get(name, []), number), file=sys.stderr, flush=True)
    text = report(runs, known)
    TABLE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
