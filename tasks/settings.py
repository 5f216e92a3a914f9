"""What a run is told beside the spec: its limits and its habits.

Of packages only pydantic is imported here. The command line makes its flags from these descriptions, and Prefect its form;
`--help` must not wait for torch or Prefect.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tidemill.tasks.defaults import BEHIND_SECONDS


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


LEARNERS: Final = 16
"""The most learners that a run of many models keeps in memory, by default."""


def _alias(given: str) -> str:
    from tidemill.storage import aliases, errors  # here, because it is seldom given

    try:
        aliases.check_name(given)
    except errors.UnknownAlias as error:
        raise ValueError(str(error)) from error
    return given


_Alias = Annotated[str, AfterValidator(_alias)]
"""The name of an alias that a run moves, or a server follows: a wrong one is told before anything begins."""

Device = Literal["auto", "cpu", "cuda", "mps"]
_DEVICE = "Where tensors are computed; auto takes an accelerator if there is one. Bits differ between devices."


HOLDOUT: Final = 0.1
"""Share of the rows that are held out where nothing is said."""


class RowSettings(_Settings):
    """Which rows of a dataset are asked for; by default all."""

    where: str | None = Field(
        default=None,
        description="Only the rows of which this condition is true, as SQL says it: "
        "\"day >= '2024-05-01' AND carrier IN ('AA', 'UA')\".",
    )
    last: str | None = Field(
        default=None,
        description="Only the last rows by --time-column, such as 90d, 12h or 30m, up to when the run begins.",
    )
    time_column: str | None = Field(
        default=None, min_length=1, description="The column of dates or times by which --last is measured."
    )

    table_version: int | None = Field(
        default=None,
        ge=0,
        description="Of a table of Delta Lake the version, of Iceberg the id of the snapshot. Left out: the newest. (A run that "
        "was killed goes on with its own.)",
    )

    @field_validator("where", "last")
    @classmethod
    def _read(cls, given: str | None, info: ValidationInfo) -> str | None:
        if given is not None:
            from tidemill.storage import sql  # here, because it is seldom needed

            sql.parse(given) if info.field_name == "where" else sql.duration(given)
        return given

    @model_validator(mode="after")
    def _rows(self) -> Self:
        if (self.last is None) != (self.time_column is None):
            given, lacking = ("last", "time_column") if self.last is not None else ("time_column", "last")
            raise ValueError(f"{given} needs {lacking}: give both, such as last 90d and the column of times")
        return self


class BatchSettings(RowSettings):
    """Which rows a batch run trains on, how it evaluates and registers."""

    holdout: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of the rows held out from training and scored at the end; a hash decides which rows. Left out: "
        f"{HOLDOUT}; or with epochs auto no others than those that decide about the epochs.",
    )
    holdout_dataset: str | None = Field(
        default=None, description="URL of a dataset to score instead of held-out rows; all rows are then trained on."
    )
    alias: _Alias = Field(default="champion", description="The alias that moves to the new version.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Score the held-out rows after each epoch. Stop after this many epochs without a better score, and register "
        "the best epoch.",
    )
    device: Device = Field(default="auto", description=_DEVICE)
    again: bool = Field(
        default=False,
        description="Train anew even if the same data, spec and code were trained on before.",
    )
    checkpoint_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Store a checkpoint inside of an epoch this long after the last one: a kill costs so much training. That of "
        "a large model is stored less often, to take at most 3% of the CPU time.",
    )
    checkpoint_rows: int | None = Field(
        default=None, ge=1, description="Store one after so many rows of an epoch too, whatever it takes."
    )
    init_from: str | None = Field(
        default=None,
        description="Begin with the weights of a version, REGISTRY/MODEL@ALIAS, or of a safetensors file, as far as they fit the "
        "model; what is missing begins anew.",
    )
    keep_statistics: bool = Field(
        default=False,
        description="With init_from: scale columns by the statistics of that version, in place of those of the dataset.",
    )

    @model_validator(mode="after")
    def _one_holdout(self) -> Self:
        if self.keep_statistics and (self.init_from is None or self.init_from.endswith(".safetensors")):
            raise ValueError("keep_statistics needs init_from with a version, whose statistics are kept")
        if self.holdout_dataset is not None and self.holdout:
            raise ValueError("give either holdout (a share of the rows) or holdout_dataset (a URL), not both")
        if self.patience is not None and self.holdout == 0 and self.holdout_dataset is None:
            raise ValueError("patience needs held-out rows: set holdout or holdout_dataset")
        return self

    def holdout_share(self, *, searches: bool) -> float:
        """Share of the training dataset's rows that training must not see; `searches`: it holds out rows of its own."""
        if self.holdout_dataset is not None:
            return 0.0
        return self.holdout if self.holdout is not None else 0.0 if searches else HOLDOUT


