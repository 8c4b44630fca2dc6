"""Fine-tuned tables: nearer to the teacher on noise they have not seen, by gradients that are right."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network
from diffusion.solver.tuning import EDM, FAMILIES, FLOW, VP, bank, family, problem
from oracles.gaussian import two_modes
from torch import Tensor, nn

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision
from genlight.diffusion.solver.finetune import MonotoneTimes, _TableSpace, finetune
from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt, gradient_of
from genlight.diffusion.solver.jacobian import normal_equations
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.serialization import SolverBank, TableRecord, bank_from_json
from genlight.diffusion.solver.spacings import on_integers
from genlight.diffusion.solver.teacher import NetworkSampling, TeacherBank, TuningProblem

METHODS = [LevenbergMarquardt(iterations=15), Adam(steps=60, learning_rate=0.04, batch_size=64)]


def start_of(prediction: Prediction, nfe: int = 5) -> tuple[SolverSchedule, SolverTable]:
    schedule = named_schedule("dpmpp_2m", prediction.schedule, nfe)
    return schedule, compile_schedule(schedule, prediction.schedule)


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
@pytest.mark.parametrize("method", METHODS, ids=["lm", "adam"])
def test_nearer_to_the_teacher_on_unseen_noise(prediction: Prediction, method: LevenbergMarquardt | Adam) -> None:
    """From DPM-Solver++(2M) at 5 evaluations, from the schedule and from its table alone."""
    task, unseen, told = problem(prediction), bank(prediction, 2, 1024), []
    schedule, table = start_of(prediction)
    tuned, record = finetune(task, schedule, method, progress=told.append)
    factor = 2.0 if isinstance(method, LevenbergMarquardt) else 1.7
    assert task.rms(tuned, unseen) * factor < task.rms(table, unseen)
    assert list(record.steps) == told and record.steps[0].step == 0
    best = min(record.steps, key=lambda step: step.select_rms)
    assert record.best_step == best.step > 0
    assert task.rms(tuned, task.select) == pytest.approx(best.select_rms, rel=1e-12)
    assert [step.best_rms for step in record.steps] == np.minimum.accumulate(
        [s.select_rms for s in record.steps]
    ).tolist()
    assert not tuned.weights.requires_grad and torch.equal(tuned.times[0], table.times[0])
    assert bool((tuned.times.diff() < 0).all())


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_a_table_alone_can_start(prediction: Prediction) -> None:
    task, unseen, (_, table) = problem(prediction), bank(prediction, 2, 1024), start_of(prediction)
    tuned, _ = finetune(task, table, LevenbergMarquardt(iterations=15))
    assert task.rms(tuned, unseen) * 2 < task.rms(table, unseen)


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_gradients(prediction: Prediction, basis: str) -> None:
    """Reverse mode, the Jacobian of Levenberg-Marquardt, and plain differences of the loss are one gradient."""
    if basis == "noise" and prediction is FLOW:
        basis = "data"
    task, schedule = problem(prediction, 16, batch_rows=70), start_of(prediction, 4)[0]
    starts = (schedule, compile_schedule(schedule, prediction.schedule, basis=basis))
    for start in starts:
        space = _TableSpace(start, prediction.schedule, weights=True, times=True)
        raw = space.start + 0.02 * torch.randn(len(space.start), generator=torch.Generator().manual_seed(3)).double()
        reverse = gradient_of(task, space.table, raw)
        torch.testing.assert_close(reverse, gradient_of(task, space.table, raw, checkpointing=False))
        _, slope = normal_equations(task, space.table, raw)
        torch.testing.assert_close(2 * slope, reverse, rtol=1e-5, atol=1e-6 * reverse.abs().max().item())
        steps = 1e-5 * torch.eye(len(raw)).double()
        loss = [[task.rms(space.table(raw + sign * step), task.train) ** 2 for sign in (1, -1)] for step in steps]
        plain = torch.tensor([(up - down) / 2e-5 for up, down in loss], dtype=torch.float64)
        torch.testing.assert_close(plain, reverse, rtol=1e-4, atol=1e-6 * reverse.abs().max().item())


def test_curvature_is_that_of_the_residuals() -> None:
    """JᵀJ against the Jacobian of the samples by autograd, for any chunks of the bank."""
    task, schedule = problem(VP, 12), start_of(VP, 4)[0]
    space = _TableSpace(schedule, VP.schedule, weights=True, times=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda raw: task.sample(task.train, space.table(raw)).flatten(), space.start
    )
    wanted = jacobian.T @ jacobian / task.train.target.numel()
    for rows in (1, 100, 4096):
        found, _ = normal_equations(replace(task, batch_rows=rows), space.table, space.start)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_both_methods_remove_the_same_error() -> None:
    """Their samples move the same way, which is towards the teacher."""
    task, (schedule, table) = problem(VP), start_of(VP)
    before, moves = task.sample(task.select, table), []
    for method in METHODS:
        tuned, _ = finetune(task, schedule, method)
        moves.append((task.sample(task.select, tuned) - before).flatten())
    wanted = (task.select.target - before).flatten()
    for a, b in ((moves[0], moves[1]), (moves[0], wanted), (moves[1], wanted)):
        assert torch.cosine_similarity(a, b, dim=0) > 0.8


@pytest.mark.parametrize("method", METHODS, ids=["lm", "adam"])
def test_the_same_call_gives_the_same_table(method: LevenbergMarquardt | Adam) -> None:
    task, (schedule, _) = problem(EDM, 32), start_of(EDM, 4)
    method = replace(
        method, **({"iterations": 3} if isinstance(method, LevenbergMarquardt) else {"steps": 8, "batch_size": 8})
    )
    (one, first), (two, second) = (finetune(task, schedule, method) for _ in range(2))
    assert torch.equal(one.weights, two.weights) and torch.equal(one.times, two.times) and first == second


def test_numbers_of_parameters() -> None:
    for nfe, count in ((4, 17), (5, 24), (6, 32)):
        for start in start_of(VP, nfe):
            assert len(_TableSpace(start, VP.schedule, weights=True, times=True).start) == count
            assert len(_TableSpace(start, VP.schedule, weights=False, times=True).start) == nfe - 1


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
@pytest.mark.parametrize("name", ["unipc_3_bh2", "heun", "dpmpp_2s", "ddim"])
@pytest.mark.parametrize("end", ["t_min", "clean"])
def test_parameters_begin_at_the_start(prediction: Prediction, name: str, end: str) -> None:
    if name == "heun" and prediction is FLOW:
        name = "flow_heun"
    schedule = named_schedule(name, prediction.schedule, 5, end=end)
    table = compile_schedule(schedule, prediction.schedule)
    for start in (schedule, table):
        space = _TableSpace(start, prediction.schedule, weights=True, times=True)
        again = space.table(space.start)
        torch.testing.assert_close(again.weights, table.weights, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(again.times, table.times, rtol=1e-12, atol=1e-12)
        moved = space.table(space.start + torch.linspace(-0.5, 0.5, len(space.start)).double())
        assert torch.equal(moved.times.diff() == 0, table.times.diff() == 0), "coinciding times stay together"
        assert bool((moved.times.diff() <= 0).all())


def test_only_what_is_asked_for_changes() -> None:
    task, (schedule, table) = problem(VP, 32), start_of(VP, 4)
    method = LevenbergMarquardt(iterations=3)
    tuned, _ = finetune(task, schedule, method, times=False)
    assert torch.equal(tuned.times, table.times) and not torch.equal(tuned.weights, table.weights)
    assert torch.equal(tuned.weights[0], table.weights[0])
    tuned, _ = finetune(task, table, method, weights=False)
    assert torch.equal(tuned.weights, table.weights) and not torch.equal(tuned.times, table.times)
    # after an analytical first step the first evaluation is not at x_T: its row may change
    early = SolverSchedule((-4.0, -1.0, 1.0, 4.0), (StepDecision(),) * 3, afs="zero")
    tuned, record = finetune(task, early, method)
    assert record.best_step > 0 and tuned.weights[0, 0] != compile_schedule(early, VP.schedule).weights[0, 0]


def test_nothing_better_keeps_the_start() -> None:
    """A student that is its own teacher; then one whose selection bank says something else than the training bank."""
    task, (schedule, table) = problem(VP, 16), start_of(VP, 4)
    own = TeacherBank.of(task.sampling, task.train.noise, table)
    for method in (LevenbergMarquardt(iterations=3), Adam(steps=4)):
        tuned, record = finetune(replace(task, train=own, select=own), schedule, method)
        assert record.best_step == 0 and record.steps[0].select_rms < 1e-9
        torch.testing.assert_close(tuned.weights, table.weights, rtol=1e-9, atol=1e-11)
        tuned, record = finetune(replace(task, select=own), schedule, method)
        assert record.best_step == 0 and len(record.steps) > 1


def test_stored_and_read_again() -> None:
    task, (schedule, _) = problem(VP, 32), start_of(VP, 4)
    tuned, _ = finetune(task, schedule, LevenbergMarquardt(iterations=3))
    stored = replace(SolverBank.of(VP, {4: schedule}), tables={4: TableRecord.of(tuned)}).to_json()
    read = bank_from_json(stored).tables[4].table()
    assert torch.equal(task.sample(task.select, read), task.sample(task.select, tuned))


def test_conditions_go_with_their_rows() -> None:
    """A condition that scales the data: banks in chunks, several tables at once and batches in any order agree."""
    ideal = network(VP, two_modes())

    def model(x: Tensor, timestep: Tensor, *, gain: Tensor) -> Tensor:
        assert gain.shape == (len(x), 1)
        return gain * ideal(x, timestep)

    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = compile_schedule(named_schedule("dpmpp_2m", VP.schedule, 40), VP.schedule)
    conditions = {"gain": torch.linspace(0.9, 1.1, 40, dtype=torch.float64)[:, None]}
    whole, parts = (
        TeacherBank.of(NetworkSampling(model, VP), noise, teacher, conditions=conditions, batch_rows=rows)
        for rows in (40, 7)
    )
    torch.testing.assert_close(whole.target, parts.target)
    task, (schedule, _) = TuningProblem(NetworkSampling(model, VP), whole, whole), start_of(VP, 4)
    space = _TableSpace(schedule, VP.schedule, weights=True, times=True)
    gradient = gradient_of(task, space.table, space.start, torch.arange(39, -1, -1))
    torch.testing.assert_close(gradient, gradient_of(replace(task, batch_rows=9), space.table, space.start))
    _, slope = normal_equations(replace(task, batch_rows=70), space.table, space.start)
    torch.testing.assert_close(2 * slope, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


class _Network(nn.Module):
    """A small noise predictor on two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = (timestep / 1000)[:, None]
        return x + self.body(torch.cat([x, time, (8 * time).sin()], dim=1))


