"""Hostile, foreign and oversized inputs, and faults of the process; `make proof NAME=faults` takes larger numbers."""

from pathlib import Path
from typing import Any

import pytest
from campaigns import damage, foreign, hostile, processes

from genlight.config_check import ConfigError, check

pytestmark = pytest.mark.filterwarnings("ignore")


def test_no_pickle_is_read_at_any_input(tmp_path: Path) -> None:
    assert hostile.pickles(tmp_path).wrong == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    assert foreign.pairs(tmp_path).wrong == []


def test_hostile_json_costs_little(tmp_path: Path) -> None:
    found, seconds, megabytes = hostile.json_fuzz(tmp_path, 60)
    assert found.wrong == [] and seconds <= 0.05 and megabytes <= 50


def test_hostile_headers_of_tensors_are_refused_or_read(tmp_path: Path) -> None:
    assert hostile.headers(tmp_path, 60).wrong == []


def test_an_index_of_weights_names_no_file_outside(tmp_path: Path) -> None:
    assert hostile.weight_maps(tmp_path).wrong == []


def test_random_kills_of_a_search_change_no_byte(tmp_path: Path) -> None:
    assert processes.sigkills(tmp_path, 10).wrong == []


def test_kills_of_one_of_two_ranks_change_no_byte(tmp_path: Path) -> None:
    found = processes.sigkills(tmp_path, 3, ranks=2)
    assert found.wrong == [] and found.tried >= 2


def test_a_candidate_that_never_ends_is_failed(tmp_path: Path) -> None:
    assert processes.hanging(tmp_path).wrong == []


def test_memory_does_not_grow_over_failing_candidates() -> None:
    assert processes.memory_growth() < 0.01


def test_a_candidate_beyond_the_memory_of_the_process_fails_alone() -> None:
    assert processes.beyond_the_limit() == 0


def test_a_second_process_gives_up_at_once(tmp_path: Path) -> None:
    found, _, seconds = processes.second_process(tmp_path)
    # of the CPU: other tests stretch what the clock says
    assert found.wrong == [] and seconds <= 2


def test_verifying_costs_little(tmp_path: Path) -> None:
    cost = damage.hash_cost(tmp_path, 64)
    # a second a gigabyte on a quiet core
    assert cost["seconds_per_gb"] <= 3 or cost["share_of_load"] <= 0.05


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_a_target_that_is_no_class_to_build_is_refused(target: str) -> None:
    assert hostile.is_refused(target), target


@pytest.mark.parametrize("node", hostile.NESTED, ids=str)
def test_targets_are_refused_wherever_they_stand(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        check({**hostile.PLAIN, "method": node})
