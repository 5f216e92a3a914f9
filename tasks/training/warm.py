"""A new learner begins with weights of another one: those that fit.

Of the built-in models weights fit by what they belong to: a column of the same name and kind, a layer, an output for the same
label or target; whatever stands beside them. All other models are only known by the names and shapes of their tensors.

An input that the source did not know begins with weights of 0 in the first layer: at first it has no say, and the function is
the one that was learned. Whatever else is missing begins as in a new model.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from tidemill.tasks.training.belongings import Belonging, belongings, output_names
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.spec import BUILT_IN_MODELS
from tidemill.tasks.training.statistics import Moments

SCALING: Final = ("standardize_features", "standardize_target", "running_statistics", "soft_limit", "null_indicators")
"""What two specs must have alike for one to go on with the other's statistics."""
NAMED: Final = 5
"""Of what does not fit, in a message."""

logger = logging.getLogger("tidemill.training")


@dataclass(frozen=True, eq=False)
class Source:
    """What a learner may begin with."""

    name: str
    """For messages: a version, or a file."""
    weights: Mapping[str, Tensor]
    factory: str | None = None
    """What made the model of a version. None: a file of weights, of which nothing else is known."""
    features: Features | None = None
    """Of a version."""


@dataclass(frozen=True)
class Taken:
    """What became of the weights of a source."""

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    """What the new model has beside them: it begins anew."""
    left_over: tuple[str, ...]
    """What the source has beside them."""

    @classmethod
    def of(cls, new: Sequence[str], old: Sequence[str], taken: Sequence[str]) -> "Taken":
        """Of the names that the new model and the source have, and of those that were taken; each once, in their order."""
        seen = set(taken)
        found = (
            [name for name in new if name in seen],
            [name for name in new if name not in seen],
            [name for name in old if name not in seen],
        )
        return cls(*(tuple(dict.fromkeys(names)) for names in found))


def begin(learner: Learner, source: Source) -> Taken:
    """Give a learner that is not trained yet the weights of a source that fit it.

    Raises:
        SpecError: none fits, or those that fit are no finite numbers.
    """
    built_in = learner.spec.model.factory in BUILT_IN_MODELS and source.factory == learner.spec.model.factory
    taken = _by_belonging(learner, source) if built_in else _by_name(learner, source)
    if not taken.taken:
        has = ", ".join(taken.left_over[:NAMED]) or "nothing"
        raise SpecError(
            f"init_from: no weight of {source.name} fits the model of the spec, by "
            f"{'column, layer and output' if built_in else 'name and shape'}. It has {has}; the model has "
            f"{', '.join(taken.missing[:NAMED])}. Leave init_from out, or name another"
        )
    for name, parameter in learner.model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach().float()).all():
            raise SpecError(f"init_from: {name!r} of {source.name} has NaN or infinity: name another source")
    if learner.averaged is not None:
        learner.averaged.module.load_state_dict(learner.model.state_dict())
    return taken


def _by_name(learner: Learner, source: Source) -> Taken:
    """Tensors of one name, shape and family of types."""
    if source.features is not None and learner.spec.model.factory == source.factory:
        new, old = ([column.name for column in features.columns] for features in (learner.features, source.features))
        if new != old:
            logger.warning(
                "init_from: which weights of a model of your own belong to which column is not known. They are taken by name and "
                "shape, and the columns are %s in place of %s",
                ", ".join(new),
                ", ".join(old),
            )
    own = learner.model.state_dict()
    fits = {
        name: tensor
        for name, tensor in source.weights.items()
        if name in own and tensor.shape == own[name].shape and _alike(tensor, own[name])
    }
    learner.model.load_state_dict({**own, **fits})
    return Taken.of([*own], [*source.weights], [*fits])


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype or (one.is_floating_point() and other.is_floating_point())


@torch.no_grad()
def _by_belonging(learner: Learner, source: Source) -> Taken:
    assert source.features is not None, "a version has features"
    factory, features = learner.spec.model.factory, learner.features
    own = belongings(factory, features, learner.model.state_dict())
    old = belongings(factory, source.features, source.weights)
    if features.task == "multiclass" and source.features.task == "binary" and len(source.features.targets) == 1:
        old = _as_two_classes(old, source.features)
    same = _same_columns(features, source.features)
    fits = {
        place
        for place, tensor in own.items()
        if place in old
        and old[place].shape == tensor.shape
        and (place.name in same or place.kind in ("layer", "output"))
    }
    for place in own.keys() & fits:
        table = Belonging("embedding", place.name, "values")
        if place.kind == "column" and table in own and table not in fits:
            fits.discard(place)  # they were learned for the numbers of another embedding
    for place, tensor in own.items():
        if place in fits:
            tensor.copy_(old[place])
        elif place.is_input and _bias_beside(place) in fits:
            tensor.zero_()
    outputs = {place.output for place in old}  # of a new output it is told, and not of each column that leads to it
    partly = {place.told for place in own if place not in fits and place.output in outputs}
    taken = [place.told for place in fits if place.told not in partly]
    return Taken.of([place.told for place in own], [place.told for place in old], taken)


