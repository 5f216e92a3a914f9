"""Which import paths of a spec from storage are followed."""

import sys

import pytest

from tests.training.rows import plain_spec
from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.imports import check_allowed, imported


def naming(factory: str):
    return plain_spec(model={"factory": factory})


@pytest.mark.parametrize(
    "name", ["linear", "mlp", "tests.training.rows:Net", "tests.training.rows:DropoutNet.train", "torch.nn:Linear"]
)
def test_factories_of_allowed_modules_may_come_from_storage(name):
    check_allowed(naming(name), ["tests.training", "torch"])


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        (
            "tests.training.rows:Net",
            [],
            "among .* [(]none[)]: if it is your code, set TIDEMILL_FACTORIES=tests.training.rows",
        ),
        (
            "tests.training.rows:Net",
            ["other", "tests.train"],
            "set TIDEMILL_FACTORIES=other,tests.train,tests.training.rows$",
        ),
        ("os:system", ["tests"], "module 'os' is not among"),
        ("tests.training.rows:torch.load", ["tests"], "was imported from 'torch.serialization'"),
        ("tests.training.rows:pa.__version__", ["tests"], "is a str"),
        ("tests.training.rows:torch.randperm", ["tests"], "was imported from"),
    ],
)
def test_other_factories_from_storage_are_refused(name, modules, message):
    with pytest.raises(FactoryError, match=message):
        check_allowed(naming(name), modules)


def test_a_refused_module_is_not_even_imported():
    with pytest.raises(FactoryError, match="is not among"):
        check_allowed(
            naming("tests.training.broken_model:Net"), ["tests.training.rows"]
        )  # it would raise ZeroDivisionError


@pytest.mark.parametrize("setting", [{"loss": "os:system"}, {"metrics": ["os:system"]}])
def test_losses_and_metrics_from_storage_are_held_to_it_too(setting):
    with pytest.raises(FactoryError, match="module 'os' is not among"):
        check_allowed(plain_spec(**setting), ["tests"])


def test_metrics_of_torchmetrics_need_no_permission_but_only_as_metrics():
    check_allowed(plain_spec(metrics=["torchmetrics.regression:R2Score"]), [])
    with pytest.raises(FactoryError, match=r"module 'torchmetrics.regression' is not among"):
        check_allowed(plain_spec(loss="torchmetrics.regression:R2Score"), [])


@pytest.mark.parametrize(
    "named",
    [
        {"model": {"factory": "torch.nn:Linear", "arguments": {"in_features": 10, "out_features": 1}}},
        {"model": {"factory": "torch.nn.modules.linear:Bilinear"}},
        {"loss": "torch.nn.functional:smooth_l1_loss"},
    ],
)
def test_what_is_torchs_own_needs_no_leave(named):
    check_allowed(plain_spec(**named), [])


@pytest.mark.parametrize(
    "named",
    [
        {"model": {"factory": "torch:load"}},
        {"model": {"factory": "torch.hub:load"}},
        {"model": {"factory": "torch.nn.functional:mse_loss"}},
        {"model": {"factory": "torch.nn:functional.importlib.import_module"}},
        {"loss": "torch.nn:Linear"},
        {"loss": "torch.nn.functional:importlib.import_module"},
        {"metrics": ["torch.nn:Linear"]},
    ],
)
def test_what_torch_can_do_beside_needs_leave(named):
    with pytest.raises(FactoryError, match="comes from storage"):
        check_allowed(plain_spec(**named), [])


def test_all_that_need_leave_are_named_at_once():
    spec = plain_spec(
        model={"factory": "one:Net"}, loss="two.losses:odd", metrics=["one:Metric", "torchmetrics:R2Score"]
    )
    with pytest.raises(FactoryError) as found:
        check_allowed(spec, ["mine"])
    for name in ("'one:Net'", "'two.losses:odd'", "'one:Metric'"):
        assert name in str(found.value)
    assert str(found.value).endswith("set TIDEMILL_FACTORIES=mine,one,two.losses")


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("keras", r"pip install 'tidemill\[keras\]', and set"), ("tensorflow", "if Keras asks for it, set")],
)
def test_without_keras_or_its_backend_the_remedy_is_named(missing, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        FactoryError, match=f"no module named '{missing}': {remedy} KERAS_BACKEND=torch in the environment"
    ):
        imported(f"{missing}:Model", "model.factory")
