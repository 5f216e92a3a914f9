"""Models as users write them are trained, scored, copied and resumed with the same bits, or refused with the reason."""

from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import nn

from tests.training import users_models
from tests.training.rows import begin, cut, numbers_table, plain_spec, same_bits
from tidemill.tasks.training.errors import FactoryError, ModelError, NonFiniteLoss
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, score, train_pass
from tidemill.tasks.training.steps import Steps

HERE = "tests.training.users_models"
TABLE = numbers_table(130, 4).append_column("c", [[f"v{i % 9}" for i in range(130)]])
GROUPS = cut(TABLE, 70)

SOUND: dict[str, dict[str, Any]] = {
    "a mask of -inf": {"factory": "CausalMask"},
    "a mask of -inf that is not stored": {"factory": "CausalMask", "arguments": {"persistent": False}},
    "lazy": {"factory": "Lazy"},
    "caches": {"factory": "Cached"},
    "float64": {"factory": "OfType", "arguments": {"dtype": "float64"}},
    "bfloat16": {"factory": "OfType", "arguments": {"dtype": "bfloat16"}},
    "a part in evaluation mode": {"factory": "FrozenPart"},
    "complex": {"factory": "Complex"},
    "unused, and cannot be copied": {"factory": "Unused"},
    "weight_norm": {"factory": "normed"},
    "orthogonal": {"factory": "orthogonal"},
    "shared": {"factory": "shared"},
    "partly frozen": {"factory": "partly_frozen"},
    "scripted": {"factory": "scripted"},
    "wholly in evaluation mode": {"factory": "in_evaluation_mode"},
}


def spec(factory: str, arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
    model = {"factory": f"{HERE}:{factory}", "arguments": arguments or {}}
    return plain_spec(4, **({"model": model, "batch_size": 32, "optimizer": {"name": "adam"}} | settings))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*ComplexHalf.*:UserWarning")
@pytest.mark.parametrize("name", SOUND)
def test_it_is_trained_scored_copied_and_resumed_with_the_same_bits(name: str) -> None:
    learner = begin(spec(**SOUND[name]), GROUPS)
    steps = Steps(learner)
    first = train_pass(steps, GROUPS, key=("epoch", 0)).loss
    before, stored = score(learner, GROUPS), learner.dump()
    champion = learner.network()
    assert next(iter(predict(learner, GROUPS))).shape == (70,)
    assert train_pass(steps, GROUPS, key=("epoch", 1)).loss < first  # scoring has left it able to train
    assert score(champion, GROUPS) == before != score(learner, GROUPS)
    resumed = Learner.load(learner.spec, *stored)
    assert score(resumed, GROUPS) == before
    train_pass(Steps(resumed), GROUPS, key=("epoch", 1))
    assert resumed.dump() == learner.dump()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "sparse_adam"])
def test_sparse_gradients_are_those_of_torch(optimizer: str) -> None:
    features = ["x0", "x1", {"name": "c", "kind": "category", "buckets": 20}]
    settings = {"features": features, "optimizer": {"name": optimizer}, "batch_size": 65}
    learner = begin(spec("Sparse", **settings), GROUPS)
    theirs = begin(spec("Sparse", **settings), GROUPS)
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    rows = [theirs.features.encode(TABLE.slice(at, 65), "rows") for at in (0, 65)]
    for at, (x_BF, ids_BC) in zip((0, 65), rows, strict=True):
        y_B = torch.tensor(TABLE.slice(at, 65).column("y").to_pylist())
        theirs.optimizer.zero_grad()
        nn.functional.mse_loss(theirs.model(x_BF, ids_BC), y_B.unsqueeze(1)).backward()
        theirs.optimizer.step()
    assert all(same_bits(a, b) for a, b in zip(learner.model.parameters(), theirs.model.parameters(), strict=True))
    resumed = Learner.load(learner.spec, *learner.dump())
    for each in (learner, resumed):
        train_pass(Steps(each), GROUPS, key=("epoch", 1))
    assert resumed.dump() == learner.dump()


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"name": "sgd", "arguments": {"momentum": 0.9}}}, "momentum_buffer of optimizer sgd is sparse"),
        ({"optimizer": {"name": "sgd"}, "clip_norm": 1.0}, "clip_norm: torch has no norm of sparse gradients"),
        ({"optimizer": {"name": "adam"}}, "adam takes no sparse gradients: use sparse_adam or adagrad or sgd"),
        ({"optimizer": {"name": "sparse_adam"}, "parts": 2}, "sparse gradients, which parts and ranks cannot add up"),
        ({"optimizer": {"name": "sparse_adam"}, "clip_norm": 1.0}, "clip_norm: torch has no norm of sparse gradients"),
    ],
)
def test_what_sparse_gradients_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    features = ["x0", "x1", {"name": "c", "kind": "category", "buckets": 20}]
    learner = begin(spec("Sparse", features=features, **settings), GROUPS)

    def trained_and_stored() -> None:
        train_pass(Steps(learner), GROUPS, key=("epoch", 0))
        learner.dump()

    with pytest.raises((FactoryError, ModelError), match=message):
        trained_and_stored()


