"""A new learner begins with what fits of another one: by what weights belong to, or by name and shape."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load as parse_tensors
from torch import Tensor, nn

from tests.training.rows import Net, begin, cut, numbers_table, plain_spec
from tidemill.tasks.training.errors import SpecError
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, train_pass
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.training.warm import Source, Taken, keeping
from tidemill.tasks.training.warm import begin as begin_with

ROWS = 240


def table(seed: int = 0, labels: int = 3, scale: float = 1.0) -> pa.Table:
    """Numbers a and b (with nulls), a vector v, categories c and d, a sequence s; y, a label of text, 0 or 1."""
    random = torch.Generator().manual_seed(seed)
    a, b, w = torch.randn(3, ROWS, generator=random) * scale
    c, d, label = torch.randint(labels, (3, ROWS), generator=random)
    return pa.table(
        {
            "a": a.tolist(),
            "b": pa.array([None if i % 7 == 0 else value for i, value in enumerate(b.tolist())]),
            "v": pa.array([[x, -x] for x in w.tolist()], pa.list_(pa.float32(), 2)),
            "c": [f"c{i}" for i in c.tolist()],
            "d": [f"d{i}" for i in d.tolist()],
            "s": [[f"s{i}"] * (i + 1) for i in d.tolist()],
            "y": (2 * a + w + c).tolist(),
            "label": [f"label {i}" for i in label.tolist()],
            "one": (label > 0).long().tolist(),
        }
    )


GROUPS = cut(table(), 100)


def spec_of(*features: str, **settings: Any) -> Spec:
    columns = [{"name": name, "buckets": 16} if name in "cds" else name for name in features]
    return Spec.model_validate(
        {"features": columns, "target": "y", "learning_rate": 0.01, "task": "regression"} | settings
    )


def fitted(spec: Spec, groups: Any = GROUPS, labels: tuple[Any, ...] | None = None) -> Features:
    return Features.resolve(spec, groups[0].schema, labels).fit(groups)


def trained(spec: Spec, groups: Any = GROUPS, labels: tuple[Any, ...] | None = None) -> Learner:
    learner = Learner.create(spec, fitted(spec, groups, labels))
    for epoch in range(2):
        train_pass(Steps(learner), groups, key=("epoch", epoch))
    return learner


def source(learner: Learner) -> Source:
    weights, _ = learner.dump()
    return Source("version 7 of r/m", parse_tensors(weights), learner.spec.model.factory, learner.features)


def warm(
    old: Learner, spec: Spec, groups: Any = GROUPS, labels: tuple[Any, ...] | None = None
) -> tuple[Learner, Taken]:
    """A learner that begins with the weights and the statistics of another one."""
    known = source(old)
    new = Learner.create(spec, keeping(fitted(spec, groups, labels), known))
    return new, begin_with(new, known)


def outputs(learner: Learner, groups: Any = GROUPS) -> Tensor:
    return torch.cat([*predict(learner, groups)])


MODELS: dict[str, dict[str, Any]] = {
    "linear": {"factory": "linear"},
    "mlp": {"factory": "mlp", "arguments": {"hidden": [8, 4]}},
    "one-hot": {"factory": "mlp", "arguments": {"hidden": [8], "embedding": None}},
    "one-hot without a layer": {"factory": "mlp", "arguments": {"hidden": [], "embedding": None}},
    "embeddings without a layer": {"factory": "mlp", "arguments": {"hidden": []}},
}
COLUMNS = {
    "numbers": (("a", "v"), ("b", "v", "a")),
    "a first category": (("a", "b"), ("c", "b", "a")),
    "more of each": (("c", "a", "s"), ("v", "s", "d", "a", "b", "c")),
    "no number before": (("c",), ("a", "d", "c", "s")),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("before", "after"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("indicators", [False, True])
def test_added_columns_and_another_order_leave_the_function_that_was_learned(model, before, after, indicators):
    settings: dict[str, Any] = {"model": model, "null_indicators": indicators, "standardize_target": True}
    old = trained(spec_of(*before, **settings))
    new, taken = warm(old, spec_of(*after, **settings, seed=5))
    torch.testing.assert_close(outputs(new), outputs(old), rtol=1e-5, atol=1e-5)
    assert {f"column {name!r}" for name in before} <= {*taken.taken}
    assert {f"column {name!r}" for name in after if name not in before} <= {*taken.missing}
    assert not taken.left_over
    train_pass(Steps(new), GROUPS, key=("epoch", 0))
    added = [name for name in after if name not in before]
    assert added, "what was added is learned"
    assert not torch.equal(outputs(new), outputs(old))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_column_that_is_gone_is_left_over(model):
    old = trained(spec_of("a", "b", "c", model=model))
    _, taken = warm(old, spec_of("a", model=model))
    assert {"column 'b'", "column 'c'"} <= {*taken.left_over}
    assert "column 'a'" in taken.taken
    assert not taken.missing


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_column_that_is_read_otherwise_begins_anew(model):
    old = trained(spec_of("a", "c", "s", model=model))
    changed = spec_of("a", "c", "s", model=model)
    columns = [
        column.model_copy(update={"buckets": 32}) if column.name == "c" else column for column in changed.features
    ]
    columns = [column.model_copy(update={"length": 5}) if column.name == "s" else column for column in columns]
    new, taken = warm(old, changed.model_copy(update={"features": tuple(columns)}))
    assert "column 'c'" in taken.missing
    assert "column 'c'" in taken.left_over
    assert {"column 'a'", "column 's'"} <= {*taken.taken}, "how many items count changes no weight"
    assert torch.isfinite(outputs(new)).all()


def classified(target: str = "label", *features: str, **settings: Any) -> Spec:
    return spec_of(*(features or ("a", "c")), target=target, **settings)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_of_more_classes_those_that_were_known_keep_the_odds_between_them(model):
    few, many = ("label 0", "label 2"), ("label 0", "label 1", "label 2", "label 3")
    groups = cut(table(labels=4), 100)
    of_few = [cut(group.table.filter(pa.compute.is_in(group.table["label"], pa.array(few))))[0] for group in groups]
    old = trained(classified(model=model, task="multiclass", classes=2), of_few, few)
    new, taken = warm(old, classified(model=model, task="multiclass", classes=4), groups, many)
    before, after = outputs(old, groups), outputs(new, groups)
    torch.testing.assert_close(
        (after[:, 0] / after[:, 2]).log(), (before[:, 0] / before[:, 1]).log(), rtol=1e-4, atol=1e-4
    )
    assert {"output 'label' = 'label 0'", "output 'label' = 'label 2'"} <= {*taken.taken}
    assert {*taken.missing} == {"output 'label' = 'label 1'", "output 'label' = 'label 3'"}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_two_labels_become_three_and_keep_the_odds_between_them(model):
    groups = cut(table(labels=3), 100)
    old = trained(classified("one", model=model, task="binary"), groups)
    new, taken = warm(old, classified("one", model=model, task="multiclass", classes=3), groups)
    one, after = outputs(old, groups), outputs(new, groups)
    torch.testing.assert_close((after[:, 1] / after[:, 0]).log(), one.logit(), rtol=1e-4, atol=1e-4)
    assert {*taken.missing} == {"output 'one' = 2"}


def test_another_target_begins_anew_below_what_was_learned():
    model = MODELS["mlp"]
    _, taken = warm(trained(spec_of("a", "c", model=model)), classified("one", model=model, task="binary"))
    assert taken.missing == ("output 'one' = 1 rather than 0",)
    assert taken.left_over == ("output 'y' (regression)",)
    assert "layer 2" in taken.taken


def test_layers_of_another_width_begin_anew():
    old = trained(spec_of("a", "c", model={"factory": "mlp", "arguments": {"hidden": [8, 4]}}))
    _, taken = warm(old, spec_of("a", "c", model={"factory": "mlp", "arguments": {"hidden": [8, 5], "dropout": 0.1}}))
    assert {*taken.taken} == {"column 'a'", "column 'c'", "embedding of 'c'", "layer 1"}
    assert {*taken.missing} == {*taken.left_over} == {"layer 2", "output 'y' (regression)"}


def test_nothing_that_fits_is_an_error():
    old = trained(spec_of("a", model={"factory": "mlp", "arguments": {"hidden": [8]}}))
    with pytest.raises(SpecError, match="fits the model of the spec, by column, layer and output"):
        warm(old, spec_of("b", target="one", task="binary", model={"factory": "mlp", "arguments": {"hidden": [9]}}))
    with pytest.raises(SpecError, match="no weight of version 7 of r/m fits the model of the spec, by name and shape"):
        warm(old, spec_of("a"))


def test_weights_that_are_no_numbers_are_refused():
    old = trained(spec_of("a"))
    known = source(old)
    known.weights["weight"].fill_(torch.nan)
    with pytest.raises(SpecError, match="'weight' of version 7 of r/m has NaN"):
        begin_with(Learner.create(old.spec, old.features), known)


# ---- models of one's own ---------------------------------------------------------------------------------------------
class WiderNet(nn.Module):
    """As `Net`, with another output."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 20)
        self.output = nn.Linear(20, 2)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, x_BF: Tensor) -> Tensor:
        return self.output(self.hidden(x_BF))[:, :1]


