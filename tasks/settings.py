"""What a run is told beside the spec: its limits and its habits.

Only pydantic here: the command line builds its flags and Prefect its form from these descriptions, and `--help` must not
wait for torch or Prefect.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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

    @model_validator(mode="after")
    def _one_holdout(self) -> Self:
        if self.holdout_dataset is not None and "holdout" in self.model_fields_set and self.holdout > 0:
            raise ValueError("give either holdout (a share of the rows) or holdout_dataset (a URL), not both")
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
    max_shards: int = Field(default=64, ge=1, description="The most shards in one commit.")
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

    @model_validator(mode="after")
    def _archive(self) -> Self:
        if (self.after_commit == "archive") != (self.archive_to is not None):
            raise ValueError("after_commit='archive' and archive_to=URL go together: give both, or neither")
        return self
