"""Refinement of a schedule's real numbers, with its decisions fixed."""

from dataclasses import replace

import pytest
import torch
from diffusion.solver.tuning import FAMILIES, FLOW, VP, bank, family, problem
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.finetune import _TableSpace, finetune, schedule_times
from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt
from genlight.diffusion.solver.jacobian import normal_equations
from genlight.diffusion.solver.learned_times import learn_times, with_times
from genlight.diffusion.solver.levels import in_half_log_snr
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.refine import refine


class WholePipeline:
    """Sampling that says nothing of a network, as that of a whole pipeline does."""

    def __init__(self, sampling) -> None:
        self._sampling, self.prediction = sampling, sampling.prediction

    def __call__(self, tables, bank) -> Tensor:
        return self._sampling(tables, bank).detach()


def times_and_factors(schedule: SolverSchedule, prediction: Prediction):
    """Inner times, and one factor of every step of order 2 or more, without gradients."""
    schedule = in_half_log_snr(schedule, prediction.schedule)
    monotone, times = schedule_times(schedule, prediction.schedule)
    slots = [index for index, step in enumerate(schedule.steps) if step.order >= 2]

    def make(vector: Tensor) -> SolverSchedule:
        count = len(monotone.start)
        moved = with_times(schedule, times(vector[:count]), prediction.schedule)
        steps = list(moved.steps)
        for index, factor in zip(slots, vector[count:].tolist(), strict=True):
            steps[index] = replace(steps[index], scales=(factor,))
        return replace(moved, steps=tuple(steps))

    return torch.cat([monotone.start, torch.ones(len(slots), dtype=torch.float64)]), make


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_nearer_to_the_teacher_on_noise_never_seen(prediction: Prediction) -> None:
    """Factors and times together are worth more than times alone, on every family."""
    schedule = named_schedule("dpmpp_2m", prediction.schedule, 5)
    task, report = problem(prediction), bank(prediction, 2, 512)
    start, make = times_and_factors(schedule, prediction)
    refined, record = refine(task, start, make)
    times, _ = learn_times(task, schedule, LevenbergMarquardt())
    rms = [task.rms(compile_schedule(s, prediction.schedule), report) for s in (schedule, times, refined)]
    assert rms[2] < 0.9 * rms[1] < 0.9 * rms[0]
    assert record.best_step > 0 and len(refined.times) == 6


