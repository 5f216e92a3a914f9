"""What does not change while a model is trained.

This module must import neither torch nor pyarrow: the command line builds its flags and Prefect its form from it.
Every field's description ends up in both.
"""

import json
import keyword
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

from tidemill.tasks.training.errors import SpecError

Task = Literal["regression", "binary", "multiclass"]
Loss = Literal["mse", "l1", "huber", "bce", "cross_entropy"]
ScheduleName = Literal[
    "constant", "linear", "step", "multistep", "exponential", "cosine", "cosine_restarts", "polynomial"
]
OptimizerName = Literal[
    "sgd", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "adamax", "nadam", "radam", "sparse_adam"
]

BUILT_IN_MODELS: Final = ("linear", "mlp")
LOSSES: Final[dict[Task, tuple[Loss, ...]]] = {  # the first of each is the default
    "regression": ("mse", "l1", "huber"),
    "binary": ("bce",),
    "multiclass": ("cross_entropy",),
}


RECIPE: Final = 1
"""Number of the recipe that `tidemill train` takes where nothing is said of what it chooses."""
BY_RECIPE: Final = ("model", "optimizer", "learning_rate", "batch_size", "epochs")
"""What a recipe chooses, and a spec that names a recipe leaves as it is by default."""


def is_import_path(name: str) -> bool:
    """Whether `name` has the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    names = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() and not keyword.iskeyword(part) for part in names)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class Column(_Settings):
    """One input column. A plain string stands for `Column(name=that string)`."""

    name: str = Field(min_length=1, description="Name of the column in the Parquet files.")
    kind: Literal["auto", "number", "category", "sequence"] = Field(
        default="auto",
        description="How to read it: auto takes text as a category, lists of any length as a sequence of categories, and "
        "everything else as a number.",
    )
    buckets: int = Field(
        default=1000,
        ge=1,
        le=2**31 - 2,
        description="Categories and sequences only: values are hashed into this many embedding rows (nulls have one more).",
    )
    length: int = Field(
        default=32,
        ge=1,
        le=65_536,
        description="Sequences only: how many of the last items of a list are used. Shorter lists are padded at the end.",
    )


def _column(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _columns(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


EPOCHS_TAGS: Final = ("(auto)", "(number)")
"""How pydantic's complaints name the two shapes of `epochs`."""


def _epochs_tag(given: Any) -> str:
    return EPOCHS_TAGS[0] if given == "auto" else EPOCHS_TAGS[1]


Epochs = Annotated[
    Annotated[Literal["auto"], Tag(EPOCHS_TAGS[0])] | Annotated[int, Field(ge=1), Tag(EPOCHS_TAGS[1])],
    Discriminator(_epochs_tag),
]


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
        if factory not in BUILT_IN_MODELS and not is_import_path(factory):
            raise ValueError(f"model.factory {factory!r} is none of linear, mlp, package.module:attribute")
        return factory


class Optimizer(_Settings):
    """Which torch optimizer to use."""

    name: OptimizerName = Field(
        default="sgd",
        description="Name of the torch optimizer, in lower case. sparse_adam: SparseAdam where gradients are sparse, else Adam.",
    )
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Its keyword arguments other than the learning rate, such as momentum, betas, weight_decay.",
    )
    decay_biases: bool = Field(
        default=True,
        description="Whether weight_decay shrinks biases and other vectors too, as torch does; off: only matrices and larger.",
    )

    @field_validator("arguments")
    @classmethod
    def _not_ours(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in ("lr", "params"):
            if name in arguments:
                raise ValueError(f"optimizer.arguments may not hold {name!r}: set learning_rate on the spec instead")
        return arguments


class Schedule(_Settings):
    """How the learning rate moves, step by step."""

    name: ScheduleName = Field(default="constant", description="Name of the torch scheduler, in lower case.")
    arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Its keyword arguments, in gradient steps, such as T_max of cosine or gamma of exponential.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Gradient steps in which the rate first rises linearly to its full value."
    )