def test_a_model_of_ones_own_takes_tensors_by_name_and_shape():
    groups = cut(numbers_table(60))
    old = begin(plain_spec(model={"factory": "tests.training.rows:Net"}), groups)
    new = begin(plain_spec(model={"factory": "tests.training.test_warm:WiderNet"}, seed=3), groups)
    known = Source(
        "weights.safetensors", {**old.model.state_dict(), "seen": torch.ones(1), "hidden.more": torch.ones(1)}
    )
    taken = begin_with(new, known)
    assert taken.taken == ("hidden.weight", "hidden.bias")
    assert taken.missing == ("seen", "output.weight", "output.bias")
    assert {*taken.left_over} == {"output.weight", "output.bias", "seen", "hidden.more"}
    model, given = new.model, old.model
    assert isinstance(model, WiderNet)
    assert isinstance(given, Net)
    assert torch.equal(model.hidden.weight, given.hidden.weight)


def test_columns_of_a_model_of_ones_own_are_not_known_and_that_is_told(caplog):
    groups = cut(numbers_table(60, columns=11))
    model = {"factory": "tests.training.rows:Net"}
    old = begin(plain_spec(model=model), groups)
    spec = plain_spec(model=model).model_copy(update={"features": plain_spec(columns=11).features[1:]})
    begin_with(begin(spec, groups), source(old))
    assert "the columns are x1, x2, x3, x4, x5, x6, x7, x8, x9, x10 in place of x0, x1" in caplog.text


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_in_another_precision_is_taken(kind):
    groups = cut(numbers_table(60))
    old, new = (begin(plain_spec(seed=seed), groups) for seed in (0, 1))
    begin_with(new, Source("half.safetensors", {name: t.to(kind) for name, t in old.model.state_dict().items()}))
    for mine, theirs in zip(new.model.parameters(), old.model.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(kind).float())


