"""Continuous genes: the start is the candidate, the way back is exact, and small steps are small changes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from search.spaces.test_solver_schedule import EDM, FLOW, SPACES, VP, all_genes, hand_made

from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import Corrector, SolverSchedule, StepDecision
from genlight.diffusion.solver.phi import bh1
from genlight.diffusion.solver.presets import named_schedule
from genlight.search.polish import Polishable
from genlight.search.protocols import VectorView
from genlight.search.spaces.solver_continuous import FACTOR_LIMIT, ContinuousGenes
from genlight.search.spaces.solver_genes import EDITS
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

CONTINUOUS = ("vp", "vp-clean", "vp-free-ends", "vp-afs", "edm", "edm-free-ends", "flow")


def candidates(name: str, count: int) -> Iterator[tuple[SolverScheduleSpace, SolverSchedule]]:
    """Hand-made schedules and random ones of every kind of decision."""
    noise_schedule, options = SPACES[name]
    space = SolverScheduleSpace(noise_schedule, 6, genes=all_genes(noise_schedule), max_order=4, **options)
    rng = np.random.default_rng(0)
    made = hand_made(noise_schedule, 6, space.end)
    for schedule in made:
        yield space, schedule
    for _ in range(count):
        for _ in range(3):
            schedule = space.mutate(schedule, rng, size=0.5)
        yield space, schedule
        if rng.random() < 0.3:
            schedule = made[int(rng.integers(len(made)))]


def assert_same_table(first: SolverTable, second: SolverTable, tolerance: float = 1e-9) -> None:
    size = 1 + float(second.weights.abs().max())
    torch.testing.assert_close(first.weights, second.weights, rtol=tolerance, atol=tolerance * size)
    torch.testing.assert_close(first.times, second.times, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(first.mean_weights, second.mean_weights, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_start_is_the_candidate(name: str) -> None:
    noise_schedule, _ = SPACES[name]
    for space, candidate in candidates(name, 150):
        genes = ContinuousGenes(space, candidate)
        assert isinstance(genes, VectorView) and genes.start.dtype == np.float64
        again = genes.schedule(genes.start)
        assert_same_table(compile_schedule(again, noise_schedule), compile_schedule(candidate, noise_schedule))
        np.testing.assert_array_equal(genes.to_vector(candidate), genes.start)
        infinite = [time is None for time in space.finished(space.draft(candidate), candidate).times]
        assert [time is None for time in again.times] == infinite


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_way_back_is_exact(name: str) -> None:
    """Where no bound is met, a schedule's coordinates are those it was made from."""
    noise_schedule, _ = SPACES[name]
    rng = np.random.default_rng(1)
    exact = 0
    for space, candidate in candidates(name, 60):
        around = space.around(candidate)
        vector = around.to_vector(candidate)
        vector = vector + 0.1 * rng.normal(size=len(vector))
        made = around.from_vector(vector)
        assert made.nfe == 6 == compile_schedule(made, noise_schedule).nfe
        back = around.to_vector(made)
        exact += bool(np.allclose(back, vector, rtol=0, atol=1e-6))
        # what was cut off at a bound stays cut off, up to the gap that has a logarithm
        tables = [compile_schedule(schedule, noise_schedule) for schedule in (around.from_vector(back), made)]
        assert_same_table(*tables, 1e-3)
        far = around.from_vector(vector + 100 * rng.normal(size=len(vector)))
        assert compile_schedule(far, noise_schedule).nfe == 6
    assert exact > 30


@pytest.mark.parametrize("name", CONTINUOUS)
def test_small_steps_are_small_changes(name: str) -> None:
    noise_schedule, _ = SPACES[name]
    rng = np.random.default_rng(2)
    for space, candidate in candidates(name, 60):
        genes = ContinuousGenes(space, candidate)
        direction = rng.normal(size=len(genes.start))
        direction /= np.linalg.norm(direction)
        tables = [
            compile_schedule(genes.schedule(genes.start + step * direction), noise_schedule).weights
            for step in (0.0, 1e-6, 1e-4)
        ]
        near, far = (float((table - tables[0]).abs().max()) for table in tables[1:])
        size = 1 + float(tables[0].abs().max())
        assert near < 1e-2 * size and (far == 0 or near < 0.2 * far + 1e-9 * size)


