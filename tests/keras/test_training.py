"""A Keras model is trained as any other network: in batch, online, killed and resumed, with the same bits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from tests.guarantees.audit import audit
from tests.guarantees.children import (
    BATCH,
    DATASET,
    ONLINE,
    SHARDS,
    SPEC,
    Kill,
    bits,
    drain,
    fill,
    in_child,
    sample,
    train,
)
from tests.keras.conftest import NETWORKS
from tests.training.rows import begin, cut, numbers_table, plain_spec
from tidemill.storage.log import VersionLog
from tidemill.storage.urls import open_store
from tidemill.tasks.training.errors import FactoryError
from tidemill.tasks.training.keras_models import KerasModule
from tidemill.tasks.training.learner import Learner
from tidemill.tasks.training.loop import predict, score, train_pass
from tidemill.tasks.training.spec import Spec
from tidemill.tasks.training.steps import Steps

pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("default")]  # Keras and TensorFlow warn of their own code

TABLE: Final = numbers_table(130, 4).append_column("c", [[f"v{i % 9}" for i in range(130)]])
GROUPS: Final = cut(TABLE, 70)
KILLS: Final = 4
"""Of a batch training, and of an online run."""


def spec(factory: str, **settings: Any) -> Spec:
    model = {"factory": f"{NETWORKS}:{factory}"}
    return plain_spec(4, **({"model": model, "batch_size": 32, "optimizer": {"name": "adam"}} | settings))


FEATURES: Final = ["x0", "x1", {"name": "c", "kind": "category", "buckets": 20}]
SOUND: Final[dict[str, Spec]] = {
    "functional": spec("functional", features=FEATURES),
    "sequential": spec("sequential"),
    "subclassed": spec("Subclassed"),
    "averaged": spec("functional", features=FEATURES, ema_decay=0.9, ema_warmup=True, clip_norm=1.0),
    "in bfloat16": spec("functional", features=FEATURES, precision="bfloat16"),
    "compiled if that helps": spec("sequential", compile="auto"),
}


# ---- one learner -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SOUND)
def test_it_is_trained_scored_copied_and_resumed_with_the_same_bits(name: str) -> None:
    learner = begin(SOUND[name], GROUPS)
    steps = Steps(learner, expected=10**6 if learner.spec.compile == "auto" else 0)
    first = train_pass(steps, GROUPS, key=("epoch", 0)).loss
    before, stored = score(learner, GROUPS), learner.dump()
    champion = learner.network()
    assert next(iter(predict(learner, GROUPS))).shape == (70,)
    assert train_pass(steps, GROUPS, key=("epoch", 1)).loss < first
    assert score(champion, GROUPS) == before != score(learner, GROUPS)
    resumed = Learner.load(learner.spec, *stored)
    assert score(resumed, GROUPS) == before
    train_pass(Steps(resumed), GROUPS, key=("epoch", 1))
    assert resumed.dump() == learner.dump()
    assert not learner.counters.compiled_steps


def test_two_of_a_process_begin_alike_and_another_seed_begins_otherwise() -> None:
    one, two = begin(SOUND["functional"], GROUPS), begin(SOUND["functional"], GROUPS)
    assert one.dump() == two.dump()
    other = begin(SOUND["functional"].model_copy(update={"seed": 1}), GROUPS)
    assert other.dump()[0] != one.dump()[0]


def test_dropout_and_statistics_move_in_training_and_rest_in_evaluation() -> None:
    learner = begin(SOUND["functional"], GROUPS)

    def kept() -> dict[str, bytes]:
        return {name: buffer.numpy().tobytes() for name, buffer in learner.model.named_buffers()}

    x_BF, ids_BC = torch.randn(8, 2), torch.arange(8).unsqueeze(1)
    learner.model.train()
    assert not torch.equal(learner.model(x_BF, ids_BC), learner.model(x_BF, ids_BC))
    learner.model.eval()
    assert torch.equal(learner.model(x_BF, ids_BC), learner.model(x_BF, ids_BC))
    began = kept()
    kinds = {"moving_mean", "moving_variance", "seed_generator_state"}
    assert {name.partition("_")[2] for name in began} == kinds
    score(learner, GROUPS)
    assert kept() == began
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    moved = {name for name, value in kept().items() if value != began[name]}
    assert {name.partition("_")[2] for name in moved} == kinds
    assert len(began) - len(moved) == 1  # the Dropout without a seed has a state, and does not use it


def test_a_frozen_layer_stays_as_it_is() -> None:
    learner = begin(SOUND["sequential"], GROUPS)
    assert isinstance(learner.model, KerasModule)
    frozen = [v.value.tolist() for v in learner.model.net.layers[0].weights]
    train_pass(Steps(learner), GROUPS, key=("epoch", 0))
    assert [v.value.tolist() for v in learner.model.net.layers[0].weights] == frozen
    assert len(list(learner.model.parameters())) == 4


# ---- whole runs ------------------------------------------------------------------------------------------------------
WHOLE: Final = Spec.model_validate(SPEC.model_dump() | {"model": {"factory": f"{NETWORKS}:functional"}})
"""With all that the guarantees are tried with: average, replay, schedule, clipping, weights of rows, several targets."""


def test_killed_in_both_pipelines_it_ends_with_the_bits_of_a_run_that_was_not(tmp_path: Path) -> None:
    def place(name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return str(tmp_path / name)

    fill(place("data"), DATASET)
    for name in ("inbox-whole", "inbox-killed"):
        fill(place(name), SHARDS)
    whole, killed = (VersionLog(open_store(place(name)), "model") for name in ("whole", "killed"))
    for run, sources, settings in (
        (train, ("data", "data"), (WHOLE, BATCH)),
        (drain, ("inbox-whole", "inbox-killed"), (ONLINE,)),
    ):
        moments = in_child(run, place(sources[0]), place("whole"), *settings, kill=None, tmp_path=tmp_path)
        assert moments
        arguments = (run, place(sources[1]), place("killed"), *settings)
        kills = [in_child(*arguments, kill=Kill(at), tmp_path=tmp_path) is None for at in sample(moments, KILLS)]
        assert sum(kills) > KILLS // 2
        in_child(*arguments, kill=None, tmp_path=tmp_path)
        assert bits(whole) == bits(killed)
    assert len(audit(killed, SHARDS.items())) == len(audit(whole, SHARDS.items())) > 2


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_compile_on_is_refused_before_training() -> None:
    with pytest.raises(
        FactoryError, match=r"^compile: on: a Keras model, as model.factory .*leave compile out, or set it to off$"
    ):
        begin(spec("sequential", compile="on"), GROUPS)


def test_a_model_that_does_not_take_the_rows_is_refused_in_one_line() -> None:
    with pytest.raises(FactoryError, match=r"narrow': its Keras model raised .*float32\[2, 4\]\)$") as caught:
        begin(spec("narrow"), GROUPS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", ["tensorflow", None])
def test_another_backend_is_refused_and_the_variable_named(backend: str | None) -> None:
    """None: Keras chooses, and takes TensorFlow."""
    code = (
        "from tests.keras.test_training import *\n"
        "try: begin(SOUND['functional'], GROUPS)\n"
        "except FactoryError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({"KERAS_BACKEND": backend} if backend else {}),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        "returned a Keras model on the backend 'tensorflow': set KERAS_BACKEND=torch in the environment" in done.stdout
    )
    assert done.stdout.count("\n") == 1
