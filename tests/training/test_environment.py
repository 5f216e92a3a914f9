"""What differs between two environments is said in words."""

import json

import pytest
import torch

from tidemill.tasks.training.environment import differences, environment


def test_the_environment_is_json_and_equals_itself():
    here = environment()
    assert json.loads(json.dumps(here)) == here
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert differences(here, environment()) == []


@pytest.mark.parametrize("name", ["MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_variables_that_change_rounding_are_part_of_it(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    before = environment()
    monkeypatch.setenv(name, "ANOTHER")
    assert differences(before, environment()) == [f"{name} was not set, is now ANOTHER"]


def test_settings_that_change_rounding_are_part_of_it():
    before = environment()
    torch.backends.mkldnn.enabled = False
    try:
        assert differences(before, environment()) == ["onednn was not set, is now off"]
    finally:
        torch.backends.mkldnn.enabled = True
    torch.set_float32_matmul_precision("medium")
    try:
        assert differences(before, environment()) == ["float32_matmul_precision was not set, is now medium"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_kind_of_cpu_is_part_of_it():
    assert environment()["cpu"]


def test_differences_are_named():
    assert differences({"threads": 2, "torch": "2.13"}, {"threads": 1, "torch": "2.13", "MKL_CBWR": "AVX2"}) == [
        "threads was 2, is now 1",
        "MKL_CBWR was not set, is now AVX2",
    ]
    assert differences({"threads": 2}, {"threads": 1}, ("is", "there it is")) == ["threads is 2, there it is 1"]