def trained_network() -> _Network:
    torch.manual_seed(0)
    model, generator = _Network(), torch.Generator().manual_seed(0)
    data = two_modes().sample(4096, generator).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(700):
        rows = torch.randint(4096, (128,), generator=generator)
        noise, t = torch.randn(128, 2, generator=generator), torch.rand(128, generator=generator) * 999
        x = VP.schedule.add_noise(data[rows], noise, t)
        optimizer.zero_grad()
        (model(x, t) - noise).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def test_a_trained_network_in_float32() -> None:
    """Both methods, called from inference mode; the network's own parameters are left alone."""
    with torch.random.fork_rng():
        model = trained_network()
    (schedule, table) = start_of(VP)
    teacher = compile_schedule(named_schedule("dpmpp_3m_exact", VP.schedule, 100), VP.schedule)
    sampling = NetworkSampling(model, VP)
    with torch.inference_mode():
        banks = [
            TeacherBank.of(sampling, torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)), teacher)
            for seed, count in ((0, 192), (1, 192), (2, 768))
        ]
        task = TuningProblem(sampling, banks[0], banks[1])
        for method, factor in zip(METHODS, (2.0, 1.5)):
            tuned, record = finetune(task, schedule, method)
            assert task.rms(tuned, banks[2]) * factor < task.rms(table, banks[2]), record.method
    assert all(parameter.grad is None for parameter in model.parameters())


