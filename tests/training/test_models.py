"""Built-in models, and what can be wrong with a factory."""

import pyarrow as pa
import pytest
import torch

from tests.training.rows import Net, begin, cut, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.features import Features, SequenceInput
from tidemill.tasks.training.loop import train_pass
from tidemill.tasks.training.models import FEW_IDS, Inputs, _Items, build, linear, mlp
from tidemill.tasks.training.steps import Steps

GROUPS = cut(numbers_table(100))


def built(factory, arguments=None, **settings):
    spec = plain_spec(model={"factory": factory, "arguments": arguments or {}}, **settings)
    return build(spec, Features.resolve(spec, GROUPS[0].schema))


@pytest.mark.parametrize("make", [linear, mlp])
@pytest.mark.parametrize("inputs", [Inputs(3, (), 1), Inputs(3, (), 4), Inputs(3, (5, 9), 1), Inputs(0, (5,), 4)])
def test_built_in_models_have_the_right_shapes(make, inputs):
    model = make(inputs)
    ids = [torch.tensor([[0] * len(inputs.buckets), list(inputs.buckets)])] if inputs.buckets else []
    assert model(torch.randn(2, inputs.numbers), *ids).shape == (2, inputs.outputs)


ITEMS = Inputs(2, (5,), 3, (SequenceInput(4, 9), SequenceInput(2, 7)))
IDS_BC = torch.tensor(
    [[5, 1, 9, 1, 0, 7, 0], [0, 0, 0, 0, 0, 0, 3], [1, 0, 4, 0, 4, 0, 0]]
)  # 0 may stand between items


def test_ids_are_split_into_categories_and_sequences():
    categories, sequences = ITEMS.split(IDS_BC)
    assert [ids_B.tolist() for ids_B in categories] == [[5, 0, 1]]
    assert [ids_BL.tolist() for ids_BL in sequences] == [
        [[1, 9, 1, 0], [0, 0, 0, 0], [0, 4, 0, 4]],
        [[7, 0], [0, 3], [0, 0]],
    ]


def test_a_sequence_is_the_mean_of_its_items_embeddings():
    seen = []
    model = mlp(ITEMS, hidden=[6], embedding=4)
    model.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    x_BF = torch.randn(3, 2)
    assert model(x_BF, IDS_BC).shape == (3, 3)
    one, two = (items.weight for items in model.items)
    zero = torch.zeros(4)
    expected = [
        torch.cat([(one[1] + one[9] + one[1]) / 3, two[7]]),
        torch.cat([zero, two[3]]),
        torch.cat([one[4], zero]),
    ]
    torch.testing.assert_close(seen[0][:, :2], x_BF)
    torch.testing.assert_close(seen[0][:, 6:], torch.stack(expected))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("size", [1, 3, 8, 17, 64])
