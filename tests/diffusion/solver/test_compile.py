"""The compiled table against the eager solver, and what a table must be."""

import math

import numpy as np
import pytest
import torch
from diffusion.solver import eager
from diffusion.solver.mixture import MIXTURE, random_schedule, random_step, solve

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import Corrector, LinearScale, SolverSchedule, StepDecision, nearest_points

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule(shift=3.0)
RANGES = [(VP, -4.5, 4.0), (EDM, -4.3, 6.0), (FLOW, -4.0, 4.0)]


def _x0(x: np.ndarray, alpha: float, sigma: float, call: int) -> np.ndarray:
    return MIXTURE.x0(torch.from_numpy(x)[:, None], alpha, sigma).numpy()[:, 0]


def _table_result(schedule: SolverSchedule, noise_schedule: NoiseSchedule, x: np.ndarray, mean: float, basis: str):
    """(result, evaluations, size of the largest terms added) of the weighted sums with the ideal network, in numpy."""
    table = compile_schedule(schedule, noise_schedule, basis=basis)
    weights, outputs, size = table.weights.numpy(), [], 1.0
    for i in range(table.nfe + 1):
        point = weights[i, 0] * x + table.mean_weights[i].item() * mean
        point = point + sum((weights[i, 1 + j] * output for j, output in enumerate(outputs)), np.zeros_like(x))
        if i == table.nfe:
            return point, table.nfe, max(size, np.abs(point).max()) * max(1.0, np.abs(weights).max())
        alpha, sigma = noise_schedule.alpha(table.times[i].item()), noise_schedule.sigma(table.times[i].item())
        data = _x0(point, alpha, sigma, i)
        size = max(size, np.abs(point).max(), np.abs((point - alpha * data) / sigma).max())
        outputs.append(data if basis == "data" else (point - alpha * data) / sigma)
    raise AssertionError


@pytest.mark.parametrize("noise_schedule, low, high", RANGES, ids=["vp", "edm", "flow"])
def test_table_equals_eager_on_random_schedules(noise_schedule: NoiseSchedule, low: float, high: float) -> None:
    """Pitfalls 1, 3 and 4: any confusion of points, signs or predicted and corrected x shows here."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        afs = ("zero", "mean", None, None)[trial % 4]
        schedule = random_schedule(rng, int(rng.integers(2 if afs else 1, 8)), low, high, afs=afs)
        x = rng.normal(size=3) * math.exp(max(-low, 0)) * noise_schedule.alpha(noise_schedule.t_of_half_log_snr(low))
        expected, calls = eager.run(schedule, noise_schedule, x, _x0, mean=0.3)
        for basis in ("data", "noise"):
            found, nfe, size = _table_result(schedule, noise_schedule, x, 0.3, basis)
            # the noise basis multiplies rounding errors by up to σ/α of the start, which the network passes on
            tolerance = 1e-12 if basis == "data" else 1e-9
            np.testing.assert_allclose(found / size, expected / size, rtol=0, atol=tolerance, err_msg=str(schedule))
            assert nfe == calls == schedule.nfe


def test_table_equals_eager_with_fixed_outputs() -> None:
    """With outputs that do not depend on x nothing hides a wrong weight, and nothing magnifies rounding."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        schedule = random_schedule(rng, int(rng.integers(1, 8)), -3.0, 3.0)
        table, x = compile_schedule(schedule, VP), rng.normal(size=2)
        outputs = rng.normal(size=(table.nfe, 2))
        expected, _ = eager.run(schedule, VP, x, lambda x, alpha, sigma, call, outputs=outputs: outputs[call])
        found = table.weights.numpy()[-1] @ np.vstack([x, outputs])
        size = max(1.0, np.abs(table.weights.numpy()).max())
        np.testing.assert_allclose(found / size, expected / size, rtol=0, atol=1e-12, err_msg=str(schedule))