def test_integer_timesteps() -> None:
    """Weights can be tuned for a network that looks its timesteps up; times have no gradient there."""
    ideal, seen = network(VP, two_modes()), []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep.dtype)
        return ideal(x, timestep)

    schedule, _ = start_of(VP, 4)
    whole = replace(schedule, times=on_integers(schedule.times))
    task = replace(problem(VP, 32), sampling=NetworkSampling(model, VP, integer_timesteps=True))
    _, record = finetune(task, whole, LevenbergMarquardt(iterations=3), times=False)
    assert record.best_step > 0 and set(seen) == {torch.int64}
    with pytest.raises(ValueError, match="integer timesteps"):
        finetune(task, whole)
    table = compile_schedule(whole, VP.schedule)
    own = TeacherBank.of(task.sampling, task.train.noise, table)
    assert task.rms(table, own) == 0.0


def test_what_is_not_finite() -> None:
    task, (schedule, _) = problem(VP, 16), start_of(VP, 4)
    with pytest.raises(ValueError, match="not finite"):
        finetune(replace(task, sampling=NetworkSampling(lambda x, t: x * torch.nan, VP)), schedule)

    class Fragile(torch.autograd.Function):
        """Right forwards, nan backwards."""

        @staticmethod
        def forward(context, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context, gradient: Tensor) -> Tensor:
            return gradient * torch.nan

    model = task.sampling.model
    fragile = replace(task, sampling=NetworkSampling(lambda x, t: model(Fragile.apply(x), t), VP))
    tuned, record = finetune(fragile, schedule, Adam(steps=5))
    assert record.refused == 5 and record.best_step == 0 and bool(tuned.weights.isfinite().all())
    assert finetune(fragile, schedule, LevenbergMarquardt(iterations=2))[1].best_step > 0