def test_coordinates_are_what_they_are_called() -> None:
    """UniPC-2 at 4 steps: 3 gaps, both ends, the factors of 2 derivatives and of 1 + 2 + 2 of the correctors."""
    steps = named_schedule("unipc_2_bh1", VP, 4).steps
    assert [step.order for step in steps] == [1, 2, 2, 1]
    assert [len(step.corrector_points()) for step in steps[:3]] == [1, 2, 2]
    low, high = VP.half_log_snr(VP.t_max), VP.half_log_snr(VP.t_min)
    candidate = SolverSchedule((low + 0.25, -2.0, 0.0, 1.0, high - 0.5), steps)
    space = SolverScheduleSpace(VP, 4, start_slack=1.0, end_slack=1.0)
    assert isinstance(space, Polishable)
    genes = ContinuousGenes(space, candidate)
    assert len(genes.start) == len(genes.start_tensor) == 3 + 2 + 2 + 5
    gaps = np.diff(np.array(candidate.times, dtype=float)) - space.min_gap
    np.testing.assert_allclose(genes.start[:3], np.log(gaps[:-1] / gaps[-1]), rtol=1e-12)
    np.testing.assert_allclose(genes.start[3:5], [0.25, 0.5], atol=1e-12)
    np.testing.assert_allclose(genes.start[6], bh1(-2.0), rtol=1e-12)  # the second step, h = 2, of data
    assert len(ContinuousGenes(replace(space, genes=("times",)), candidate).start) == 5
    assert len(ContinuousGenes(replace(space, genes=("scale", "type")), candidate).start) == 7
    # beyond the slack is at the slack; beyond the limit of factors is at the limit
    moved = genes.schedule(genes.start + np.array([0, 0, 0, 5, -5, *[100] * 7]))
    assert moved.times[0] == pytest.approx(low + 1.0) and moved.times[-1] == pytest.approx(high)
    assert moved.steps[1].scales == (FACTOR_LIMIT,)
    for wrong in (genes.start[1:], genes.start + np.inf):
        with pytest.raises(ValueError, match="finite coordinates"):
            genes.schedule(wrong)


def test_weights_keep_their_sum() -> None:
    step = StepDecision(
        "noise", 2, points=((-2,),), weights=(1.5, -0.5), corrector=Corrector(weights=(0.25, 0.0, 0.75))
    )
    candidate = replace(named_schedule("ddim", EDM, 3), steps=(StepDecision(), step, replace(step, corrector=None)))
    genes = ContinuousGenes(SolverScheduleSpace(EDM, 3, genes=("scale",)), candidate)
    np.testing.assert_array_equal(genes.start, [-0.5, 0.0, 0.75, -0.5])
    made = genes.schedule(genes.start + 0.125)
    assert made.steps[1].weights == (1.375, -0.375) and made.steps[2].weights == (1.375, -0.375)
    assert made.steps[1].corrector == Corrector(weights=(0.0, 0.125, 0.875))


def test_other_schedules_lend_what_they_have() -> None:
    """Another number of steps is interpolated; factors without a counterpart stay; ends stay infinite or finite."""
    space = SolverScheduleSpace(VP, 6, genes=tuple(EDITS)).around(named_schedule("dpmpp_3m", VP, 6))
    start = space.to_vector(space.template or space.sample(np.random.default_rng(0)))
    heun = named_schedule("heun", VP, 7)
    space7 = SolverScheduleSpace(VP, 7)
    assert len(space7.to_vector(heun)) == len(space7.vector_bounds) and len(heun.steps) == 4
    ddim = space.to_vector(named_schedule("ddim", VP, 6))
    assert len(ddim) == len(start)
    np.testing.assert_array_equal(ddim[5:], start[5:])
    with pytest.raises(ValueError, match="template makes 4"):
        space.around(named_schedule("ddim", VP, 4))
    flow = SolverScheduleSpace(FLOW, 6)
    clean = flow.from_vector(flow.to_vector(flow.sample(np.random.default_rng(0))))
    assert clean.times[0] is None and clean.times[-1] is None


def test_whole_times_stay_whole() -> None:
    space = SolverScheduleSpace(VP, 5, integer_times=True)
    candidate = space.sample(np.random.default_rng(0))
    genes = ContinuousGenes(space, candidate)
    assert genes.schedule(genes.start).times == candidate.times
    times: list[Any] = list(genes.schedule(genes.start + 0.3).times)
    assert times == [round(time) for time in times] and times != list(candidate.times)