class Limits(_Settings):
    """How much one commit takes."""

    max_shards: int = Field(default=256, ge=1, description="The most shards in one commit.")
    max_rows: int = Field(
        default=1_000_000, ge=1, description="A commit takes no further shard once it has this many rows."
    )
    max_bytes: int = Field(
        default=256 * 2**20,
        ge=1,
        description="A commit takes no further shard that would bring it above this many bytes.",
    )
    max_shard_bytes: int = Field(
        default=512 * 2**20,
        ge=1,
        description="A larger shard stays in the inbox, with a warning: a shard is read into memory whole.",
    )


class LabelSettings(_Settings):
    """Labels that arrive later than their features."""

    inbox: str = Field(
        description="URL of an inbox of labels that arrive later than their features. The labels of a shard have its key, unless "
        "wait_seconds is set."
    )
    key: str = Field(description="The column by which the rows of features and labels are joined.")
    wait_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Labels come row by row, in shards of any key: a shard of features is trained on once each of its rows has a "
        "label, or this long after it arrived.",
    )
    corrections: bool = Field(
        default=False,
        description="With wait_seconds: wait the whole time though each row has a label, since a later one may correct it.",
    )

    @model_validator(mode="after")
    def _corrections(self) -> Self:
        if self.corrections and self.wait_seconds is None:
            raise ValueError("corrections needs wait_seconds: without it a shard has one shard of labels")
        return self


class Archive(_Settings):
    """Consumed shards are moved."""

    archive_to: str = Field(
        description="URL, outside of the inbox, to which consumed shards are moved. Each keeps its whole key."
    )


TAGS: Final = ("(word)", "(settings)")
"""How pydantic's complaints name the two shapes of a setting that is one word or has settings of its own."""


def _tag_of(given: Any) -> str:
    return TAGS[0] if isinstance(given, str) else TAGS[1]


AfterCommit = Annotated[
    Annotated[Literal["delete", "keep"], Tag(TAGS[0])] | Annotated[Archive, Tag(TAGS[1])], Discriminator(_tag_of)
]


class Retrain(RowSettings):
    """A model that was refused too often is trained anew."""

    retrain_on: str = Field(
        description="URL of a dataset. After too many refused versions the model is trained anew on it, in batch. Shards "
        "archived below it are part of it."
    )


AfterRefusals = Annotated[
    Annotated[Literal["continue", "stop", "rollback"], Tag(TAGS[0])] | Annotated[Retrain, Tag(TAGS[1])],
    Discriminator(_tag_of),
]


class GateSettings(_Settings):
    """When a new version becomes the champion, and what happens if too many do not."""

    champion: Literal["ignore", "score", "move"] = Field(
        default="move",
        description="ignore: nothing is compared. score: the version that the alias names scores each shard too. move: and the "
        "alias moves to each new version that is not worse.",
    )
    alias: _Alias = Field(default="champion", description="The alias of the champion.")
    tolerance: float = Field(
        default=0.05, ge=0, description="Share by which a new version may score worse than the champion."
    )
    recent_shards: int = Field(
        default=20, ge=1, description="A new version and the champion are compared on this many of the last shards."
    )
    holdout_dataset: str | None = Field(
        default=None, description="URL of a dataset on which each new version is compared with the champion too."
    )
    refusals: int = Field(
        default=10, ge=1, description="After this many refused versions in a row, do what --gate.after-refusals says."
    )
    after_refusals: AfterRefusals = Field(
        default="continue",
        description="continue: go on training. stop: fail, so that a person decides. rollback: go back to the champion.",
    )

    @model_validator(mode="after")
    def _refusals(self) -> Self:
        if self.champion != "move" and self.after_refusals != "continue":
            raise ValueError("after_refusals needs champion='move': otherwise no version is ever refused")
        return self

    @property
    def retrain(self) -> Retrain | None:
        """The batch training after too many refusals, or None."""
        return self.after_refusals if isinstance(self.after_refusals, Retrain) else None

    @property
    def retrain_on(self) -> str | None:
        """Its dataset, or None."""
        return None if self.retrain is None else self.retrain.retrain_on


