"""What a run is told beside the spec: its limits and its habits.

Only pydantic here, and what imports nothing else that is heavy: the command line builds its flags and Prefect its form from
these descriptions, and `--help` must not wait for torch or Prefect.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tidemill.tasks.online.triggers import Triggers


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Device = Literal["auto", "cpu", "cuda", "mps"]
_DEVICE = "Where tensors are computed; auto takes an accelerator if there is one. Bits differ between devices."


class BatchSettings(_Settings):
    """How a batch run evaluates and registers."""

    holdout: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the rows held out from training and scored at the end; a hash decides which rows.",
    )
    holdout_dataset: str | None = Field(
        default=None, description="URL of a dataset to score instead of held-out rows; all rows are then trained on."
    )
    alias: str = Field(default="champion", description="The alias that moves to the new version.")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Score the held-out rows after each epoch, stop when they have not become better for so many, and register "
        "the best epoch.",
    )
    device: Device = Field(default="auto", description=_DEVICE)

    @model_validator(mode="after")
    def _one_holdout(self) -> Self:
        if self.holdout_dataset is not None and "holdout" in self.model_fields_set and self.holdout > 0:
            raise ValueError("give either holdout (a share of the rows) or holdout_dataset (a URL), not both")
        if self.patience is not None and not self.holdout and self.holdout_dataset is None:
            raise ValueError("patience needs held-out rows: set holdout or holdout_dataset")
        return self

    @property
    def held_out(self) -> float:
        """Share of the training dataset's rows that training must not see."""
        return 0.0 if self.holdout_dataset is not None else self.holdout


class OnlineSettings(_Settings):
    """When an online run stops, how much one commit takes, and what becomes of consumed shards."""

    mode: Literal["drain", "follow"] = Field(
        default="drain", description="drain: train on all shards that are there, then stop. follow: go on polling."
    )
    poll_seconds: float = Field(default=5.0, gt=0, description="Seconds between two looks at an empty inbox (follow).")
    stop_after_seconds: float | None = Field(
        default=None, gt=0, description="Stop after this time, once the step in hand is committed."
    )
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
    passes: int = Field(default=1, ge=1, description="How many times a shard is trained on.")
    after_commit: Literal["delete", "archive", "keep"] = Field(
        default="delete", description="What becomes of a shard once a committed version contains it."
    )
    archive_to: str | None = Field(
        default=None, description="URL, outside of the inbox, below which archived shards keep their whole key."
    )
    grace_seconds: float = Field(
        default=60.0,
        ge=0,
        description="What is no whole Parquet file is rejected only after it has not changed for this long.",
    )

    labels: str | None = Field(
        default=None,
        description="URL of an inbox of labels that arrive later than their features: a shard under the same key, its rows "
        "joined by label_key.",
    )
    label_key: str | None = Field(default=None, description="Column by which features and delayed labels are joined.")
    train_when: Triggers = Field(
        default_factory=Triggers, description="Triggers: what must hold before waiting shards are trained on."
    )
    new_columns: Literal["fail", "add", "ignore"] = Field(
        default="add",
        description="Columns that the dataset of the batch training did not have. fail: the shard is rejected. add: they are "
        "recorded, for the next batch training to use. ignore: nothing is said of them.",
    )
    device: Device = Field(default="auto", description=_DEVICE)
    champion: Literal["ignore", "score", "move"] = Field(
        default="move",
        description="score: the version that the alias names scores each shard too. move: and the alias moves to each new "
        "version that is not worse.",
    )
    alias: str = Field(default="champion", description="The alias of the champion.")
    tolerance: float = Field(
        default=0.05, ge=0, description="Share by which a version may score worse than the champion."
    )
    window_shards: int = Field(default=20, ge=1, description="Learner and champion are compared on so many shards.")
    holdout_dataset: str | None = Field(
        default=None, description="URL of a dataset on which each new version is compared with the champion too."
    )
    refusals: int = Field(
        default=10, ge=1, description="After so many refused versions in a row, do what after_refusals says."
    )
    after_refusals: Literal["continue", "stop", "rollback", "retrain"] = Field(
        default="continue",
        description="stop: fail, so that a person decides. rollback: go back to the champion. retrain: from retrain_dataset.",
    )
    retrain_dataset: str | None = Field(
        default=None,
        description="URL of the dataset for after_refusals=retrain; shards archived below it are part of it.",
    )

    @model_validator(mode="after")
    def _delayed(self) -> Self:
        if (self.labels is None) != (self.label_key is None):
            raise ValueError("labels=URL and label_key=COLUMN go together: give both, or neither")
        return self

    @model_validator(mode="after")
    def _refusals(self) -> Self:
        if (self.after_refusals == "retrain") != (self.retrain_dataset is not None):
            raise ValueError("after_refusals='retrain' and retrain_dataset=URL go together: give both, or neither")
        if self.champion != "move" and self.after_refusals != "continue":
            raise ValueError("after_refusals needs champion='move': nothing else is ever refused")
        return self

    @model_validator(mode="after")
    def _archive(self) -> Self:
        if (self.after_commit == "archive") != (self.archive_to is not None):
            raise ValueError("after_commit='archive' and archive_to=URL go together: give both, or neither")
        return self