def _bias_beside(place: Belonging) -> Belonging:
    """Of an input: the bias that its weights are added to."""
    return Belonging("output", place.output, "bias") if place.output else Belonging("layer", "1", "bias")


def _same_columns(new: Features, old: Features) -> set[str]:
    """Columns that both read alike. How many items of a sequence count changes none of its weights."""
    of_old = {column.name: column for column in old.columns}
    return {
        column.name
        for column in new.columns
        if (known := of_old.get(column.name)) is not None
        and replace(known, length=column.length) == column
        and bool(known.length) == bool(column.length)
    }


def _as_two_classes(old: Mapping[Belonging, Tensor], features: Features) -> dict[Belonging, Tensor]:
    """Weights of a binary model as those of a model of classes: the odds between its two labels stay what they are."""
    [pair] = output_names(features)
    without, with_it = output_names(replace(features, task="multiclass", classes=2))
    found: dict[Belonging, Tensor] = {}
    for place, tensor in old.items():
        if pair not in (place.name, place.output):
            found[place] = tensor
            continue
        for name, value in ((without, torch.zeros_like(tensor)), (with_it, tensor)):
            found[place._replace(output=name) if place.output else place._replace(name=name)] = value
    return found


# ---- statistics ------------------------------------------------------------------------------------------------------
def keeping(features: Features, source: Source) -> Features:
    """Features whose columns are scaled as those of the source, as far as it reads them alike. What else it knew of them, as
    which ones have null indicators, and how far predictions reach, is added to what the new rows say.

    Raises:
        SpecError: the source has no statistics, or scales by other rules.
    """
    old, mine = source.features, features.statistics
    theirs = None if old is None else old.statistics
    if old is None or theirs is None or mine is None:
        raise SpecError(f"keep_statistics: {source.name} has no statistics: leave keep_statistics out")
    for name in SCALING:
        if (here := getattr(features, name)) != (there := getattr(old, name)):
            raise SpecError(
                f"keep_statistics: {source.name} was trained with {name} {there}, the spec has {here}: make them the same, or "
                "leave keep_statistics out"
            )
    same = _same_columns(features, old)
    new_places, old_places = _places(features), _places(old)
    inputs = [(new_places[name], old_places[name]) for name in new_places if name in same]
    targets = []
    if features.standardize_target:
        targets = [(i, old.targets.index(name)) for i, name in enumerate(features.targets) if name in old.targets]
    range_2T = mine.target_range
    if range_2T is not None and theirs.target_range is not None:
        range_2T = range_2T.clone()
        for i, name in enumerate(features.targets):
            if name in old.targets:
                seen = torch.stack([range_2T[:, i], theirs.target_range[:, old.targets.index(name)]])
                range_2T[0, i], range_2T[1, i] = seen[:, 0].min(), seen[:, 1].max()
    moments = mine.moments
    if moments is not None and theirs.moments is not None:
        moments = (
            _moments(moments[0], theirs.moments[0], inputs),
            _moments(moments[1], theirs.moments[1], targets),
        )
    indicated = {*features.indicated, *(same & {*old.indicated})}
    return replace(
        features,
        indicated=tuple(column.name for column in features.columns if column.name in indicated),
        statistics=replace(
            mine,
            mean_F=_with(mine.mean_F, theirs.mean_F, inputs),
            std_F=_with(mine.std_F, theirs.std_F, inputs),
            target_mean=_with(mine.target_mean, theirs.target_mean, targets),
            target_std=_with(mine.target_std, theirs.target_std, targets),
            target_range=range_2T,
            moments=moments,
        ),
    )


Places = Sequence[tuple[slice | int, slice | int]]
"""Of what is kept: (place in the new tensor, place in the old one)."""


def _with(new: Tensor, old: Tensor, kept: Places) -> Tensor:
    found = new.clone()
    for here, there in kept:
        found[here] = old[there]
    return found


def _moments(new: Moments, old: Moments, kept: Places) -> Moments:
    return Moments(
        _with(new.count_K, old.count_K, kept),
        _with(new.mean_K, old.mean_K, kept),
        _with(new.m2_K, old.m2_K, kept),
    )


def _places(features: Features) -> dict[str, slice]:
    """Name of a number column -> which of the scaled numbers come from it."""
    found, at = {}, 0
    for column in features.columns:
        if column.numbers:
            found[column.name] = slice(at, at + column.numbers)
            at += column.numbers
    return found
