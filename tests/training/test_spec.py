"""The spec says what is wrong with it, and survives JSON."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from tidemill.tasks.training.spec import LOSSES, Column, Model, Optimizer, Spec


def test_a_string_is_a_column():
    spec = Spec(features=["a", {"name": "b", "kind": "category"}, Column(name="c", buckets=5)], target="y")
    assert spec.features == (Column(name="a"), Column(name="b", kind="category"), Column(name="c", buckets=5))


def test_defaults_are_the_documented_ones():
    spec = Spec(features=["a"], target="y")
    assert (spec.task, spec.stated_task, spec.loss_name, spec.outputs) == (None, None, "mse", 1)
    assert (spec.batch_size, spec.epochs, spec.seed, spec.window_bytes) == (64, 10, 0, 16 * 2**20)
    assert (spec.shuffle, spec.standardize_features, spec.standardize_target) == (True, True, False)


@pytest.mark.parametrize(("task", "losses"), LOSSES.items())
def test_the_loss_follows_the_task(task, losses):
    classes = 3 if task == "multiclass" else None
    assert Spec(features=["a"], target="y", task=task, classes=classes).loss_name == losses[0]
    for loss in losses:
        assert Spec(features=["a"], target="y", task=task, classes=classes, loss=loss).loss_name == loss


def test_json_round_trip_is_exact():
    spec = Spec(
        features=["a", Column(name="b", kind="category", buckets=7)],
        target="y",
        task="multiclass",
        classes=4,
        model=Model(factory="package.module:Outer.make", arguments={"hidden": [1, 2], "deep": {"x": None}}),
        optimizer=Optimizer(name="adam", arguments={"betas": [0.9, 0.999], "eps": 1e-08}),
        learning_rate=0.1 + 0.2,
        seed=2**63 - 1,
    )
    assert Spec.model_validate_json(spec.model_dump_json()) == spec
    assert Spec.model_validate(spec.model_dump(mode="json")).model_dump_json() == spec.model_dump_json()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": ["a", "b", "a"]}, r"features holds \['a'\] more than once: name each column once"),
        ({"features": ["a", "y"]}, "target 'y' is also among the features: remove it"),
        ({"features": []}, "features"),
        ({"task": "binary", "classes": 3}, "classes is for task 'multiclass'"),
        ({"loss": "logistic"}, r"loss 'logistic' is none that is known: use one of"),
        (
            {"task": "regression", "loss": "bce"},
            r"loss 'bce' does not fit task 'regression': use one of \('mse', 'l1', 'huber'\)",
        ),
        ({"task": "binary", "standardize_target": True}, "standardize_target .* switch it off"),
        ({"standardize_features": False, "running_statistics": True}, "running_statistics scales nothing"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name"),
        ({"optimizer": {"arguments": {"lr": 1}}}, "set learning_rate on the spec instead"),
        ({"model": {"factory": "resnet"}}, "model.factory 'resnet' is none of linear, mlp, package.module:attribute"),
        ({"model": {"factory": "package.module:"}}, "model.factory"),
        ({"model": {"factory": "a b:c"}}, "model.factory"),
        ({"learning_rat": 1.0}, "learning_rat"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(settings, message):
    with pytest.raises(ValidationError, match=message):
        Spec(**({"features": ["a"], "target": "y"} | settings))


def test_every_setting_is_described():
    for model in (Spec, Column, Model, Optimizer):
        assert all(field.description for field in model.model_fields.values())


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Spec(features=["a"], target="y").epochs = 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("tidemill.tasks.training", ["prefect", "torch", "pyarrow", "tidemill.storage"]),
        ("tidemill.tasks.training.spec", ["prefect", "torch", "pyarrow", "tidemill.storage"]),
        ("tidemill.tasks.training.loop", ["prefect", "tidemill.storage", "s3fs"]),
    ],
)
def test_importing_stays_cheap_and_apart(module, unwanted):
    code = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("value", ['"\\udcff"', "NaN", "[-Infinity]"])
def test_what_cannot_be_stored_is_refused(value):
    """A text that is no Unicode, a number that JSON has no word for: both would come back as something else."""
    text = f'{{"features": ["a"], "target": "y", "model": {{"arguments": {{"b": {value}}}}}}}'
    with pytest.raises(ValidationError, match=r"arguments|cannot be stored as JSON"):
        Spec.model_validate(json.loads(text))
    with pytest.raises(ValidationError, match=r"cannot be stored as JSON|Invalid JSON"):
        Spec.model_validate_json(text)
