"""The settings of the flows as flags of the command line."""

from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from tidemill.tasks.settings import OnlineSettings
from tidemill.tasks.training.spec import BY_RECIPE, RECIPE, FeatureList, Model, Optimizer, Schedule, Spec


def _mapping(given: object) -> object:
    if not isinstance(given, dict):  # cyclopts has parsed text that starts with {
        raise ValueError(  # noqa: TRY004  # pydantic reports no TypeError
            f'give one JSON object, such as {{"name": 1}}, not {given}'
        )
    return given


def _listed(given: object) -> object:
    return (given,) if isinstance(given, str) else given


def _weights(given: tuple[object, ...] | None) -> object:
    """A list of flags as the spec has it: the word, or numbers."""
    if given is not None and len(given) > 1 and "balanced" in given:
        raise ValueError("balanced stands alone: give it, or a number for each class")
    return "balanced" if given == ("balanced",) else given


def _weight(given: object) -> object:
    if given == "balanced":
        return given
    try:
        weight = float(given)  # type: ignore[arg-type]  # whatever it is
    except (TypeError, ValueError):
        weight = -1.0
    if not weight >= 0:
        raise ValueError(f"give balanced, or a number of at least 0 for each class, not {given}")
    return weight


# cyclopts takes Any as one JSON value. Of dict[str, JsonValue] it would make flags out of the insides of JsonValue.
_Json = Annotated[Any, BeforeValidator(_mapping)]


class _ModelFlags(Model):
    arguments: _Json = Field(
        default_factory=dict, description="""Keyword arguments of the factory, as JSON: '{"hidden": [64, 32]}'."""
    )


class _OptimizerFlags(Optimizer):
    arguments: _Json = Field(
        default_factory=dict,
        description="""Its keyword arguments other than the learning rate, as JSON: '{"momentum": 0.9}'.""",
    )


class _ScheduleFlags(Schedule):
    arguments: _Json = Field(
        default_factory=dict,
        description="""Its keyword arguments, in gradient steps, as JSON: '{"T_max": 1000}'.""",
    )


class SpecFlags(Spec):
    """The spec, with what is hard to say in flags as JSON."""

    features: Annotated[FeatureList, Parameter(show_default=lambda _: "*")] = Field(
        default=Spec.model_fields["features"].default,
        min_length=1,
        description=Spec.model_fields["features"].description,
    )
    target: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)] = Field(
        min_length=1, description=Spec.model_fields["target"].description
    )
    class_weights: Annotated[
        tuple[Annotated[Any, BeforeValidator(_weight)], ...] | None,
        BeforeValidator(_listed),
        AfterValidator(_weights),
        PlainSerializer(lambda given: given),
        Parameter(metavar="balanced|NUMBER"),
    ] = Field(default=None, description=Spec.model_fields["class_weights"].description)
    model: _ModelFlags = Field(default_factory=_ModelFlags)
    optimizer: _OptimizerFlags = Field(default_factory=_OptimizerFlags)
    schedule: _ScheduleFlags | None = Field(default=None)

    def spec(self, *, from_file: bool = True) -> Spec:
        """What was asked for, as Python and files say it: a single target is a word.

        Where no file stands behind it and nothing is said of what a recipe chooses, the recipe is asked for.
        """
        asked = self.model_dump() | {"target": self.target[0] if len(self.target) == 1 else self.target}
        if not from_file and self.recipe is None and not self.model_fields_set & set(BY_RECIPE):
            asked["recipe"] = RECIPE
        return Spec.model_validate(asked)


class FollowFlags(OnlineSettings):
    """The online settings, following by default."""

    mode: Literal["drain", "follow"] = Field(
        default="follow", description="drain: train on all shards that are there, then stop. follow: go on polling."
    )

    def settings(self) -> OnlineSettings:
        return OnlineSettings.model_validate(self.model_dump())
