"""The account of a stack, and what its constructor refuses: without any run."""

from typing import Any

import pytest

from genlight.loops.stack import Stack
from genlight.loops.stack_report import with_gains
from genlight.modules.diffusion import DiffusionModule


def test_gains_multiply_and_a_loss_has_the_sign_of_the_metric() -> None:
    rows = [
        {"stage": "plain", "is": 4.0, "nfe": 20, "megabytes": 3.0},
        {"stage": "s3", "is": 3.0, "nfe": 5, "megabytes": 1.5},
    ]
    assert with_gains(rows, "is", "max")[1] == {**rows[1], "nfe_gain": 4, "bytes_gain": 2, "gain": 8, "loss": 1}
    assert with_gains(rows, "is", "min")[1]["loss"] == -1


def test_stages_need_names_and_lists_of_words() -> None:
    def made(stages: dict[str, Any]) -> Stack:
        return Stack(stages, "e", "val/fd", DiffusionModule)

    for wrong in ({}, {"a/b": ["x=1"]}, {"plain": ["x=1"]}, {"a": "x=1"}, {"a": ["x"]}):
        with pytest.raises(ValueError, match=r"method\.stages"):
            made(wrong)


def test_a_stage_names_those_before_it_and_members_come_last() -> None:
    def made(stages: dict[str, Any]) -> Stack:
        return Stack(stages, "e", "val/fd", DiffusionModule)

    made({"a": ["x=<plain>"], "b": ["module.members={one: <a>}"]})
    for wrong in ({"a": ["x=<b>"], "b": ["x=1"]}, {"a": ["x=<a>"]}, {"a": ["module.members={}"], "b": ["x=1"]}):
        with pytest.raises(ValueError, match=r"method\.stages\.a"):
            made(wrong)
