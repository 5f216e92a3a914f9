"""A learner's bytes bring back the same learner, and refuse another model."""

import json

import pytest
import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as tensor_bytes

from tests.training.rows import begin, cut, numbers_table, plain_spec
from tidemill.tasks.training.errors import FactoryError, SpecError, StateMismatch
from tidemill.tasks.training.features import Features
from tidemill.tasks.training.learner import Learner, Network
from tidemill.tasks.training.loop import predict, score, train_pass
from tidemill.tasks.training.optimizers import OPTIMIZERS
from tidemill.tasks.training.steps import Steps
from tidemill.tasks.training.stored import STATE_FORMAT

OPTIMIZER_CASES = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"betas": [0.8, 0.99]}),
    ("adam", {"amsgrad": True}),
    ("adamw", {"weight_decay": 0.1}),
    ("adamw", {"fused": True}),
    ("adagrad", {"initial_accumulator_value": 0.1}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
    *((name, {}) for name in ("adadelta", "adamax", "nadam", "radam", "sparse_adam")),
]
GROUPS = cut(numbers_table(700), 300)


def test_every_optimizer_is_tried():
    assert {name for name, _ in OPTIMIZER_CASES} == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "arguments"), OPTIMIZER_CASES)
def test_going_on_from_stored_bytes_gives_the_same_bits(name, arguments):
    spec = plain_spec(
        model={"factory": "tests.training.rows:DropoutNet"},
        optimizer={"name": name, "arguments": arguments},
        learning_rate=1e-3,
        shuffle=True,
        standardize_features=True,
    )
    groups = cut(numbers_table(300), 100)
    straight = begin(spec, groups)
    stored = [straight.dump()]
    for epoch in range(3):
        train_pass(Steps(straight), groups, key=("epoch", epoch))
        stored.append(straight.dump())
    for begun in range(4):
        resumed = Learner.load(spec, *stored[begun])
        assert resumed.dump() == stored[begun]
        for epoch in range(begun, 3):
            train_pass(Steps(resumed), groups, key=("epoch", epoch))
        assert resumed.dump() == stored[3]
        assert resumed.counters.rows == 900


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("name", ["tests.training.rows:DropoutNet", "tests.training.rows:TiedNet", "mlp"])
def test_what_is_only_served_needs_no_optimizer(name, ema_decay):
    spec = plain_spec(model={"factory": name}, ema_decay=ema_decay, standardize_features=True, learning_rate=1e-3)
    learner = begin(spec, GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    stored = learner.dump()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.optim.Optimizer, "__init__")
        frozen = Network.load(spec, *stored)
    assert torch.equal(torch.cat([*predict(frozen, GROUPS)]), torch.cat([*predict(learner, GROUPS)]))
    assert score(frozen, GROUPS) == score(learner, GROUPS)
    with pytest.raises(StateMismatch):
        Network.load(spec, stored[1], stored[0])


