"""Values of known solvers on the one-dimensional mixture, computed by independent float64 code."""

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import solve

from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.decisions import SolverSchedule, StepDecision, nearest_points
from genlight.diffusion.solver.presets import preset

VP = VPSchedule()
START = torch.tensor([[-1.0], [0.1], [1.0]]).double()
GOLDEN = {
    "ddim": (-1.02609404, 0.84875219, 1.03549352),
    "dpmpp_2m": (-1.71941304, 1.10329494, 1.25446751),
    "dpmpp_2m_heun": (-1.97220706, 1.19943522, 1.33519725),
    "dpmpp_3m": (-2.33229327, 1.32925227, 1.32864388),
    "dpmpp_3m_exact": (-2.46760504, 1.38180953, 1.33104125),
    "deis_3": (-1.54536451, 1.00664313, 1.15261076),
    "unipc_3_bh2": (-2.48766126, 1.38116425, 1.29749444),
    "unipc_3_bh1": (-2.48656437, 1.38055948, 1.29440080),
    "unipc_2_bh2_noise": (-2.02217353, 1.01156756, 1.21207036),
}


def _times(steps: int) -> tuple[float, ...]:
    return tuple(VP.t_of_half_log_snr(lam) for lam in np.linspace(-4.5, 4.0, steps + 1).tolist())


@pytest.mark.parametrize("basis", ["data", "noise"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str, prediction_type: str, basis: str) -> None:
    schedule = preset(name, VP, _times(5), lower_order_final=False)
    found = solve(schedule, Prediction(prediction_type, VP), START, basis)
    np.testing.assert_allclose(found[:, 0].numpy(), GOLDEN[name], rtol=0, atol=6e-9)


def test_ddim_is_the_same_in_both_prediction_spaces() -> None:
    schedule = SolverSchedule(_times(5), (StepDecision("noise"),) * 5, time_domain="time")
    found = solve(schedule, Prediction("epsilon", VP), START)
    np.testing.assert_allclose(found[:, 0].numpy(), GOLDEN["ddim"], rtol=0, atol=6e-9)


def test_reference_of_many_steps() -> None:
    steps = tuple(StepDecision("data", min(4, i + 1), points=nearest_points(min(4, i + 1))) for i in range(400))
    schedule = SolverSchedule(_times(400), steps, time_domain="time")
    found = solve(schedule, Prediction("epsilon", VP), START)
    np.testing.assert_allclose(found[:, 0].numpy(), (-1.47633750, 0.91757509, 1.14977383), rtol=0, atol=4e-8)
