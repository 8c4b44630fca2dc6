"""What a search of solver schedules knows of a pipeline in half precision."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusion.solver.tuning import VP, problem
from modules.test_pipeline import module_of, tiny_pipe
from torch import Tensor

from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.fitting import LevenbergMarquardt
from genlight.diffusion.solver.presets import named_schedule
from genlight.loops.solver_banks import PipelineSampling
from genlight.loops.solver_rivals import rival_schedules
from genlight.loops.solver_work import _refined, _tuned
from genlight.search.spaces.solver_schedule import SolverScheduleSpace


def cast(name: str, dtype: torch.dtype) -> Any:
    """A tiny pipeline with weights and prompts of that type."""
    pipe = tiny_pipe(name)
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *a, **k: tuple(x.to(dtype) for x in encode(*a, **k))
    return pipe.to(dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "rounded"),
    [("flux", torch.bfloat16, True), ("flux", torch.float32, False), ("sd", torch.bfloat16, False)],
)
def test_pipelines_that_round_timesteps_are_known(name: str, dtype: torch.dtype, rounded: bool) -> None:
    sampling = PipelineSampling(module_of(name, cast(name, dtype)))
    assert sampling.dtype == dtype and sampling.rounded_timesteps is rounded


class Rounded:
    """As a pipeline that rounds timesteps says of itself."""

    rounded_timesteps = True

    def __init__(self, sampling: Any) -> None:
        self._sampling, self.prediction = sampling, sampling.prediction

    def __call__(self, tables: Any, bank: Any) -> Tensor:
        return self._sampling(tables, bank)


def test_rounded_times_stay_and_weights_are_tuned() -> None:
    task, schedule = problem(VP, 32), named_schedule("dpmpp_2m", VP.schedule, 4)
    rounded = replace(task, sampling=Rounded(task.sampling))
    space, method = SolverScheduleSpace(VP.schedule, 4), LevenbergMarquardt(iterations=2)
    own = compile_schedule(schedule, VP.schedule)
    for each, moved in ((task, True), (rounded, False)):
        refined = compile_schedule(_refined(each, space, schedule, method), VP.schedule)
        error, tuned = _tuned(each, schedule, method)
        for times in (refined.times, tuned.table().times):
            assert torch.allclose(times, own.times, atol=1e-6) is not moved
        assert error < task.rms(own, task.select)
        names = rival_schedules(each, "dpmpp_2m", schedule, "t_min")
        assert any("learned times" in name for name in names) is moved