def test_without_gradients_the_equations_are_the_same() -> None:
    task, schedule = problem(VP, 32), named_schedule("dpmpp_2m", VP.schedule, 4)
    monotone, times = schedule_times(schedule, VP.schedule)

    def smooth(raw: Tensor) -> SolverTable:
        return compile_schedule(schedule, VP.schedule, times=times(raw))

    def opaque(raw: Tensor) -> SolverTable:
        return compile_schedule(with_times(schedule, times(raw.detach()), VP.schedule), VP.schedule)

    for found, wanted in zip(
        normal_equations(task, opaque, monotone.start), normal_equations(task, smooth, monotone.start), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


class HalfPrecision:
    """Sampling whose states are rounded to bfloat16 wherever a pipeline has them."""

    dtype = torch.bfloat16

    def __init__(self, sampling) -> None:
        def model(x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            return sampling.model(x.bfloat16().to(x.dtype), timestep, **conditions).bfloat16().to(x.dtype)

        self._sampling, self.prediction = replace(sampling, model=model), sampling.prediction

    def __call__(self, tables, bank) -> Tensor:
        return self._sampling(tables, bank).bfloat16().to(bank.noise.dtype)


def test_differences_are_larger_than_what_half_precision_rounds() -> None:
    """By default those of a pipeline in half precision give what exact ones give, which small ones do not."""
    schedule, task = named_schedule("dpmpp_2m", FLOW.schedule, 4), problem(FLOW, 256)
    half = replace(task, sampling=HalfPrecision(task.sampling))
    space = _TableSpace(schedule, FLOW.schedule, weights=True, times=False)
    wanted, found, fine = (
        normal_equations(each, space.table, space.start, difference)[0].diagonal()
        for each, difference in ((task, None), (half, None), (half, 2e-3))
    )
    used = wanted > 3e-3 * wanted.max()  # what moves samples
    assert used.sum() >= 6
    assert (found / wanted - 1)[used].abs().max() < 0.2
    assert (fine / wanted - 1)[used].abs().max() > 1
    _, record = finetune(half, schedule, LevenbergMarquardt(iterations=4))
    assert record.best_step > 0 and record.steps[-1].best_rms < 0.7 * record.steps[0].select_rms


def test_at_the_edge_of_what_makes_a_table_one_side_is_enough() -> None:
    task, schedule = problem(VP, 32), named_schedule("dpmpp_2m", VP.schedule, 4)
    start, make = times_and_factors(schedule, VP)
    edge = start[-1].item()

    def bounded(vector: Tensor) -> SolverTable:
        if vector[-1] > edge:
            raise ValueError("too large")
        return compile_schedule(make(vector.detach()), VP.schedule)

    def free(vector: Tensor) -> SolverTable:
        return compile_schedule(make(vector.detach()), VP.schedule)

    found, wanted = normal_equations(task, bounded, start)[1], normal_equations(task, free, start)[1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_whole_pipeline_is_refined_and_tuned_like_its_network() -> None:
    """No gradients, no network in sight; and what needs them says so."""
    task, schedule = problem(VP, 32), named_schedule("dpmpp_2m", VP.schedule, 4)
    whole = replace(task, sampling=WholePipeline(task.sampling))
    start, make = times_and_factors(schedule, VP)
    method = LevenbergMarquardt(iterations=4)
    one, record = refine(task, start, make, method)
    other, of_whole = refine(whole, start, make, method)
    assert one == other and of_whole.model_rows >= record.model_rows > 0
    tables = [finetune(t, schedule, method)[0] for t in (task, whole)]
    torch.testing.assert_close(tables[0].weights, tables[1].weights)
    with pytest.raises(ValueError, match="whole pipeline is fitted by LevenbergMarquardt"):
        finetune(whole, schedule, Adam(steps=2))


def test_the_start_is_kept_if_nothing_is_better() -> None:
    task, schedule = problem(VP, 16), named_schedule("dpmpp_2m", VP.schedule, 4)
    start, make = times_and_factors(schedule, VP)
    own = replace(task.train, target=task.sample(task.train, compile_schedule(make(start), VP.schedule)))
    refined, record = refine(replace(task, train=own, select=own), start, make)
    assert record.best_step == 0 and refined == make(start)


@pytest.mark.parametrize("method", [LevenbergMarquardt(iterations=3), LevenbergMarquardt(central=True)])
def test_times_that_are_rounded_stay(method: LevenbergMarquardt) -> None:
    """No small difference moves the table, so there is nothing to go by."""
    task, schedule = problem(VP, 16), named_schedule("ddim", VP.schedule, 3, integer_times=True)
    monotone, times = schedule_times(schedule, VP.schedule)
    refined, record = refine(
        task, monotone.start, lambda raw: with_times(schedule, times(raw).round(), VP.schedule), method
    )
    assert refined == schedule and record.best_step == 0
    for found in normal_equations(task, lambda raw: compile_schedule(schedule, VP.schedule), monotone.start):
        assert found.shape[0] == len(monotone.start) and not bool(found.any())


def test_the_first_time_moves_where_noise_is_a_state_at_every_time() -> None:
    """A schedule that begins where its noise is no state of the teacher: what is lost there is made up for in part."""
    schedule = in_half_log_snr(named_schedule("dpmpp_2m", VP.schedule, 4), VP.schedule)
    late = replace(schedule, times=(schedule.times[0] + 1.5, *schedule.times[1:]))
    task, report, method = problem(VP), bank(VP, 2, 512), LevenbergMarquardt(iterations=15)
    fixed, moved = (finetune(task, late, method, weights=False, first_time=first)[0] for first in (False, True))
    assert fixed.times[0].item() == pytest.approx(VP.schedule.t_of_half_log_snr(late.times[0]))
    assert abs(fixed.times[0] - moved.times[0]) > 1 and moved.times[0] <= VP.schedule.t_max
    assert moved.initial_scale == pytest.approx(1.0)
    assert task.rms(moved, report) < task.rms(fixed, report)
    for prediction in FAMILIES[1:]:
        start = named_schedule("dpmpp_2m", prediction.schedule, 4)
        table, _ = finetune(problem(prediction, 32), start, LevenbergMarquardt(iterations=2), first_time=True)
        assert table.times[0] == compile_schedule(start, prediction.schedule).times[0]