@pytest.mark.parametrize("make", [lambda: spec_of("a", "c"), lambda: spec_of("a", "c", model=MODELS["one-hot"])])
def test_the_average_of_the_weights_begins_there_too(make: Callable[[], Spec]):
    averaging = {"ema_decay": 0.9}
    old = trained(make().model_copy(update=averaging))
    new, _ = warm(old, make().model_copy(update=averaging))
    assert new.averaged is not None
    assert outputs(new).equal(outputs(old))
    for average, weight in zip(new.served.parameters(), new.model.parameters(), strict=True):
        assert average.equal(weight)
        assert average.data_ptr() != weight.data_ptr()


# ---- statistics ------------------------------------------------------------------------------------------------------
def test_kept_statistics_are_those_of_the_source_for_its_columns_alone():
    other = cut(table(seed=1, scale=9.0), 100)
    settings: dict[str, Any] = {"standardize_target": True, "limit_predictions": True, "null_indicators": True}
    old = trained(spec_of("b", "v", **settings))
    fresh = fitted(spec_of("a", "v", "b", **settings), other)
    kept = keeping(fresh, source(old))
    before, new, own = old.features.statistics, kept.statistics, fresh.statistics
    assert before is not None
    assert new is not None
    assert own is not None
    for name in ("mean_F", "std_F"):
        mine, theirs = getattr(new, name).tolist(), getattr(before, name).tolist()
        assert mine == [getattr(own, name)[0].item(), *theirs[1:3], theirs[0]]
    assert (new.target_mean.tolist(), new.target_std.tolist()) == (
        before.target_mean.tolist(),
        before.target_std.tolist(),
    )
    assert new.target_range is not None
    assert before.target_range is not None
    assert own.target_range is not None
    assert new.target_range[0] == min(before.target_range[0], own.target_range[0])
    assert new.target_range[1] == max(before.target_range[1], own.target_range[1])
    assert (new.rows, new.labelled, new.nulls) == (own.rows, own.labelled, own.nulls)
    tensors, config = kept.state()
    assert Features.from_state(tensors, config).digest == kept.digest


def test_a_column_keeps_its_null_indicator_though_the_new_rows_have_no_nulls():
    old = trained(spec_of("a", "b", null_indicators=True))
    full = cut(table().set_column(1, "b", pa.array([0.5] * (ROWS - 1) + [1.5])), 100)
    spec = spec_of("a", "b", null_indicators=True)
    assert fitted(spec, full).indicated == ()
    new, taken = warm(old, spec, full)
    assert new.features.indicated == ("b",)
    assert "nulls of 'b'" in taken.taken
    assert outputs(new).equal(outputs(old))


def test_kept_running_statistics_go_on_from_what_they_were():
    spec = spec_of("a", "b", running_statistics=True)
    old = trained(spec)
    other = cut(table(seed=1, scale=9.0), 100)
    new, _ = warm(old, spec_of("v", "a", "b", running_statistics=True), other)
    for learner in (old, new):
        learner.update_statistics(other)
    before, after = old.features.statistics, new.features.statistics
    assert before is not None
    assert after is not None
    assert after.mean_F[2:].equal(before.mean_F)
    assert after.std_F[2:].equal(before.std_F)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"soft_limit": 3.0}, "soft_limit"), ({"standardize_features": False}, "standardize_features")],
)
def test_statistics_are_not_kept_where_columns_are_scaled_by_other_rules(settings, what):
    with pytest.raises(SpecError, match=f"keep_statistics: version 7 of r/m was trained with {what}"):
        warm(trained(spec_of("a")), spec_of("a", **settings))


def test_a_file_has_no_statistics_to_keep():
    with pytest.raises(SpecError, match=r"keep_statistics: w\.safetensors has no statistics"):
        keeping(fitted(spec_of("a")), Source("w.safetensors", {}))
