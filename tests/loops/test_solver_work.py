"""Single pieces of S³'s work: what is refined and tuned, which rivals there are, what a picture of a metric says."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusion.solver.tuning import FLOW, VP, problem

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.fitting import LevenbergMarquardt
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.spacings import are_integers
from genlight.diffusion.solver.teacher import TuningProblem
from genlight.errors import UserError
from genlight.loops import solver_report
from genlight.loops.solver_outcome import save_outcome
from genlight.loops.solver_rivals import rival_schedules
from genlight.loops.solver_work import SolverWork, _refined, _tuned
from genlight.search.protocols import Evaluation
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

QUICK = LevenbergMarquardt(iterations=2)


def whole_problem() -> TuningProblem:
    """Of a network that looks its timesteps up."""
    task = problem(VP, 16)
    return replace(task, sampling=replace(task.sampling, integer_timesteps=True))


@pytest.mark.parametrize(
    ("prediction", "nfe", "options"),
    [
        pytest.param(VP, 3, {"genes": ("type", "order", "low_order", "corrector")}, id="no-times-and-no-factors"),
        pytest.param(FLOW, 1, {}, id="one-step-between-infinite-ends"),
        pytest.param(VP, 3, {"genes": ("times",), "integer_times": True}, id="whole-times-alone"),
        pytest.param(VP, 3, {"integer_times": True}, id="whole-times-and-no-derivatives"),
    ],
)
def test_a_schedule_of_which_nothing_can_move_stays(prediction: Prediction, nfe: int, options: dict[str, Any]) -> None:
    integers = bool(options.get("integer_times"))
    schedule = named_schedule("ddim", prediction.schedule, nfe, integer_times=integers)
    space = SolverScheduleSpace(prediction.schedule, nfe, **options)
    assert _refined(problem(prediction, 4), space, schedule, QUICK) is schedule


def test_whole_times_stay_where_factors_and_weights_are_fitted() -> None:
    task, schedule = whole_problem(), named_schedule("dpmpp_2m", VP.schedule, 4, integer_times=True)
    refined = _refined(task, SolverScheduleSpace(VP.schedule, 4, integer_times=True), schedule, QUICK)
    assert refined.times == schedule.times and refined.steps != schedule.steps
    _, record = _tuned(task, schedule, QUICK)
    table = record.table()
    assert tuple(table.times.tolist()) == schedule.times[:-1]


def test_one_evaluation_has_no_time_to_learn() -> None:
    found = rival_schedules(problem(VP, 16), "ddim/log_snr", named_schedule("ddim", VP.schedule, 1), "t_min")
    assert "GITS times (ddim)" in found and not any(name.startswith("learned times") for name in found)


def test_rivals_of_whole_times_have_whole_times() -> None:
    schedule = named_schedule("dpmpp_2m", VP.schedule, 3, integer_times=True)
    found = rival_schedules(whole_problem(), "dpmpp_2m/log_snr", schedule, "t_min")
    assert found and all(are_integers(rival.times) for rival in found.values())
    assert not any(name.startswith("learned times") for name in found)


@pytest.mark.parametrize(("mode", "label"), [("min", "val/is"), ("max", "-val/is")])
def test_a_search_curve_says_that_its_scores_are_negated(
    mode: str, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where more is better; scores are minimised."""
    labels = []
    monkeypatch.setattr(solver_report, "schedule_drawing", lambda *given: None)
    monkeypatch.setattr(solver_report, "search_curve", lambda *given, ylabel: labels.append(ylabel))
    work: Any = SimpleNamespace(
        evaluations=SimpleNamespace(trainer=SimpleNamespace(default_root_dir=str(tmp_path))),
        module=SimpleNamespace(prediction=VP),
        method=SimpleNamespace(mode=mode, objective="val/is"),
        by_teacher=False,
        results={4: SimpleNamespace(records=[])},
    )
    solver_report._pictures(work, [], [])
    assert labels == [label]


def test_a_search_that_ended_before_a_full_measurement_is_told() -> None:
    space = SolverScheduleSpace(VP.schedule, 3)
    task: Any = SimpleNamespace(problem=SimpleNamespace(space=space, fidelity=256))
    screened = SimpleNamespace(fidelity=64, score=1.0, rank=1.0, key="")
    work: Any = SimpleNamespace(hand_made=lambda nfe: [])
    with pytest.raises(UserError, match=r"no hand-made schedule of 3 evaluations was measured on 256 samples"):
        SolverWork._choose(work, task, SimpleNamespace(records=[screened]))  # type: ignore[arg-type]


def choosing(evaluate: Any) -> tuple[Any, Any, Any]:
    """Work by a metric, its task, and the records of a hand-made schedule and of two that are better by their score."""
    space, steps = SolverScheduleSpace(VP.schedule, 3), ("ddim", "dpmpp_2m", "deis_2")
    schedules = [named_schedule(solver, VP.schedule, 3) for solver in steps]
    records = [
        SimpleNamespace(fidelity=8, score=3.0 - i, rank=3.0 - i, key=space.key(each), candidate=each, index=i)
        for i, each in enumerate(schedules)
    ]
    timing, display = (lambda name: nullcontext()), SimpleNamespace(counted=iter)
    method: Any = SimpleNamespace(settings=SimpleNamespace(finalists=2), noise=SimpleNamespace(select=8))
    evaluations: Any = SimpleNamespace(shares=1, timing=timing, display=display)
    work: Any = SimpleNamespace(method=method, evaluations=evaluations, by_teacher=False)
    work.hand_made = lambda nfe: [("ddim", schedules[0])]
    work.metric = lambda space, draw: SimpleNamespace(evaluate=lambda each, count: evaluate(schedules.index(each)))
    work.judge = partial(SolverWork.judge, work)
    return work, SimpleNamespace(problem=SimpleNamespace(space=space, fidelity=8)), SimpleNamespace(records=records)


@pytest.mark.parametrize("raises", [False, True])
def test_a_finalist_that_fails_is_not_chosen(raises: bool, tmp_path: Path) -> None:
    """The last record is best on the search draw; on the select draw it has no score."""

    def evaluate(index: int) -> Evaluation:
        if index == 2 and raises:
            raise FloatingPointError("the features are not finite")
        return Evaluation((2.0, 1.0, float("nan"))[index], {})

    work, task, result = choosing(evaluate)
    found = SolverWork._choose(work, task, result)
    assert found.evolved == result.records[1].candidate and found.select == {"baseline": 2.0, "evolved": 1.0}
    save_outcome(tmp_path / "outcome.json", found, "of this")
    assert (tmp_path / "outcome.json").is_file()


@pytest.mark.parametrize(("broken", "expected"), [((0,), "no hand-made schedule of 3"), ((1, 2), "no finalist of 3")])
def test_where_none_can_be_measured_again_it_is_told(broken: tuple[int, ...], expected: str) -> None:
    work, task, result = choosing(lambda index: Evaluation(float("nan") if index in broken else 1.0, {}))
    with pytest.raises(UserError, match=f"{expected} evaluations could be measured on the select noise"):
        SolverWork._choose(work, task, result)