def test_bad_calls() -> None:
    task, (schedule, table) = problem(VP, 4), start_of(VP, 4)
    with pytest.raises(ValueError, match="nothing is left to tune"):
        finetune(task, schedule, weights=False, times=False)
    with pytest.raises(ValueError, match="learning_rate = 0"):
        Adam(learning_rate=0)
    with pytest.raises(ValueError, match="need one shape"):
        TeacherBank(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="condition 'label' has 2 rows for 3"):
        TeacherBank(torch.zeros(3, 2), torch.zeros(3, 2), {"label": torch.zeros(2)})
    with pytest.raises(ValueError, match="target is not finite"):
        TeacherBank.of(NetworkSampling(lambda x, t: x * torch.nan, VP), torch.ones(3, 2), table)
    with pytest.raises(ValueError, match="batch_rows = 0"):
        replace(task, batch_rows=0)
    with pytest.raises(ValueError, match="must be finite and rise"):
        MonotoneTimes(torch.tensor([0.0, 2.0, 1.0]).double())
    assert sample(task.sampling.model, task.train.noise, table, VP).shape == (4, 2)


def test_monotone_times() -> None:
    values = torch.tensor([-4.0, -3.9, -1.0, -1.0, 2.0, 5.0, 5.0], dtype=torch.float64)
    monotone = MonotoneTimes(values)
    assert len(monotone.start) == 3  # four gaps are open, the last of them is not free
    torch.testing.assert_close(monotone(monotone.start), values)
    for scale in (0.1, 3.0, 30.0):
        raw = scale * torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        moved = monotone(raw)
        assert moved[0] == -4 and moved[-1] == 5 and bool((moved.diff() >= 0).all())
        assert moved[2] == moved[3] and moved[5] == moved[6]
        assert torch.autograd.gradcheck(monotone, raw.requires_grad_())
