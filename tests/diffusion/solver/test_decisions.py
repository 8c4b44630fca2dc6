"""What a solver schedule may be, what it says when it may not, and edits that never leave the space."""

import copy

import numpy as np
import pytest
from diffusion.solver.mixture import random_schedule, random_step
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import (
    Corrector,
    LinearScale,
    SolverSchedule,
    StepDecision,
    nearest_points,
)
from genlight.diffusion.solver.edits import delete_step, insert_step, with_step, with_time

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule()
FIRST, SECOND = StepDecision(), StepDecision("data", 2, points=((-2,),))


def _schedule(*steps: StepDecision, times: tuple | None = None, **options) -> SolverSchedule:
    return SolverSchedule(times or tuple(np.linspace(-3, 3, len(steps) + 1).tolist()), steps, **options)


BAD = {
    "times that fall": (lambda: _schedule(FIRST, FIRST, times=(-1.0, -2.0, 0.0)), "must rise strictly"),
    "times that rise": (lambda: _schedule(FIRST, times=(1.0, 2.0), time_domain="time"), "must fall strictly"),
    "duplicate times": (lambda: _schedule(FIRST, FIRST, times=(-1.0, -1.0, 0.0)), "must rise strictly"),
    "infinite time inside": (lambda: _schedule(FIRST, FIRST, times=(-1.0, None, 0.0)), "only the first and the last"),
    "nan": (lambda: _schedule(FIRST, times=(float("nan"), 0.0)), "not a finite number"),
    "too few times": (lambda: _schedule(FIRST, times=(0.0,)), "do not bound"),
    "order above history": (lambda: _schedule(SECOND, FIRST), r"steps\[0\].*only 1 are stored"),
    "order above 4": (lambda: StepDecision(order=5, points=((-2,),) * 4), "order = 5"),
    "point beyond history": (lambda: _schedule(FIRST, StepDecision(order=2, points=((-3,),))), "only 2 are stored"),
    "source beyond history": (lambda: _schedule(StepDecision(source=-2)), "source = -2: only 1"),
    "point is source": (lambda: StepDecision(order=2, points=((-1,),)), "is the source itself"),
    "point in the future": (lambda: StepDecision(order=2, points=((0,),)), "lies in the future"),
    "point twice": (lambda: StepDecision(order=2, points=((-2, -2),)), "named twice"),
    "too few points": (lambda: StepDecision(order=3, points=((-2,), (-2,))), "derivative 2 needs at least 2"),
    "sets missing": (lambda: StepDecision(order=3, points=((-2, -3),)), "a set of points for each"),
    "corrector on last step": (lambda: _schedule(StepDecision(corrector=Corrector())), "the last step has none"),
    "order 2 to clean": (
        lambda: _schedule(FIRST, SECOND, times=(-1.0, 0.0, None)),
        "infinite h and must be of order 1",
    ),
    "ems": (lambda: StepDecision("ems"), "needs statistics"),
    "unknown space": (lambda: StepDecision("velocity"), "known are noise, data"),
    "unknown scale": (lambda: StepDecision(order=2, points=((-2,),), scales=("bh3",)), "known are bh1"),
    "too many scales": (lambda: StepDecision(order=2, points=((-2,),), scales=(1.0, 1.0)), "1 derivatives"),
    "named scale in sigma": (
        lambda: StepDecision(order=2, points=((-2,),), scales=("bh2",), variable="sigma"),
        "use a number",
    ),
    "weights and scales": (
        lambda: StepDecision(order=2, points=((-2,),), weights=(1.5, -0.5), scales=(1.0,)),
        "leave one of the two",
    ),
    "weights of another length": (lambda: StepDecision(order=2, points=((-2,),), weights=(1.0,)), "takes 2 weights"),
    "corrector weights": (lambda: StepDecision(corrector=Corrector(weights=(1.0,))), "one weight each"),
    "afs with one step": (lambda: _schedule(FIRST, afs="zero"), "takes the only evaluation away"),
    "unknown afs": (lambda: _schedule(FIRST, FIRST, afs="median"), "known are zero, mean"),
    "two points at one time": (
        lambda: _schedule(
            FIRST,
            StepDecision("data", source=-2),
            StepDecision("data", 3, points=((-2, -3), (-2, -3))),
            times=(-1.0, 0.0, 0.0, 1.0),
        ),
        "two evaluations at one time",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_decisions_are_named(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


COMPILE_BAD = {
    "outside the range": (lambda: compile_schedule(_schedule(FIRST, times=(-50.0, 0.0)), VP), "outside"),
    "no pure noise": (lambda: compile_schedule(_schedule(FIRST, times=(None, 0.0)), VP), "does not reach"),
    "order 2 to flow's clean image": (
        lambda: compile_schedule(_schedule(FIRST, SECOND, times=(1.0, 0.5, 0.0), time_domain="time"), FLOW),
        "infinite h",
    ),
    "noise of order 2 from pure noise": (
        lambda: compile_schedule(
            _schedule(FIRST, StepDecision("noise", 2, -2, ((-1,),)), times=(1.0, 0.5, 0.2), time_domain="time"), FLOW
        ),
        "no value in a step from pure noise",
    ),
    "noise basis from pure noise": (
        lambda: compile_schedule(_schedule(FIRST, times=(1.0, 0.5), time_domain="time"), FLOW, basis="noise"),
        "basis 'data'",
    ),
    "times below pure noise": (
        lambda: compile_schedule(_schedule(FIRST, FIRST, times=(1.0, 1 - 1e-9, 0.5), time_domain="time"), FLOW),
        "does not rise",
    ),
}


@pytest.mark.parametrize("name", COMPILE_BAD)
def test_what_a_noise_schedule_does_not_have(name: str) -> None:
    build, message = COMPILE_BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def test_evaluations_are_counted() -> None:
    """Pitfall 6: an implicit corrector costs one more, the analytical first step one fewer, a pseudo corrector none."""
    steps = (
        StepDecision(corrector=Corrector("pseudo")),
        StepDecision(corrector=Corrector("implicit")),
        StepDecision(corrector=Corrector("implicit")),
        FIRST,
    )
    assert [_schedule(*steps, afs=afs).nfe for afs in (None, "zero", "mean")] == [6, 5, 5]


def test_default_points_are_the_nearest() -> None:
    assert nearest_points(3) == ((-2, -3), (-2, -3))
    assert nearest_points(3, source=-2) == ((-1, -3), (-1, -3))
    assert nearest_points(3, source=-3, stored=3) == ((-1, -2), (-1, -2))
    assert nearest_points(1) == ()


def test_explicit_points_of_a_corrector() -> None:
    """Low-order estimation: each derivative's own points and the new one."""
    step = StepDecision("data", 3, points=((-2,), (-2, -3)), corrector=Corrector())
    assert step.corrector_points() == ((-2,), (-2, -3), (-2, -3))
    assert StepDecision(corrector=Corrector(points=((),))).corrector_points() == ((),)


def _edit(schedule: SolverSchedule, rng: np.random.Generator) -> SolverSchedule:
    """One random change; the new decision is drawn for any history, so that it often does not fit."""
    kind, count = rng.integers(4), len(schedule.steps)
    index = int(rng.integers(count))
    wild = random_step(rng, int(rng.integers(1, 8)), last=False)
    if kind == 0:
        return with_step(schedule, index, wild)
    if kind == 1 and index > 0:
        low, high = schedule.times[index - 1], schedule.times[index + 1]
        return with_time(schedule, index, float(rng.uniform(low, high if high is not None else low + 1)))
    if kind == 2 and count < 9:
        low, high = schedule.times[index], schedule.times[index + 1]
        return insert_step(schedule, index + 1, float(rng.uniform(low, high if high is not None else low + 1)), wild)
    return delete_step(schedule, index) if index > 0 else schedule


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_ten_thousand_random_edits_stay_valid(seed: int) -> None:
    """Pitfall 10: 100 examples of 100 edits; every child compiles, no parent changes."""
    rng = np.random.default_rng(seed)
    schedule = random_schedule(rng, int(rng.integers(2, 7)), -3.0, 3.0)
    if rng.random() < 0.3:
        schedule = SolverSchedule((*schedule.times[:-1], None), (*schedule.steps[:-1], FIRST))
    for _ in range(100):
        before = copy.deepcopy(schedule)
        child = _edit(schedule, rng)
        assert schedule == before
        assert child.steps[-1].corrector is None
        finite = [time for time in child.times if time is not None]
        if min(np.diff(finite), default=1) > 1e-3:
            table = compile_schedule(child, VP)
            assert table.nfe == child.nfe and bool(table.weights.isfinite().all())
        schedule = child


def test_edits_leave_what_fits_alone() -> None:
    schedule = _schedule(FIRST, SECOND, SECOND, FIRST)
    changed = with_step(schedule, 2, StepDecision("noise", 3, points=nearest_points(3), scales=(LinearScale(0.1),)))
    assert changed.steps[:2] == schedule.steps[:2] and changed.steps[3] == schedule.steps[3]
    assert changed.steps[2].order == 3 and changed.steps[2].scales == (LinearScale(0.1),)
    shorter = delete_step(changed, 1)
    assert [step.order for step in shorter.steps] == [1, 2, 1]  # the step of order 3 has two evaluations left
    for index in (0, 4):
        with pytest.raises(ValueError, match="inner times"):
            delete_step(schedule, index)
    with pytest.raises(ValueError, match="must rise strictly"):
        with_time(schedule, 1, 99.0)
