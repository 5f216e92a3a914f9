"""What a comparison and a backtest come to. Everything in it follows from what is stored: told again, it is the same."""

from typing import Final

from pydantic import BaseModel, ConfigDict

from tidemill.tasks.history.drawing import short

TOLD_APART: Final = 2.0
"""A difference of fewer standard errors may well be chance: at most one in twenty goes so far by itself."""


COMPARED_IN: Final = "./tidemill-compare"
BACKTESTED_IN: Final = "./tidemill-backtest"
"""Where what is trained and the report are kept if nobody says where."""


def signed(value: float, digits: int) -> str:
    """A difference, with its sign."""
    return f"{'+' if value >= 0 else ''}{short(value, digits)}"


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Compared(_Result):
    """One spec of a comparison."""

    name: str
    model: str = ""
    """Its name in the registry of the comparison; empty for the baseline."""
    version: int | None = None
    scores: dict[str, float] = {}
    """On the held-out rows."""
    epochs: int = 0
    rows: int = 0
    """Trained on, each as often as it was."""
    steps: int = 0
    weights: int = 0
    """Numbers that are trained."""
    difference: float | None = None
    """By how much its measure is higher than that of the best; None: it is the best, or has failed."""
    standard_error: float | None = None
    """Of the difference, over the held-out rows in pairs; None: there is one row."""
    failed: str | None = None
    """Why it could not be trained or scored."""

    @property
    def told_apart(self) -> bool:
        """Whether it is worse than the best by more than chance in the held-out rows explains."""
        return (
            self.difference is not None
            and self.standard_error is not None
            and self.difference > TOLD_APART * self.standard_error
        )


class Comparison(_Result):
    """Several specs, trained on the same rows and scored on the same others."""

    dataset: str
    held_out: int
    """Rows that they are scored on."""
    measure: str
    """By which they are ranked, lower is better: rmse, mae or log_loss."""
    specs: tuple[Compared, ...]
    """The best first; those that failed last."""
    baseline: Compared | None = None
    """The mean, or the base rates, on the same rows; None: it cannot be computed."""
    registry: str
    """Where each spec's model and the page are."""
    page: str
    """URL of the report."""

    @property
    def best(self) -> Compared:
        """The spec with the lowest measure."""
        return self.specs[0]

    @property
    def verdict(self) -> list[str]:
        """What follows from it, and what does not, one sentence each."""
        best, others = self.best, [spec for spec in self.specs[1:] if spec.failed is None]
        near = [spec.name for spec in others if not spec.told_apart]
        said = [f"{best.name} has the lowest {self.measure} of {self.held_out:,} held-out rows."]
        if near:
            said.append(
                f"Of {', '.join(near)} it is not told apart: the difference is less than {TOLD_APART:.0f} standard errors."
            )
        if others and not near:
            said.append(
                f"All others are worse by more than {TOLD_APART:.0f} standard errors of the difference on the same rows."
            )
        if self.baseline is not None and not self.baseline.told_apart:
            said.append("It is not told apart from the baseline, which knows no column.")
        if others:
            said.append(
                "The standard error is that of these rows; another seed, or later data, may change more. The best of several "
                "looks a little better than it is."
            )
        return said


class Stretch(_Result):
    """Consecutive shards of a stream, and the means of their scores, weighted by rows."""

    first: int
    """The version of the log that has its first shard."""
    last: int
    begin: int
    """How many shards come before it."""
    shards: int
    rows: int
    spec: float | None
    """Of the model of the backtest, on each shard before it was trained on it; None, here and below: no shard has it."""
    learner: float | None
    """Of the model of the log, likewise."""
    champion: float | None
    """Of the version that was champion then."""

    @property
    def middle(self) -> float:
        """Where it is drawn: 1 is the first shard."""
        return self.begin + (self.shards + 1) / 2


class Backtest(_Result):
    """Another spec on what a model was trained on online, shard by shard, beside what really ran."""

    registry: str
    model: str
    head: int
    """The version of the log that it goes up to."""
    metric: str
    lower_is_better: bool
    stretches: tuple[Stretch, ...]
    total: Stretch
    difference: float | None
    """The mean of spec minus learner, over the rows of all shards that have both."""
    standard_error: float | None
    """Of that, over the shards; None: there is one."""
    same: int
    """Shards on which all scores are those of the log, exactly."""
    notes: tuple[str, ...]
    kept_in: str
    """URL of the registry that has the model of the backtest, and the page."""
    kept_as: str
    """The name of that model."""
    page: str

    @property
    def verdict(self) -> list[str]:
        """What follows from it, and what does not, one sentence each."""
        if self.difference is None:
            return ["No shard has a score of both."]
        if self.same == self.total.shards:
            return ["Every score of every shard is that of the log, exactly."]
        error, told = (
            self.standard_error,
            f"The other spec's {self.metric} is {signed(self.difference, 3)} to the learner's",
        )
        if error is None:
            return [f"{told}, on one shard: too few to tell them apart."]
        told = f"{told}, ± {short(error, 2)} (standard error over the shards)"
        if abs(self.difference) <= TOLD_APART * error:
            return [f"{told}: they are not told apart."]
        better = (self.difference < 0) == self.lower_is_better
        return [
            f"{told}: it is {'better' if better else 'worse'}. Neighbouring shards are alike: this is less certain than it looks."
        ]