def test_flow_from_pure_noise_to_the_clean_image() -> None:
    """Both infinite ends, with history points at λ = -inf and both variables."""
    rng = np.random.default_rng(2)
    for trial in range(60):
        steps = int(rng.integers(2, 7))
        times = (1.0, *sorted(rng.uniform(0.02, 0.98, size=steps - 1).tolist(), reverse=True), 0.0)
        decisions = [random_step(rng, i + 1, i == steps - 1, noise=i > 0) for i in range(steps)]
        # noise above order 1 starts from a finite λ, and λ ends before the clean image
        decisions = [
            step if step.prediction == "data" or -step.source <= i else StepDecision("data")
            for i, step in enumerate(decisions)
        ]
        decisions[-1] = (
            StepDecision("data", 2, points=((-2,),), variable="sigma") if trial % 2 else StepDecision("noise")
        )
        schedule = SolverSchedule(times, tuple(decisions), time_domain="time")
        table, x = compile_schedule(schedule, FLOW), rng.normal(size=2)
        assert table.weights.isfinite().all()
        outputs = rng.normal(size=(table.nfe, 2))
        expected, _ = eager.run(schedule, FLOW, x, lambda x, alpha, sigma, call, outputs=outputs: outputs[call])
        found = table.weights.numpy()[-1] @ np.vstack([x, outputs])
        size = max(1.0, np.abs(table.weights.numpy()).max())
        np.testing.assert_allclose(found / size, expected / size, rtol=0, atol=1e-11, err_msg=str(schedule))


def test_polynomials_are_integrated_exactly() -> None:
    """Data that is a polynomial in λ of degree < n: order n gives ∫ e^λ p(λ) dλ to rounding."""
    times = (-2.0, -1.1, -0.3, 0.8, 1.4)
    for n in (1, 2, 3, 4):
        steps = [StepDecision("data", min(n, i + 1), points=nearest_points(min(n, i + 1))) for i in range(4)]
        table = compile_schedule(SolverSchedule(times, tuple(steps)), VP)
        coefficients = np.array([0.7, -0.4, 0.3, 0.2])[:n]
        outputs = np.polynomial.Polynomial(coefficients)(np.array(times[:4]))
        before = table.weights[3].numpy() @ np.concatenate([[0.0], outputs])
        after = table.weights[4].numpy() @ np.concatenate([[0.0], outputs])
        nodes, weights = np.polynomial.legendre.leggauss(40)
        lam = 1.1 + 0.3 * nodes
        integral = np.sum(0.3 * weights * np.exp(lam) * np.polynomial.Polynomial(coefficients)(lam))
        sigma = [VP.sigma(VP.t_of_half_log_snr(t)) for t in times]
        assert after == pytest.approx(sigma[4] / sigma[3] * before + sigma[4] * integral, rel=1e-11)


def test_sigma_variable_is_exact_for_polynomials_in_sigma_up_to_both_ends() -> None:
    """Pitfall 7: with data linear in σ, order 2 makes no error, to the clean image included."""
    schedule = SolverSchedule(
        (1.0, 0.6, 0.3, 0.0),
        (
            StepDecision("data"),
            *[StepDecision("data", 2, points=((-2,),), variable="sigma")] * 2,
        ),
        time_domain="time",
    )
    table = compile_schedule(schedule, FLOW)
    sigma = np.array([1.0, 0.6, 0.3])
    outputs = 2.0 - 0.7 * sigma
    row = table.weights[2].numpy() @ np.concatenate([[0.0], outputs])
    final = table.weights[3].numpy() @ np.concatenate([[0.0], outputs])
    # x(σ)/σ changes by ∫ x̂_0(σ) d(1/σ - 1) = ∫ (2 - 0.7 σ)/σ² dσ; σ/σ_s → 0 leaves the value of x̂_0 at 0
    start = table.weights[1].numpy() @ np.concatenate([[0.0], outputs])
    assert row == pytest.approx(0.5 * start + 0.3 * (2 * (1 / 0.3 - 1 / 0.6) - 0.7 * math.log(2)), rel=1e-13)
    assert final == pytest.approx(2.0, rel=1e-13)


def test_many_steps_stay_accurate() -> None:
    """Pitfall 5: 100 steps of order 4 in float64 come within rounding of the eager solver."""
    times = tuple(np.linspace(-4.5, 4.0, 101).tolist())
    steps = tuple(StepDecision("data", min(4, i + 1), points=nearest_points(min(4, i + 1))) for i in range(100))
    schedule, x = SolverSchedule(times, steps), np.array([-1.0, 0.1, 1.0])
    expected, _ = eager.run(schedule, VP, x, _x0)
    found, *_ = _table_result(schedule, VP, x, 0.0, "data")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("noise_schedule, domain", [(VP, "half_log_snr"), (FLOW, "time"), (EDM, "half_log_snr")])
