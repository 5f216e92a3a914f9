"""What differs between two environments is said in words."""

import json

import torch

from tidemill.tasks.training.environment import differences, environment


def test_the_environment_is_json_and_equals_itself():
    here = environment()
    assert json.loads(json.dumps(here)) == here
    assert here["torch"] == torch.__version__
    assert here["threads"] == torch.get_num_threads()
    assert differences(here, environment()) == []


def test_variables_that_change_rounding_are_part_of_it(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment()["MKL_CBWR"] == "COMPATIBLE"


def test_differences_are_named():
    assert differences({"threads": 2, "torch": "2.13"}, {"threads": 1, "torch": "2.13", "MKL_CBWR": "AVX2"}) == [
        "threads was 2, is now 1",
        "MKL_CBWR was not set, is now AVX2",
    ]