class ReplayMemory(_Settings):
    """A bounded memory of old rows, mixed into each step of online training."""

    rows: int = Field(default=10_000, ge=1, description="The most rows that are remembered.")
    bytes: int = Field(
        default=64 * 2**20, ge=1, description="The most bytes that they take; each version stores all of them."
    )
    ratio: float = Field(default=1.0, gt=0, description="Old rows for each new row of a step.")
    policy: Literal["reservoir", "balanced"] = Field(
        default="reservoir",
        description="reservoir: a uniform sample of all rows seen. balanced: the same for each class, in equal shares.",
    )


FeatureList = Annotated[
    tuple[Annotated[Column, BeforeValidator(_column, json_schema_input_type=str | Column)], ...],
    BeforeValidator(_columns),
]


class Spec(_Settings):
    """A whole training task: columns in, model, loss, optimizer, and how rows become batches."""

    features: FeatureList = Field(
        default=(Column(name="*"),),
        min_length=1,
        description="Input columns, in the order in which the model receives them: names, patterns such as dep_*, and !id for "
        "all but id. Left out: all columns that can be used, but the target and sample_weight.",
    )
    target: (
        Annotated[str, Field(min_length=1)]
        | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    ) = Field(
        description="Column to predict, or several (regression and binary). Rows where one is null are not trained on."
    )
    task: Task | None = Field(
        default=None,
        description="regression (a number), binary (two labels), or multiclass (several). Left out: the target tells. Text, "
        "booleans and whole numbers of at most 20 values are labels; all else is regression.",
    )
    classes: int | None = Field(
        default=None,
        ge=2,
        description="Number of classes, for multiclass only. Left out: as many as the target has labels.",
    )
    model: Model = Field(default_factory=Model, description="Which network to build.")
    loss: str | None = Field(
        default=None,
        description="mse, l1 or huber for regression, bce for binary, cross_entropy for multiclass; "
        "left out: the first of these for the task; or package.module:attribute of a function of (output, target) that "
        "returns one loss for each row.",
    )
    metrics: tuple[str, ...] = Field(
        default=(),
        description="Scores beside those of the task: package.module:attribute of torchmetrics classes.",
    )
    class_weights: Literal["balanced"] | tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        description="Weight of each class in the loss; balanced: rows / (classes * rows of the class) in the dataset.",
    )
    sample_weight: str | None = Field(
        default=None, min_length=1, description="Column with the weight of each row in the loss."
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="Which torch optimizer to use.")
    learning_rate: float = Field(default=0.01, gt=0, description="Step size of the optimizer.")
    schedule: Schedule | None = Field(default=None, description="How the learning rate moves; left out: not at all.")
    clip_norm: float | None = Field(
        default=None, gt=0, description="Scale a step's gradient down to this norm, over all weights, if it is larger."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Score and serve an exponential moving average of the weights, with this decay for each step.",
    )
    ema_warmup: bool = Field(
        default=False,
        description="Let the average forget faster at first: after step t its decay is at most (1 + t) / (10 + t).",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16: mixed precision (torch.autocast); weights stay float32."
    )
    compile: Literal["off", "auto", "on"] = Field(
        default="off",
        description="Compile whole gradient steps with torch.compile: on; off; auto: if the batch training has enough "
        "steps to win back the time of compilation. Bits differ from those of uncompiled steps.",
    )
    replay: ReplayMemory | None = Field(
        default=None, description="Memory of old rows for online training; left out: only new rows are trained on."
    )
    batch_size: int = Field(default=64, ge=1, description="Rows in one gradient step.")
    parts: int | None = Field(
        default=None,
        ge=1,
        description="Parts of a batch, a power of two, whose gradients are added up in a fixed order: 1, 2, 4 or so on ranks, up "
        "to this many, train the same bits. Left out: each rank has one part, and other numbers of ranks give other bits.",
    )
    epochs: Epochs = Field(
        default=10,
        description="Passes over the dataset in batch training; auto: as many as are best for held-out rows, which then are "
        "trained on too if the dataset is small.",
    )
    recipe: int | None = Field(
        default=None,
        ge=1,
        le=RECIPE,
        description="Number of the recipe that chooses model, optimizer, learning rate, batch size, epochs and scaling by the "
        "dataset; left out: they are as they stand here.",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the initial weights, shuffling and dropout.")
    shuffle: bool = Field(default=True, description="Train on the rows in a random order, new in every epoch.")
    shuffle_bytes: int = Field(
        default=32 * 2**20,
        ge=1,
        description="Memory for decoded rows on their way into training. Half of it is one window, whose rows are shuffled "
        "together; the other half is the window in use.",
    )
    standardize_features: bool = Field(
        default=True,
        description="Scale number columns to mean 0 and standard deviation 1, as learned from the dataset.",
    )
    standardize_target: bool = Field(
        default=False,
        description="Scale the target too while training (regression only); scores and predictions stay unscaled.",
    )
    soft_limit: float | None = Field(
        default=None,
        gt=0,
        description="Bend scaled numbers z to z / sqrt(1 + (z / limit)^2): a value far out reaches this limit, never more.",
    )
    null_indicators: bool = Field(
        default=False,
        description="Add a number for each number column that has nulls in the dataset: 1 where it is null, else 0.",
    )
    limit_predictions: bool = Field(
        default=False,
        description="Keep predictions between the lowest and the highest target that was trained on (regression only).",
    )
    running_statistics: bool = Field(
        default=False,
        description="Online, scale by the mean and standard deviation of all rows seen so far, in place of the dataset's.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [column.name for column in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"features holds {twice} more than once: name each column once")
        if twice := sorted({name for name in self.targets if self.targets.count(name) > 1}):
            raise ValueError(f"target holds {twice} more than once: name each column once")
        if both := sorted(set(names) & set(self.targets)):
            raise ValueError(f"target {both[0]!r} is also among the features: remove it from one of them")
        task = self.stated_task
        if task == "multiclass" and len(self.targets) > 1:
            raise ValueError("task 'multiclass' has one target: name one column, or train one model for each")
        if task != "multiclass" and self.classes is not None:
            raise ValueError(f"classes is for task 'multiclass', not {task!r}: remove it or change task")
        known = LOSSES[task] if task is not None else tuple(loss for losses in LOSSES.values() for loss in losses)
        if self.loss is not None and self.loss not in known and not is_import_path(self.loss):
            of = "is none that is known" if task is None else f"does not fit task {task!r}"
            raise ValueError(f"loss {self.loss!r} {of}: use one of {known}, or package.module:attribute")
        for name in self.metrics:
            if not is_import_path(name):
                raise ValueError(f"metrics holds {name!r}: name them as package.module:attribute")
        self._check_classes()
        if self.parts is not None and self.parts & (self.parts - 1):
            raise ValueError(
                f"parts is {self.parts}: choose a power of two, as 4 or 8, which 1, 2, 4 ... ranks can share out"
            )
        if self.standardize_target and task != "regression":
            raise ValueError(f"standardize_target is for task 'regression', not {task!r}: switch it off")
        if self.running_statistics and not (self.standardize_features or self.standardize_target):
            raise ValueError("running_statistics scales nothing: switch on standardize_features or standardize_target")
        _check_recipe(self)
        try:
            self.model_dump_json()  # half of a surrogate pair, which JSON can spell
            json.dumps(self.model_dump(mode="json"), allow_nan=False)
        except ValueError as error:
            raise ValueError(f"the spec cannot be stored as JSON: {error}") from error
        return self

    def _check_classes(self) -> None:
        """What is for classes only, and fits their number. Raises ValueError."""
        one_label = self.stated_task != "regression" and len(self.targets) == 1
        if self.class_weights is not None and not one_label:
            raise ValueError("class_weights are for one target of task 'binary' or 'multiclass': remove them")
        labels = 2 if self.stated_task == "binary" else self.classes
        if isinstance(self.class_weights, tuple) and labels is not None and len(self.class_weights) != labels:
            raise ValueError(f"class_weights holds {len(self.class_weights)} weights for {labels} classes")
        if self.replay is not None and self.replay.policy == "balanced" and not one_label:
            raise ValueError("replay.policy 'balanced' is for one target of task 'binary' or 'multiclass'")

    @property
    def stated_task(self) -> Task | None:
        """The task, where the spec leaves no choice: by its name, or by what only one task has. None: the target tells."""
        if self.task is not None:
            return self.task
        if self.classes is not None:
            return "multiclass"
        if self.standardize_target or self.limit_predictions or len(self.targets) > 1:
            return "regression"
        return next((task for task, losses in LOSSES.items() if self.loss in losses), None)

    @property
    def searches(self) -> bool:
        """Whether a batch run finds out by itself how long to train."""
        return self.epochs == "auto" or self.recipe is not None

    @property
    def targets(self) -> tuple[str, ...]:
        """The target columns."""
        return (self.target,) if isinstance(self.target, str) else self.target

    @property
    def loss_name(self) -> str:
        """The loss in effect: `loss`, or the task's default, which a resolved spec knows."""
        return self.loss or LOSSES[self.stated_task or "regression"][0]

    @property
    def main_metric(self) -> str:
        """The score by which two models are compared, lower is better: in the target's unit for regression, else the loss."""
        if (self.stated_task or "regression") != "regression":
            return "loss"
        return "mae" if self.loss_name == "l1" else "rmse"

    @property
    def outputs(self) -> int:
        """Width of the model's output: the number of classes, or of targets."""
        return self.classes or len(self.targets)

    @property
    def window_bytes(self) -> int:
        """Bytes of the rows that are shuffled together."""
        return max(1, self.shuffle_bytes // 2)

    @property
    def import_paths(self) -> tuple[str, ...]:
        """Everything of the user's own code that the spec names."""
        named = (self.model.factory, self.loss or "", *self.metrics)
        return tuple(name for name in named if is_import_path(name))


def check_shares(parts: int, ranks: int) -> None:
    """Raises SpecError: ranks cannot have equal shares of the parts of a batch."""
    if parts % ranks:
        *fewer, most = (str(2**i) for i in range(parts.bit_length()))
        fitting = f"{', '.join(fewer)} or {most}" if fewer else most
        raise SpecError(
            f"parts: {parts} parts of a batch cannot be shared out among {ranks} ranks: start {fitting} of them"
        )


def _is_set(spec: Spec, name: str) -> bool:
    """Whether a setting has another value than by default."""
    return bool(getattr(spec, name) != type(spec).model_fields[name].get_default(call_default_factory=True))


def _check_recipe(spec: Spec) -> None:
    """What a recipe chooses, and what it is made of, fits the rest. Raises ValueError."""
    if spec.limit_predictions and spec.stated_task != "regression":
        raise ValueError(f"limit_predictions is for task 'regression', not {spec.stated_task!r}: switch it off")
    if spec.ema_warmup and spec.ema_decay is None:
        raise ValueError("ema_warmup needs an average of the weights: set ema_decay")
    if spec.soft_limit is not None and not spec.standardize_features:
        raise ValueError("soft_limit bends scaled numbers: switch on standardize_features, or remove it")
    if spec.soft_limit is not None and spec.running_statistics and spec.replay is not None:
        raise ValueError(
            "replay keeps rows that soft_limit has bent, which running_statistics cannot rescale: drop one"
        )
    if spec.recipe is not None and (named := [name for name in BY_RECIPE if _is_set(spec, name)]):
        raise ValueError(f"recipe {spec.recipe} chooses {', '.join(BY_RECIPE)}: remove {named[0]}, or recipe")