class Triggers(_Settings):
    """When to train on waiting shards: as soon as one of these holds, or at once if none is set."""

    min_rows: int | None = Field(default=None, ge=1, description="Train when this many rows wait.")
    min_bytes: int | None = Field(default=None, ge=1, description="Train when shards of this many bytes wait.")
    max_wait_seconds: float | None = Field(
        default=None, gt=0, description="Train when the oldest shard has waited this long."
    )
    drift: Literal["adwin", "page_hinkley"] | None = Field(
        default=None,
        description="Train when this detector finds that the errors of the shards have risen; needs tidemill[drift].",
    )
    score_drop: float | None = Field(
        default=None,
        ge=0,
        description="Train when the error on what waits exceeds that of the last shards by this share: 0.1 is 10% worse.",
    )
    recent_shards: int = Field(
        default=64, ge=10, description="drift and score_drop compare with this many of the last consumed shards."
    )

    @property
    def by_score(self) -> bool:
        """True if waiting shards are compared with consumed ones. Only then is the history needed."""
        return self.drift is not None or self.score_drop is not None

    @property
    def given(self) -> bool:
        """True if any trigger is set."""
        return self.by_score or any(
            limit is not None for limit in (self.min_rows, self.min_bytes, self.max_wait_seconds)
        )


class OnlineSettings(_Settings):
    """When an online run stops, how much one commit takes, what becomes of consumed shards, and when the champion moves."""

    mode: Literal["drain", "follow"] = Field(
        default="drain", description="drain: train on all shards that are there, then stop. follow: go on polling."
    )
    poll_seconds: float = Field(default=5.0, gt=0, description="Seconds between two looks at an empty inbox (follow).")
    stop_after_seconds: float | None = Field(
        default=None, gt=0, description="Stop after this time, once the step in hand is committed."
    )
    passes: int = Field(default=1, ge=1, description="How many times a shard is trained on.")
    grace_seconds: float = Field(
        default=60.0,
        ge=0,
        description="An object that is no whole Parquet file is rejected once it has not changed for this long.",
    )
    new_columns: Literal["fail", "add", "ignore"] = Field(
        default="add",
        description="Columns that the dataset of the batch training did not have. fail: the shard is rejected. add: they are "
        "recorded, and the next batch training may use them. ignore: they are not recorded.",
    )
    device: Device = Field(default="auto", description=_DEVICE)
    behind_seconds: float = Field(
        default=BEHIND_SECONDS,
        gt=0,
        description="A run whose oldest shard waits for longer than this is behind: that is told, and changes nothing.",
    )
    metrics_file: str | None = Field(
        default=None,
        description="A file for Prometheus's textfile collector (name it *.prom), written while the run goes on and at its end. "
        "Counters go on from what it holds.",
    )
    port: int | None = Field(
        default=None,
        ge=0,
        le=65_535,
        description="A port of 127.0.0.1 where the run answers: / is the report, /metrics its numbers, /health whether it is "
        "alive and well. 0: one that is free.",
    )
    limits: Limits = Field(default_factory=Limits, description="How much one commit takes.")
    after_commit: AfterCommit = Field(
        default="delete",
        description="What becomes of a shard once a committed version contains it. delete: it is removed. keep: it stays in the "
        "inbox.",
    )
    labels: LabelSettings | None = Field(
        default=None, description="Where labels arrive that come later than their features."
    )
    train_when: Triggers = Field(
        default_factory=Triggers, description="Triggers: what must hold before waiting shards are trained on."
    )
    gate: GateSettings = Field(default_factory=GateSettings, description="When a new version becomes the champion.")

    @property
    def archive_to(self) -> str | None:
        """Where consumed shards are moved, or None."""
        return self.after_commit.archive_to if isinstance(self.after_commit, Archive) else None


class ServeSettings(_Settings):
    """Where predictions are served, what a request may cost, and where answers are logged."""

    alias: _Alias = Field(default="champion", description="The alias whose version is served. It is followed.")
    host: str = Field(
        default="127.0.0.1", description="The address to listen on. 0.0.0.0: all of this machine; set a token then."
    )
    port: int = Field(default=8000, ge=0, le=65_535, description="The port to listen on. 0: one that is free.")
    workers: int = Field(
        default=1, ge=1, le=256, description="Processes that answer, each with the model and one thread of torch."
    )
    poll_seconds: float = Field(default=1.0, gt=0, description="Seconds between two looks at the alias.")
    max_body_bytes: int = Field(default=16 * 2**20, ge=1, description="A request with a larger body is refused.")
    max_rows: int = Field(default=10_000, ge=1, description="A request with more rows is refused.")
    max_seconds: float = Field(
        default=30.0, gt=0, description="A request whose body takes longer to arrive is refused."
    )
    log_to: str | None = Field(
        default=None, description="URL of an inbox, to which what was asked and answered is written as Parquet shards."
    )
    log_rows: int = Field(default=10_000, ge=1, description="A shard is written once it has this many rows.")
    log_seconds: float = Field(
        default=5.0,
        gt=0,
        description="An answer is in a stored shard after this time, where the store takes at most half of it.",
    )