def test_a_part_in_evaluation_mode_stays_so_and_a_whole_model_does_not() -> None:
    part = begin(spec("FrozenPart"), GROUPS)
    score(part, GROUPS)
    train_pass(Steps(part), GROUPS, key=("epoch", 0))
    assert isinstance(part.model, users_models.FrozenPart)
    assert part.model.norm.num_batches_tracked == 0
    whole = begin(spec("in_evaluation_mode"), GROUPS)
    train_pass(Steps(whole), GROUPS, key=("epoch", 0))
    assert dict(whole.model.named_buffers())["1.num_batches_tracked"] > 0


def test_a_mask_may_hold_infinity_but_no_weight_and_no_nan() -> None:
    learner = begin(spec("CausalMask"), GROUPS)
    steps = Steps(learner)
    assert steps.is_finite()
    mask = dict(learner.model.named_buffers())["mask"]
    mask[0, 0] = torch.nan
    assert not steps.is_finite()
    mask[0, 0] = 0.0
    next(learner.model.parameters()).data[0] = torch.inf
    assert not steps.is_finite()
    with pytest.raises(NonFiniteLoss):
        train_pass(steps, GROUPS, key=("epoch", 0))


def test_an_error_of_the_model_is_told_with_its_line_and_the_shapes() -> None:
    far = cut(TABLE.set_column(0, "x0", pa.array([100.0] * 130, pa.float32())))
    learner = begin(spec("Careful"), GROUPS)
    for call in (lambda: train_pass(Steps(learner), far, key=("shard", 0)), lambda: score(learner, far)):
        with pytest.raises(ModelError) as found:
            call()
        message = str(found.value)
        assert "ValueError: an input is out of range" in message
        assert "users_models.py:" in message
        assert "in forward" in message
        assert "float32[" in message
        assert "steps.py" not in message
        assert "\n" not in message


def test_a_model_of_another_type_than_its_inputs_is_told_so() -> None:
    learner = begin(spec("OfType", {"dtype": "float64", "cast": False}), GROUPS)
    with pytest.raises(ModelError, match="same dtype"):
        train_pass(Steps(learner), GROUPS, key=("epoch", 0))


def test_an_error_of_the_machine_is_never_the_models() -> None:
    class Full(nn.Linear):
        def forward(self, _: torch.Tensor) -> torch.Tensor:
            raise MemoryError

    learner = begin(spec("linear"), GROUPS)
    learner.model.forward = Full(4, 1).forward  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    learner.model.forward = lambda _: torch.empty(2**50)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        train_pass(Steps(learner), GROUPS, key=("epoch", 0))


def test_an_import_that_switches_torchs_globals_changes_nothing() -> None:
    threads = torch.get_num_threads()
    switching = plain_spec(10, model={"factory": "tests.training.switching_model:Net"})
    groups = cut(numbers_table(100))
    found = begin(switching, groups)
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == (
        threads,
        True,
        torch.float32,
    )
    train_pass(Steps(found), groups, key=("epoch", 0))
    assert found.model.weight.dtype == torch.float32


def test_the_callers_globals_do_not_matter_and_stay() -> None:
    plain = begin(spec("linear"), GROUPS)
    train_pass(Steps(plain), GROUPS, key=("epoch", 0))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            found = begin(spec("linear"), GROUPS)
            train_pass(Steps(found), GROUPS, key=("epoch", 0))
            assert score(found, GROUPS) == score(plain, GROUPS)
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dump() == plain.dump()


def test_what_cannot_be_copied_has_no_average() -> None:
    with pytest.raises(FactoryError, match="cannot be copied"):
        begin(spec("Unused", ema_decay=0.9), GROUPS)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(FactoryError, match="without trainable parameters"):
        begin(spec("nothing_to_train"), GROUPS)
