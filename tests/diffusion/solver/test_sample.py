"""Sampling with tables: any rank, exact counts, several schedules at once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import random_schedule
from torch import Tensor

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample, sample_many

VP, EDM, FLOW = VPSchedule(), EDMSchedule(), FlowSchedule(shift=3.0)
CASES = [
    *[Prediction(p, VP) for p in ("epsilon", "v_prediction", "sample")],
    Prediction("edm", EDM),
    *[Prediction(p, FLOW) for p in ("flow", "v_prediction", "sample")],
]


class Network:
    """An elementwise network that counts its calls and rows."""

    def __init__(self) -> None:
        self.calls, self.rows = 0, 0

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        assert timestep.shape == (len(x),)
        self.calls += 1
        self.rows += len(x)
        return torch.tanh(x * 0.7 + timestep.reshape(-1, *[1] * (x.ndim - 1)) / 1000)


@pytest.mark.parametrize("prediction", CASES, ids=lambda p: f"{p.schedule.family}-{p.prediction_type}")
def test_any_rank_gives_the_same_numbers(prediction: Prediction) -> None:
    table = compile_schedule(named_schedule("dpmpp_2m", prediction.schedule, 5), prediction.schedule)
    flat = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    expected = sample(Network(), flat, table, prediction)
    assert expected.dtype == torch.float32 and bool(expected.isfinite().all())
    for shape in ((2, 3, 8), (2, 3, 2, 4), (2, 3, 2, 2, 2)):
        found = sample(Network(), flat.reshape(shape), table, prediction)
        assert torch.equal(found, expected.reshape(shape))
    # float64 noise is sampled in float64, half precision in float32
    wide = sample(Network(), flat.double(), table, prediction)
    torch.testing.assert_close(wide.float(), expected, rtol=1e-4, atol=1e-4)
    assert wide.dtype == torch.float64
    assert sample(Network(), flat.bfloat16(), table, prediction).dtype == torch.float32


def test_declared_evaluations_are_counted_ones() -> None:
    """Pitfall 6: a counting network on 1000 random schedules."""
    rng, prediction, noise = np.random.default_rng(0), Prediction("epsilon", VP), torch.zeros(1, 1).double()
    for trial in range(1000):
        afs = ("zero", "mean", None)[trial % 3]
        schedule = random_schedule(rng, int(rng.integers(2 if afs else 1, 6)), -3.0, 3.0, afs=afs)
        network = Network()
        table = compile_schedule(schedule, VP)
        sample(network, noise, table, prediction, mean=torch.zeros(1) if afs == "mean" else None)
        assert network.calls == network.rows == schedule.nfe == table.nfe


@pytest.mark.parametrize("prediction", CASES, ids=lambda p: f"{p.schedule.family}-{p.prediction_type}")
def test_many_schedules_at_once(prediction: Prediction) -> None:
    """Equal to one by one; the first evaluation, which all share, is made once."""
    names = ("dpmpp_2m", "unipc_3_bh2", "dpmpp_3m_exact", "ddim")
    schedules = [named_schedule(name, prediction.schedule, 6) for name in names]
    schedules.append(named_schedule("dpmpp_2m", prediction.schedule, 6, spacing="quadratic"))
    tables = [compile_schedule(schedule, prediction.schedule) for schedule in schedules]
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    network = Network()
    found = sample_many(network, noise, tables, prediction)
    assert network.calls == 6 and network.rows == 3 + 5 * 5 * 3
    assert found.shape == (5, 3, 2, 4, 4)
    for one, table in zip(found, tables):
        torch.testing.assert_close(one, sample(Network(), noise, table, prediction), rtol=1e-6, atol=1e-6)
    same = sample_many(Network(), noise, [tables[0]] * 3, prediction)
    assert same.shape == (3, *noise.shape) and torch.equal(same[0], same[2])


def test_equal_weights_at_other_times_are_not_shared() -> None:
    prediction = Prediction("epsilon", VP)
    table = compile_schedule(named_schedule("ddim", VP, 3), VP)
    other = replace(table, times=table.times - torch.tensor([0.0, 20.0, 0.0]))
    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    found = sample_many(Network(), noise, [table, other], prediction)
    torch.testing.assert_close(found[1], sample(Network(), noise, other, prediction))
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_conditions_follow_the_schedules_outermost() -> None:
    prediction, labels = Prediction("epsilon", VP), torch.tensor([0.0, 1.0, 2.0])
    tables = [compile_schedule(named_schedule("ddim", VP, 3, spacing=s), VP) for s in ("uniform", "log_snr")]
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x) + labels.repeat(len(x) // 3)[:, None]

    found = sample_many(model, noise, tables, prediction)
    for one, table in zip(found, tables):
        torch.testing.assert_close(one, sample(model, noise, table, prediction))


def test_start_is_scaled_as_in_diffusers() -> None:
    noise, seen = torch.ones(1, 1), []
    for prediction in (Prediction("edm", EDM), Prediction("flow", FLOW), Prediction("epsilon", VP)):
        table = compile_schedule(named_schedule("ddim", prediction.schedule, 2), prediction.schedule)
        sample(lambda x, t: seen.append((x, t)) or x, noise, table, prediction)
    (edm, time), (flow, _), (vp, last) = seen[0], seen[2], seen[4]
    assert edm.item() == pytest.approx((80**2 + 1) ** 0.5 / (80**2 + 0.25) ** 0.5)  # c_in of the input
    assert time.item() == pytest.approx(np.log(80) / 4)
    assert (flow.item(), vp.item(), last.item()) == pytest.approx((1.0, 1.0, 999.0))


def test_mean_image_of_the_analytical_first_step() -> None:
    """The first update starts from x̂_0 = c; the mean broadcasts."""
    schedule = SolverSchedule((-2.0, 0.0, 1.0), (StepDecision(), StepDecision()), afs="mean")
    table, prediction, seen = compile_schedule(schedule, VP), Prediction("epsilon", VP), []
    noise, mean = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    sample(lambda x, t: seen.append(x) or torch.zeros_like(x), noise, table, prediction, mean=mean)
    t0, t1 = VP.t_of_half_log_snr(-2.0), VP.t_of_half_log_snr(0.0)
    eps = (noise - VP.alpha(t0) * mean) / VP.sigma(t0)
    torch.testing.assert_close(seen[0], VP.alpha(t1) * mean + VP.sigma(t1) * eps)
    with pytest.raises(ValueError, match="needs the mean image"):
        sample(Network(), noise, table, prediction)


def test_gradients_reach_table_and_times() -> None:
    schedule, prediction = named_schedule("dpmpp_2m", VP, 4), Prediction("epsilon", VP)
    times = torch.tensor(schedule.times, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network = Network()

    def loss(times: Tensor) -> Tensor:
        return sample(network, noise, compile_schedule(schedule, VP, times=times), prediction).square().mean()

    (gradient,) = torch.autograd.grad(loss(times), times)
    step = torch.zeros_like(times)
    step[2] = 1e-3
    with torch.no_grad():
        slope = (loss(times + step) - loss(times - step)) / 2e-3
    assert gradient[2].item() == pytest.approx(slope.item(), rel=1e-4)
    table = compile_schedule(schedule, VP)
    table.weights.requires_grad_()
    sample(network, noise.float(), table, prediction).square().mean().backward()
    assert table.weights.grad is not None and table.weights.grad.tril().abs().sum() > 0


def test_bad_calls() -> None:
    prediction, noise = Prediction("epsilon", VP), torch.zeros(2, 3)
    four, five = (compile_schedule(named_schedule("ddim", VP, n), VP) for n in (4, 5))
    with pytest.raises(ValueError, match=r"need one \(nfe, basis\)"):
        sample_many(Network(), noise, [four, five], prediction)
    with pytest.raises(ValueError, match="need one"):
        sample_many(Network(), noise, [], prediction)
    with pytest.raises(ValueError, match="predicts variances must drop them"):
        sample(lambda x, t: torch.cat([x, x], dim=1), noise, four, prediction)
    flow = compile_schedule(named_schedule("ddim", FLOW, 4), FLOW)
    with pytest.raises(ValueError, match="does not determine the data at time 1"):
        sample(Network(), noise, flow, Prediction("epsilon", FLOW))
