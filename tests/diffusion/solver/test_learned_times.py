"""Times learned through a fixed solver: better than the hand-made ones, and with one time the best there is."""

from dataclasses import replace

import pytest
import torch
from diffusion.solver.tuning import EDM, FAMILIES, FLOW, VP, bank, family, problem

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.finetune import schedule_times
from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt, gradient_of
from genlight.diffusion.solver.learned_times import learn_times
from genlight.diffusion.solver.levels import in_half_log_snr
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.teacher import TuningProblem

QUICK = Adam(steps=50, learning_rate=0.1)


def rms(task: TuningProblem, schedule: SolverSchedule, seed: int | None = None) -> float:
    target = task.train if seed is None else bank(task.prediction, seed, 1024)
    return task.rms(compile_schedule(schedule, task.prediction.schedule), target)


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_better_than_even_log_snr_on_unseen_noise(prediction: Prediction) -> None:
    task, schedule = problem(prediction), named_schedule("dpmpp_2m", prediction.schedule, 5)
    for method in (QUICK, LevenbergMarquardt(iterations=8)):
        learned, record = learn_times(task, schedule, method)
        assert rms(task, learned, seed=2) * 1.2 < rms(task, schedule, seed=2)
        assert learned.steps == schedule.steps and learned.times[::5] == schedule.times[::5]
        table = compile_schedule(learned, prediction.schedule)
        assert task.rms(table, task.select) == pytest.approx(record.steps[-1].best_rms, rel=1e-9)


def test_one_free_time_is_the_best_of_a_fine_scan() -> None:
    """Two steps of DDIM: what is learned on the training bank is the minimum over all times, for both methods."""
    task = problem(VP, 64)
    task = replace(task, select=task.train)
    schedule = named_schedule("ddim", VP.schedule, 2)
    scan = [rms(task, replace(schedule, times=(999.0, time, 0.0))) for time in range(5, 995, 5)]
    for method in (Adam(steps=80, learning_rate=0.2), LevenbergMarquardt()):
        learned, _ = learn_times(task, schedule, method)
        assert rms(task, learned) < min(scan) * 1.001
        assert abs(learned.times[1] - (5 + 5 * scan.index(min(scan)))) < 15


def test_gradients_of_times() -> None:
    """Reverse mode against differences of the loss, through coefficients of third order."""
    task = problem(EDM, 16)
    schedule = named_schedule("dpmpp_3m_exact", EDM.schedule, 4)
    monotone, times = schedule_times(schedule, EDM.schedule)

    def table(raw: torch.Tensor):
        return compile_schedule(schedule, EDM.schedule, times=times(raw))

    raw = monotone.start + torch.tensor([0.1, -0.2, 0.05]).double()
    losses = [
        [task.rms(table(raw + sign * step), task.train) ** 2 for sign in (1, -1)]
        for step in 1e-5 * torch.eye(3).double()
    ]
    plain = torch.tensor([(up - down) / 2e-5 for up, down in losses], dtype=torch.float64)
    torch.testing.assert_close(gradient_of(task, table, raw), plain, rtol=1e-5, atol=1e-9)


def test_the_domain_of_the_times_does_not_matter() -> None:
    task, schedule = problem(VP, 32), named_schedule("dpmpp_2m", VP.schedule, 4)
    method = LevenbergMarquardt(iterations=3)
    one, _ = learn_times(task, schedule, method)
    other, _ = learn_times(task, in_half_log_snr(schedule, VP.schedule), method)
    assert other.time_domain == "half_log_snr"
    assert in_half_log_snr(one, VP.schedule).times == pytest.approx(other.times, rel=1e-6)


@pytest.mark.parametrize("prediction", [VP, FLOW], ids=family)
def test_infinite_ends(prediction: Prediction) -> None:
    """From pure noise and to the clean image: both stay what they are."""
    task = problem(prediction, 32)
    schedule = in_half_log_snr(named_schedule("dpmpp_2m", prediction.schedule, 4, end="clean"), prediction.schedule)
    assert schedule.times[-1] is None and (schedule.times[0] is None) == (prediction is FLOW)
    learned, record = learn_times(task, schedule, LevenbergMarquardt(iterations=3))
    assert record.best_step > 0
    assert (learned.times[0], learned.times[-1]) == (schedule.times[0], None)


def test_bad_calls() -> None:
    task = problem(VP, 4)
    with pytest.raises(ValueError, match="nothing is left to tune"):
        learn_times(task, named_schedule("ddim", VP.schedule, 1))
    with pytest.raises(ValueError, match="integer timesteps"):
        learn_times(
            replace(task, sampling=replace(task.sampling, integer_timesteps=True)),
            named_schedule("ddim", VP.schedule, 3),
        )


def test_the_start_is_kept_if_nothing_is_better() -> None:
    task, schedule = problem(VP, 16), named_schedule("dpmpp_2m", VP.schedule, 4)
    own = replace(task.select, target=task.sample(task.select, compile_schedule(schedule, VP.schedule)))
    learned, record = learn_times(replace(task, select=own), schedule, Adam(steps=4))
    assert learned is schedule and record.best_step == 0 and record.steps[0].select_rms == pytest.approx(0, abs=1e-9)
