"""Weights against the formulas of their papers, through the loss of the image that they imply."""

import math

import pytest
import torch

from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.weightings import EDMWeighting, MinSNR, Uniform, Weighting

PAIRS = [
    (schedule, prediction_type)
    for schedule in (VPSchedule(), VPSchedule("squaredcos_cap_v2"), FlowSchedule(), EDMSchedule())
    for prediction_type in ("epsilon", "v_prediction", "sample", "flow", "edm")
    if prediction_type != "edm" or schedule.family == "edm"
]


def _times(schedule: NoiseSchedule) -> torch.Tensor:
    return schedule.t_of_fraction(torch.linspace(0.01, 0.99, 41, dtype=torch.float64))


@pytest.mark.parametrize("schedule, prediction_type", PAIRS, ids=str)
@pytest.mark.parametrize(
    "weighting", [MinSNR(5.0), MinSNR(0.3), EDMWeighting(0.5), EDMWeighting(1.3)], ids=lambda w: type(w).__name__
)
def test_the_loss_is_the_same_loss_of_the_image_for_every_prediction_type(
    weighting: Weighting, schedule: NoiseSchedule, prediction_type: str
) -> None:
    prediction, t = Prediction(prediction_type, schedule), _times(schedule)
    generator = torch.Generator().manual_seed(0)
    x0, eps, mistake = torch.randn(3, len(t), 5, generator=generator, dtype=torch.float64)
    x = schedule.add_noise(x0, eps, t)
    goal = prediction.target(x0, eps, t)
    loss = weighting.weight(prediction, t) * mistake.square().mean(1)
    image_error = (prediction.to_x0(goal + mistake, x, t) - x0).square().mean(1)
    snr = torch.exp(schedule.log_snr(t))
    if isinstance(weighting, MinSNR):
        image_weight = snr.clamp(max=weighting.gamma)
    else:
        level = schedule.noise_level(t)
        image_weight = (level**2 + weighting.sigma_data**2) / (level * weighting.sigma_data) ** 2
    torch.testing.assert_close(loss, image_weight * image_error, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("schedule", [VPSchedule(), VPSchedule("squaredcos_cap_v2")], ids=repr)
def test_min_snr_as_printed(schedule: NoiseSchedule) -> None:
    """Hang et al. 2023, section 3.4: the weights by prediction type."""
    t = torch.arange(1000)
    snr = torch.exp(schedule.log_snr(t))
    capped = snr.clamp(max=5)
    for prediction_type, expected in (
        ("epsilon", capped / snr),
        ("v_prediction", capped / (snr + 1)),
        ("sample", capped),
    ):
        weight = MinSNR(5.0).weight(Prediction(prediction_type, schedule), t)
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)


def test_edm_with_its_own_network_is_uniform() -> None:
    schedule = EDMSchedule(sigma_data=0.7)
    t = _times(schedule)
    ones = torch.ones_like(t)
    torch.testing.assert_close(EDMWeighting(0.7).weight(Prediction("edm", schedule), t), ones)
    assert torch.equal(Uniform().weight(Prediction("edm", schedule), t), ones)


def test_the_ends_of_min_snr_are_limits() -> None:
    zero = VPSchedule(rescale_zero_terminal_snr=True)
    flow = FlowSchedule()
    for prediction_type, expected in (("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)):
        assert MinSNR().weight(Prediction(prediction_type, zero), torch.tensor([zero.t_max])).item() == expected
    ends = torch.tensor([0.0, 1.0])
    assert MinSNR().weight(Prediction("flow", flow), ends).tolist() == [0.0, 0.0]
    assert MinSNR().weight(Prediction("sample", flow), ends).tolist() == [5.0, 0.0]
    assert MinSNR().weight(Prediction("epsilon", flow), ends).tolist() == [0.0, 1.0]


def test_uniform_keeps_shape_and_precision() -> None:
    weight = Uniform().weight(Prediction("epsilon", VPSchedule()), torch.tensor([3, 4]))
    assert weight.dtype == torch.float64 and weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_arguments(value: float) -> None:
    with pytest.raises(ValueError, match=r"loss_weighting.gamma = .* must be positive"):
        MinSNR(value)
    with pytest.raises(ValueError, match=r"loss_weighting.sigma_data = .* must be positive"):
        EDMWeighting(value)