def test_items_have_the_same_bits_with_and_without_gradients_however_many_there_are(mode, size):
    """Torch leaves out the padding of a few ids itself."""
    torch.manual_seed(0)
    items = _Items(100, size, mode)
    for rows, length in ((1, 1), (1, 8), (7, 10), (3, 700), (FEW_IDS // 8, 8), (FEW_IDS, 8)):
        ids_BL = torch.randint(0, 101, (rows, length))
        ids_BL[torch.rand(rows, length) < 0.5] = 0
        ids_BL[-1] = 0
        expected_BE = items(ids_BL)
        with torch.no_grad():
            assert same_bits(items(ids_BL), expected_BE.detach())
            assert same_bits(torch.cat([items(ids_1L[None]) for ids_1L in ids_BL[:50]]), expected_BE[:50].detach())


def test_a_linear_model_counts_items():
    model = linear(ITEMS)
    x_BF = torch.randn(3, 2)
    before = model(x_BF, IDS_BC)
    assert torch.equal(before, model(x_BF, torch.zeros_like(IDS_BC)))  # an item never seen does not move the output
    with torch.no_grad():
        for items in model.items:
            items.weight.copy_(torch.arange(items.weight.numel()).view_as(items.weight))
    one, two = (items.weight for items in model.items)
    expected = [2 * one[1] + one[9] + two[7], two[3], 2 * one[4]]
    torch.testing.assert_close(model(x_BF, IDS_BC) - before, torch.stack(expected))


@pytest.mark.parametrize("make", [linear, mlp])
def test_padding_is_not_trained(make):
    model = make(ITEMS)
    start = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("items")}
    assert len(start) == 2
    for ids_BC in (IDS_BC, torch.zeros_like(IDS_BC)):  # the second: a batch without any item
        model(torch.randn(3, 2), ids_BC).square().sum().backward()
    for name, items in zip(start, model.items, strict=True):
        assert not start[name][0].any()
        assert not items.weight.grad[0].any()
        assert items.weight.grad[1:].any()


def test_a_linear_model_without_categories_is_torchs():
    assert type(linear(Inputs(3, (), 1))) is torch.nn.Linear


def test_a_category_never_seen_does_not_move_a_linear_model():
    model = linear(Inputs(2, (5,), 1))
    x_BF = torch.randn(1, 2)
    assert torch.equal(model(x_BF, torch.tensor([[0]])), model(x_BF, torch.tensor([[4]])))


def test_arguments_reach_the_mlp():
    model = mlp(Inputs(3, (7,), 2), hidden=[5], embedding=4, dropout=0.5)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == {
        "embeddings.0.weight": [8, 4], "network.0.weight": [5, 7], "network.0.bias": [5],
        "network.3.weight": [2, 5], "network.3.bias": [2],
    }  # fmt: skip


def test_without_sequences_the_mlp_has_the_weights_it_always_had():
    torch.manual_seed(0)
    model = mlp(Inputs(3, (7,), 1), hidden=[5])
    torch.manual_seed(0)
    parts = torch.nn.Linear(11, 5), torch.nn.Linear(5, 1), torch.nn.Embedding(8, 8)
    names = ("network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias", "embeddings.0.weight")
    weights = dict(zip(names, (value.data for part in parts for value in part.parameters()), strict=True))
    assert model.state_dict().keys() == weights.keys()
    assert all(same_bits(value, weights[name]) for name, value in model.state_dict().items())


def test_initial_weights_are_those_of_a_seeded_script_and_disturb_nobody():
    before = torch.get_rng_state()
    model = built("tests.training.rows:Net", seed=11)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    assert all(same_bits(a.data, b.data) for a, b in zip(model.parameters(), Net().parameters(), strict=True))


def test_a_factory_that_asks_for_the_inputs_gets_them():
    assert built("tidemill.tasks.training.models:linear").in_features == 10
    assert built("tests.training.rows:DropoutNet", {"size": 10}).layers[0].in_features == 10


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("no_such_module:Net", {}, "no module named 'no_such_module': install its package"),
        ("tests.training.rows:Nothing", {}, "'tests.training.rows' has no attribute 'Nothing'"),
        ("tests.training.rows:Net.nothing", {}, "no attribute 'Net.nothing'"),
        ("torch:float32", {}, "is a dtype: name a class or function"),
        ("tests.training.rows:Net", {"size": 3}, "raised TypeError: .*'size'.*arguments given: size"),
        ("tests.training.rows:DropoutNet", {"size": -1}, "raised RuntimeError"),
        ("tests.training.rows:numbers_table", {"rows": 3}, "returned Table: return a torch.nn.Module"),
        ("torch.nn:ReLU", {}, "without trainable parameters"),
        ("tests.training.broken_model:Net", {}, "importing it raised ZeroDivisionError"),
        ("mlp", {"hiden": [3]}, "raised TypeError.*hiden"),
    ],
)
def test_what_is_wrong_with_a_factory_is_named(factory, arguments, message):
    with pytest.raises(FactoryError, match=message):
        built(factory, arguments)


@pytest.mark.parametrize("factory", ["linear", "mlp"])
def test_built_in_models_learn_numbers_and_categories(factory):
    table = numbers_table(1000, 2)
    colors = ["red", "green", None, "blue"] * 250
    shift = {"red": 3.0, "green": -3.0, None: 1.0, "blue": 0.0}
    y = [value + shift[color] for value, color in zip(table.column("y").to_pylist(), colors, strict=True)]
    table = table.set_column(2, "y", [y]).append_column("color", [colors])
    spec = plain_spec(2, features=["x0", "x1", "color"], model={"factory": factory}, shuffle=True, learning_rate=0.1)
    groups = cut(table, 300)
    learner = begin(spec, groups)
    losses = [train_pass(Steps(learner), groups, key=("epoch", epoch)).loss for epoch in range(15)]
    assert losses[-1] < 0.1 < 1 < losses[0]


@pytest.mark.parametrize("factory", ["linear", "mlp"])
def test_built_in_models_learn_from_sequences(factory):
    worth = {"a": 2.0, "b": -1.0, "c": 0.0}
    baskets = [None, [], ["a"], ["b"], ["c"], ["a", "b"], ["a", "c"], ["b", "c"]] * 100
    y = [sum(worth[item] for item in basket or []) for basket in baskets]
    table = pa.table({"basket": baskets, "y": pa.array(y, pa.float32())})
    spec = plain_spec(
        0,
        features=[{"name": "basket", "length": 4, "buckets": 50}],
        model={"factory": factory},
        optimizer={"name": "adam"},
        shuffle=True,
        learning_rate=0.05,
    )
    groups = cut(table, 300)
    learner = begin(spec, groups)
    losses = [train_pass(Steps(learner), groups, key=("epoch", epoch)).loss for epoch in range(10)]
    assert losses[-1] < 0.05 < 0.2 < losses[0]