def test_tied_and_transposed_weights_are_stored_whole():
    spec = plain_spec(model={"factory": "tests.training.rows:TiedNet"})
    learner = begin(spec, GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    weights, state = learner.dump()
    stored = parse_tensors(weights)
    assert stored.keys() == learner.model.state_dict().keys()
    loaded = Learner.load(spec, weights, state)
    assert loaded.model.a.weight is loaded.model.b.weight
    train_pass(Steps(loaded), GROUPS, key=("epoch", 1))
    train_pass(Steps(learner), GROUPS, key=("epoch", 1))
    assert loaded.dump() == learner.dump()


def test_the_weights_alone_are_enough_for_plain_torch():
    learner = begin(plain_spec(), GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    model = torch.nn.Linear(10, 1)
    model.load_state_dict(parse_tensors(learner.dump()[0]))
    x_NF = torch.stack([torch.tensor(GROUPS[0].table.column(f"x{i}").to_pylist()) for i in range(10)], 1)
    torch.testing.assert_close(model(x_NF).squeeze(1).detach(), next(predict(learner, GROUPS)))


def test_the_state_is_json_and_tensors():
    learner = begin(plain_spec(optimizer={"name": "adam"}, standardize_features=True), GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    state = learner.dump()[1]
    header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
    assert {"features.mean", "features.std", "optimizer.0.exp_avg", "optimizer.1.step"} < header.keys()
    assert json.loads(header["__metadata__"]["tidemill"])["counters"] == {
        "epochs": 0, "shards": 0, "rows": 700, "steps": 11, "compiled_steps": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"factory": "mlp"}}, "is missing.*has the code of the factory changed"),
        (
            {"model": {"factory": "tests.training.rows:WideNet"}},
            r"weight is float32\[1, 10\], the model has float32\[2, 10\]",
        ),
        ({"features": ["x0"]}, r"stored state is for .*'x9'\], \('y',\), 'regression'\), the spec has \(\['x0'\]"),
        ({"optimizer": {"name": "adam"}}, "of sgd, the spec's optimizer is adam"),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    stored = begin(plain_spec(), GROUPS).dump()
    with pytest.raises(StateMismatch, match=message):
        Learner.load(plain_spec(**change), *stored)


@pytest.mark.parametrize("hidden", [[10**9], [10**9, 10**9], [10**12]])
def test_memory_is_not_taken_for_sizes_that_the_weights_do_not_have(hidden):
    """Up to 4 EB: a spec from storage must not decide how much memory is asked for."""
    stored = begin(plain_spec(model={"factory": "mlp"}), GROUPS).dump()
    huge = plain_spec(model={"factory": "mlp", "arguments": {"hidden": hidden}})
    with pytest.raises(StateMismatch, match="do not fit the model of the spec"):
        Learner.load(huge, *stored)


def test_bytes_that_are_something_else_are_refused():
    spec = plain_spec()
    weights, state = begin(spec, GROUPS).dump()
    with pytest.raises(StateMismatch, match="not a safetensors file"):
        Learner.load(spec, weights, b"PAR1")
    with pytest.raises(StateMismatch, match="not a safetensors file"):
        Learner.load(spec, weights[:-1], state)
    with pytest.raises(StateMismatch, match=r"says no format.*passed in place of the state"):
        Learner.load(spec, weights, weights)


def test_a_state_of_a_lower_format_is_read_and_of_a_higher_one_refused():
    spec = plain_spec()
    weights, state = begin(spec, GROUPS).dump()
    own = rb"\"format\": \"1.0\""
    assert own in state
    assert STATE_FORMAT == "1.1"  # of labels: test_labels.py
    assert Learner.load(spec, weights, state.replace(own, rb"\"format\": 1".ljust(len(own)))).dump() == (weights, state)
    for newer in (b"1.2", b"2.0", b"9.9"):
        with pytest.raises(StateMismatch, match=rf"has format {newer.decode()}, .* up to 1\.1: upgrade"):
            Learner.load(spec, weights, state.replace(own, own.replace(b"1.0", newer)))


SCALED = plain_spec(standardize_features=True, standardize_target=True, running_statistics=True)


@pytest.mark.parametrize("name", ["standardize_features", "standardize_target", "running_statistics"])
def test_a_state_that_is_scaled_otherwise_is_refused(name):
    stored = begin(SCALED, GROUPS).dump()
    with pytest.raises(StateMismatch, match=f"stored state has {name} True, the spec False"):
        Learner.load(SCALED.model_copy(update={name: False}), *stored)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features.moments.count", lambda t: t[:1]),
        ("features.moments.count", lambda t: t.double()),
        ("features.moments.count", lambda t: t * 0),
        ("features.moments.m2", lambda t: -t),
        ("features.moments.m2", lambda t: t * float("nan")),
        ("features.target_moments.m2", lambda t: t.float()),
        ("features.mean", lambda t: t * float("inf")),
        ("features.std", lambda t: t * 0),
        ("features.target", lambda t: t.repeat(1, 2)),
        ("features.moments.m2", None),
    ],
)
def test_statistics_that_no_dataset_has_are_refused(name, change):
    weights, state = begin(SCALED, GROUPS).dump()
    tensors = parse_tensors(state)
    found = tensors.pop(name)
    if change is not None:
        tensors[name] = change(found).contiguous()
    about = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])["__metadata__"]
    with pytest.raises(StateMismatch, match=r"not what Tidemill writes"):
        Learner.load(SCALED, weights, tensor_bytes(tensors, about))


def test_optimizer_state_of_other_shapes_is_refused():
    momentum = {"name": "sgd", "arguments": {"momentum": 0.9}}
    small, large = (
        plain_spec(model={"factory": "mlp", "arguments": {"hidden": [n]}}, optimizer=momentum) for n in (4, 5)
    )
    learner = begin(large, GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    with pytest.raises(StateMismatch, match=r"momentum_buffer of parameter \d does not fit"):
        Learner.load(small, begin(small, GROUPS).dump()[0], learner.dump()[1])


def test_a_learner_needs_fitted_features():
    spec = plain_spec(standardize_features=True)
    with pytest.raises(SpecError, match=r"features.fit"):
        Learner.create(spec, Features.resolve(spec, GROUPS[0].schema))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"momentun": 0.9}, "holds \\['momentun'\\].*takes.*'momentum'"), ({"momentum": -1}, "refuses .*momentum")],
)
def test_a_wrong_optimizer_argument_is_named(arguments, message):
    with pytest.raises(SpecError, match=message):
        begin(plain_spec(optimizer={"name": "sgd", "arguments": arguments}), GROUPS)


def test_a_model_whose_state_is_no_tensor_is_refused(monkeypatch):
    monkeypatch.setattr("tests.training.rows.Net.get_extra_state", lambda self: {"a": 1}, raising=False)
    with pytest.raises(FactoryError, match=r"_extra_state.*cannot be stored"):
        begin(plain_spec(model={"factory": "tests.training.rows:Net"}), GROUPS)