def test_gradients_of_times(noise_schedule: NoiseSchedule, domain: str) -> None:
    rng = np.random.default_rng(3)
    schedule = random_schedule(rng, 5, -3.0, 3.5)
    if domain == "time":
        times = (1.0, *(noise_schedule.t_of_half_log_snr(t) for t in schedule.times[1:-1]), 0.0)
        steps = (
            StepDecision("data"),
            *(random_step(rng, i + 1, i == 4, noise=False) for i in range(1, 4)),
            StepDecision(),
        )
        steps = tuple(step if -step.source <= i else StepDecision() for i, step in enumerate(steps))
        schedule = SolverSchedule(times, steps, time_domain="time")
    given = torch.tensor(schedule.times, dtype=torch.float64)

    def weights(inner: torch.Tensor) -> torch.Tensor:
        times = torch.cat([given[:1], inner, given[-1:]])
        table = compile_schedule(schedule, noise_schedule, times=times)
        return torch.cat([table.weights.flatten(), table.times])

    same = compile_schedule(schedule, noise_schedule)
    torch.testing.assert_close(
        weights(given[1:-1])[: same.weights.numel()], same.weights.flatten(), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(weights, given[1:-1].clone().requires_grad_(), eps=1e-6, atol=1e-4, rtol=1e-4)


def test_initial_scale_is_that_of_diffusers() -> None:
    for noise_schedule in (VP, EDM, FLOW):
        times = (noise_schedule.t_max, noise_schedule.t_min)
        table = compile_schedule(SolverSchedule(times, (StepDecision(),), time_domain="time"), noise_schedule)
        assert table.initial_scale == pytest.approx(noise_schedule.init_noise_sigma, rel=1e-12)


def test_clean_end_of_order_one_is_the_predicted_data() -> None:
    """Section 2.4: at σ = 0 the noise form has a limit, and both forms give α x̂_0."""
    for kind in ("noise", "data"):
        schedule = SolverSchedule((-2.0, 0.0, None), (StepDecision("data"), StepDecision(kind)))
        x = torch.tensor([[0.4], [-0.9]]).double()
        prediction = Prediction("epsilon", VP)
        table = compile_schedule(schedule, VP)
        middle = table.weights[1]
        final = solve(schedule, prediction, x)
        t0, t1 = table.times.tolist()
        point = middle[0] * x + middle[1] * MIXTURE.x0(x, VP.alpha(t0), VP.sigma(t0))
        torch.testing.assert_close(final, MIXTURE.x0(point, VP.alpha(t1), VP.sigma(t1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind, sign", [("noise", 1.0), ("data", -1.0)])
def test_signs_of_h_in_scales(kind: str, sign: float) -> None:
    """Pitfall 3: named scales take z = h for noise and -h for data, the linear one h for both."""
    h = 1.2
    values = {
        LinearScale(0.1): 1 + 0.1 * h,
        "exp": 1 + 0.5 * math.expm1(sign * h),
        "minus_exp": 1 - 0.5 * math.expm1(sign * h),
        "bh2": 0.5 * sign * h * math.expm1(sign * h) / (math.expm1(sign * h) - sign * h),
        "bh1": 0.5 * h**2 / (math.expm1(sign * h) - sign * h),
    }
    for scale, value in values.items():
        tables = [
            compile_schedule(
                SolverSchedule(
                    (-1.0, 0.0, h), (StepDecision(kind), StepDecision(kind, 2, points=((-2,),), scales=(factor,)))
                ),
                VP,
            )
            for factor in (scale, value)
        ]
        torch.testing.assert_close(tables[0].weights, tables[1].weights, rtol=1e-13, atol=1e-14)


def test_corrected_steps_store_the_predicted_output() -> None:
    """Pitfall 4: a pseudo corrector changes where the next step starts, not what was evaluated."""
    step = StepDecision("noise", corrector=Corrector(scales=("bh2",)))
    schedule = SolverSchedule((-1.0, 0.0, 1.0), (step, StepDecision("noise", 2, points=((-2,),))))
    plain = SolverSchedule((-1.0, 0.0, 1.0), (StepDecision("noise"), StepDecision("noise", 2, points=((-2,),))))
    corrected, uncorrected = compile_schedule(schedule, VP), compile_schedule(plain, VP)
    torch.testing.assert_close(corrected.weights[:2], uncorrected.weights[:2], rtol=0, atol=0)
    assert (corrected.weights[2] - uncorrected.weights[2]).abs().max() > 0.01


def test_bad_tables() -> None:
    good = compile_schedule(SolverSchedule((-1.0, 1.0), (StepDecision(),)), VP)
    with pytest.raises(ValueError, match="lower-triangular"):
        SolverTable(torch.ones(2, 2).double(), good.mean_weights, good.times, "data", 1.0)
    with pytest.raises(ValueError, match="not \\[E"):
        SolverTable(good.weights, good.mean_weights, torch.zeros(3).double(), "data", 1.0)
    with pytest.raises(ValueError, match="basis"):
        compile_schedule(SolverSchedule((-1.0, 1.0), (StepDecision(),)), VP, basis="score")
