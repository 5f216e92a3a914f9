"""What does not change while a model is trained.

This module must import neither torch nor pyarrow: the command line builds its flags and Prefect its form from it.
Every field's description ends up in both.
"""

import json
import keyword
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_validator, model_validator

Task = Literal["regression", "binary", "multiclass"]
Loss = Literal["mse", "l1", "huber", "bce", "cross_entropy"]
OptimizerName = Literal["sgd", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "adamax", "nadam", "radam"]

BUILT_IN_MODELS: Final = ("linear", "mlp")
LOSSES: Final[dict[Task, tuple[Loss, ...]]] = {  # the first of each is the default
    "regression": ("mse", "l1", "huber"),
    "binary": ("bce",),
    "multiclass": ("cross_entropy",),
}


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Column(_Settings):
    """One input column. A plain string stands for `Column(name=that string)`."""

    name: str = Field(min_length=1, description="Name of the column in the Parquet files.")
    kind: Literal["auto", "number", "category"] = Field(
        default="auto",
        description="How to read it: auto takes text as a category and everything else as a number.",
    )
    buckets: int = Field(
        default=1000,
        ge=1,
        le=2**31 - 2,
        description="Categories only: values are hashed into this many embedding rows (nulls have one more).",
    )


def _column(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Model(_Settings):
    """Which network to build."""

    factory: str = Field(
        default="linear",
        description="linear, mlp, or package.module:attribute of a callable that returns a torch.nn.Module.",
    )
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Keyword arguments of the factory, such as hidden sizes.",
    )

    @field_validator("factory")
    @classmethod
    def _importable(cls, factory: str) -> str:
        module, colon, attribute = factory.partition(":")
        names = [*module.split("."), *attribute.split(".")]
        if factory in BUILT_IN_MODELS:
            return factory
        if not colon or not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
            raise ValueError(f"model.factory {factory!r} is none of linear, mlp, package.module:attribute")
        return factory


class Optimizer(_Settings):
    """Which torch optimizer to use."""

    name: OptimizerName = Field(default="sgd", description="Name of the torch optimizer, in lower case.")
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Its keyword arguments other than the learning rate, such as momentum, betas, weight_decay.",
    )

    @field_validator("arguments")
    @classmethod
    def _not_ours(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in ("lr", "params"):
            if name in arguments:
                raise ValueError(f"optimizer.arguments may not hold {name!r}: set learning_rate on the spec instead")
        return arguments


class Spec(_Settings):
    """A whole training task: columns in, model, loss, optimizer, and how rows become batches."""

    features: tuple[Annotated[Column, BeforeValidator(_column, json_schema_input_type=str | Column)], ...] = Field(
        min_length=1,
        description="Input columns, in the order in which the model receives them.",
    )
    target: str = Field(min_length=1, description="Column to predict. Rows where it is null are not trained on.")
    task: Task = Field(
        default="regression",
        description="regression (a number), binary (0 or 1), or multiclass (0 to classes - 1).",
    )
    classes: int | None = Field(default=None, ge=2, description="Number of classes; for multiclass only.")
    model: Model = Field(default_factory=Model, description="Which network to build.")
    loss: Loss | None = Field(
        default=None,
        description="mse, l1 or huber for regression, bce for binary, cross_entropy for multiclass; "
        "left out: the first of these for the task.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Which torch optimizer to use.")
    learning_rate: float = Field(default=0.01, gt=0, description="Step size of the optimizer.")
    batch_size: int = Field(default=64, ge=1, description="Rows in one gradient step.")
    epochs: int = Field(default=10, ge=1, description="Passes over the dataset in batch training.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the initial weights, shuffling and dropout.")
    shuffle: bool = Field(default=True, description="Train on the rows in a random order, new in every epoch.")
    window_bytes: int = Field(
        default=32 * 2**20,
        ge=1,
        description="Decoded bytes that are shuffled together. Memory needed is about three times this plus two "
        "row groups.",
    )
    standardize_features: bool = Field(
        default=True,
        description="Scale number columns to mean 0 and standard deviation 1, as learned from the dataset once.",
    )
    standardize_target: bool = Field(
        default=False,
        description="Scale the target too while training (regression only); scores and predictions stay unscaled.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [column.name for column in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"features holds {twice} more than once: name each column once")
        if self.target in names:
            raise ValueError(f"target {self.target!r} is also among the features: remove it from one of them")
        if self.task == "multiclass" and self.classes is None:
            raise ValueError("task 'multiclass' needs classes: set it to the number of classes")
        if self.task != "multiclass" and self.classes is not None:
            raise ValueError(f"classes is for task 'multiclass', not {self.task!r}: remove it or change task")
        if self.loss is not None and self.loss not in LOSSES[self.task]:
            raise ValueError(f"loss {self.loss!r} does not fit task {self.task!r}: use one of {LOSSES[self.task]}")
        if self.standardize_target and self.task != "regression":
            raise ValueError(f"standardize_target is for task 'regression', not {self.task!r}: switch it off")
        try:
            self.model_dump_json()  # half of a surrogate pair, which JSON can spell
            json.dumps(self.model_dump(mode="json"), allow_nan=False)
        except ValueError as error:
            raise ValueError(f"the spec cannot be stored as JSON: {error}") from error
        return self

    @property
    def loss_name(self) -> Loss:
        """The loss in effect: `loss`, or the task's default."""
        return self.loss or LOSSES[self.task][0]

    @property
    def outputs(self) -> int:
        """Width of the model's output: the number of classes, or 1."""
        return self.classes or 1
