"""Consistency models against diffusers' sampler, against closed forms, and against the formulas of the papers."""

import itertools
import math

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.diffusion.consistency import (
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    boundary_scalings,
    consistency_function,
    euler_step,
    heun_step,
    karras_sigmas,
)
from genlight.diffusion.distances import DISTANCES, distance, pseudo_huber
from genlight.errors import UserError

OBJECTIVES = [
    ConsistencyTraining(),
    ConsistencyDistillation(),
    ImprovedConsistencyTraining(),
    EasyConsistencyTuning(),
]


def _images(count=5, seed=0):
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def test_the_function_is_what_diffusers_scheduler_makes_of_the_network_at_forty_levels():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, clip_denoised=False)
    scheduler.set_timesteps(40)
    sigmas = karras_sigmas(40)
    torch.testing.assert_close(sigmas.float(), scheduler.sigmas[:40], rtol=1e-6, atol=0)

    def network(scaled, timestep):
        return torch.sin(3 * scaled) + timestep.view(-1, 1, 1, 1) / 1000

    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=True):
        x = _images() * sigma.float()
        scheduler._step_index = None
        output = network(scheduler.scale_model_input(x, timestep), timestep.float().expand(5))
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
        ours = consistency_function(network, x, sigma.expand(5))
        torch.testing.assert_close(ours, (c_skip * x + c_out * output).float(), rtol=1e-6, atol=1e-6)


def test_the_function_is_the_identity_at_the_lowest_level():
    x = _images()
    lowest = torch.full((5,), 0.002, dtype=torch.float64)
    assert torch.equal(consistency_function(lambda scaled, _: 1e6 * scaled, x, lowest), x)
    assert torch.equal(consistency_function(lambda scaled, _: 1e6 * scaled, x, 0 * lowest), x)


@given(st.floats(0.002, 80.0), st.floats(0.1, 2.0))
def test_scalings_keep_unit_variance_of_input_and_boundary(sigma, sigma_data):
    c_skip, c_out, c_in, c_noise = boundary_scalings(torch.tensor(sigma), sigma_data)
    sigma = torch.tensor(sigma).double()
    assert (c_in**2 * (sigma**2 + sigma_data**2)).item() == pytest.approx(1)
    assert c_noise.item() == pytest.approx(250 * math.log(sigma.item()))
    assert 0 <= c_skip.item() <= 1 and 0 <= c_out.item() <= sigma_data


def test_grid_is_that_of_karras_and_refuses_one_level():
    sigmas = karras_sigmas(18, 0.002, 80.0, 7.0)
    step = [(80 ** (1 / 7) + j / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for j in range(18)]
    torch.testing.assert_close(sigmas, torch.tensor(step, dtype=torch.float64))
    assert sigmas[0] == 80.0 and sigmas[-1] == 0.002
    with pytest.raises(ValueError, match="not 1"):
        karras_sigmas(1)


def test_euler_with_the_true_image_stays_on_the_path_of_its_noise():
    x0, noise = _images().double(), _images(seed=1).double()
    sigmas = karras_sigmas(18)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        moved = euler_step(x0 + sigma * noise, x0, sigma.expand(5), sigma_next.expand(5))
        torch.testing.assert_close(moved, x0 + sigma_next * noise, rtol=0, atol=1e-12)


def test_heun_with_a_gaussian_teacher_errs_by_the_third_power_of_the_step():
    def denoiser(x, sigma):  # of data N(0, 0.25)
        return x * (0.25 / (0.25 + sigma.view(-1, 1, 1, 1) ** 2))

    x = _images().double()
    first = torch.full((5,), 1.0, dtype=torch.float64)
    errors = []
    for step in (0.2, 0.1, 0.05, 0.025):
        last = first - step
        exact = x * ((last**2 + 0.25) / (first**2 + 0.25)).sqrt().view(-1, 1, 1, 1)
        errors.append((heun_step(denoiser, x, first, last) - exact).abs().max().item())
    for large, small in itertools.pairwise(errors):
        assert math.log2(large / small) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_levels_fall_lie_in_range_and_have_positive_weight(objective):
    torch.manual_seed(0)
    for step in (0, 499, 999):
        sigma, sigma_next = objective.levels(2000, step, 1000)
        assert sigma.dtype == torch.float64 and sigma.shape == sigma_next.shape == (2000,)
        assert bool((sigma_next < sigma).all()) and sigma_next.min() >= 0 and sigma.max() <= 80 * (1 + 1e-12)
        assert bool((objective.weight(sigma, sigma_next) > 0).all())


def test_neighbours_of_the_grid_are_drawn_alike():
    torch.manual_seed(0)
    sigma, sigma_next = ConsistencyDistillation(5).levels(40_000, 0, 1)
    grid = karras_sigmas(5)
    for index in range(4):
        chosen = sigma == grid[index]
        assert chosen.double().mean().item() == pytest.approx(0.25, abs=0.01)
        assert bool((sigma_next[chosen] == grid[index + 1]).all())


def test_progressive_grid_and_target_are_those_of_the_paper():
    objective = ConsistencyTraining(150, 2, 0.9)
    assert objective.scales(0, 800) == 2 and objective.scales(800, 800) == 151
    for step in (1, 77, 400, 799):
        number = math.ceil(math.sqrt(step / 800 * (151**2 - 4) + 4) - 1) + 1
        assert objective.scales(step, 800) == number
        assert objective.target_decay(step, 800) == pytest.approx(math.exp(2 * math.log(0.9) / (number - 1)))
    assert ConsistencyTraining(150, 2, 0.0).target_decay(5, 800) == 0.0
    assert ConsistencyDistillation(18, None, 0.95).target_decay(5, 800) == 0.95
    assert not ConsistencyDistillation(18).keeps_target and ConsistencyDistillation(18, None, 0.5).keeps_target


def test_ict_doubles_its_grid_from_11_to_1281_levels():
    objective = ImprovedConsistencyTraining()
    every = 400_000 // 8
    found = [objective.scales(k * every, 400_000) for k in range(8)]
    assert found == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert objective.scales(399_999, 400_000) == 1281 and objective.scales(every - 1, 400_000) == 11


def test_ict_draws_levels_by_the_discretised_log_normal():
    torch.manual_seed(0)
    objective = ImprovedConsistencyTraining()
    sigma, sigma_next = objective.levels(200_000, 0, 1000)
    grid = karras_sigmas(11).flip(0)
    edges = torch.special.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0))
    shares = edges.diff() / (edges[-1] - edges[0])
    for index in range(10):
        chosen = sigma_next == grid[index]
        assert chosen.double().mean().item() == pytest.approx(shares[index].item(), abs=0.004)
        assert bool((sigma[chosen] == grid[index + 1]).all())
    torch.testing.assert_close(objective.weight(sigma, sigma_next), 1 / (sigma - sigma_next))


def test_ect_begins_as_diffusion_training_and_doubles_its_closeness():
    objective = EasyConsistencyTuning(q=2.0, num_stages=4)
    assert [objective.stage(k, 100) for k in (0, 24, 25, 99, 100)] == [0, 0, 1, 3, 3]
    torch.manual_seed(0)
    sigma, first = objective.levels(1000, 0, 100)
    low = sigma < 1.0
    assert bool((first[low] == 0).all())
    torch.manual_seed(0)
    same, last = objective.levels(1000, 99, 100)
    assert torch.equal(sigma, same)
    expected = sigma * (1 - (1 + 8 * torch.sigmoid(-sigma)) / 16).clamp(min=0)
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ConsistencyTraining(1, None), "num_scales"),
        (lambda: ConsistencyTraining(10, 11), "initial_scales"),
        (lambda: ConsistencyDistillation(target_decay=1.0), "target_decay = 1.0"),
        (lambda: ImprovedConsistencyTraining(20, 10), "final_scales"),
        (lambda: ImprovedConsistencyTraining(std=0.0), "std = 0"),
        (lambda: EasyConsistencyTuning(q=1.0), "q > 1"),
        (lambda: distance("l3"), "pseudo_huber"),
    ],
)
def test_bad_values_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_distances_are_their_formulas():
    x, y = _images().double(), _images(seed=1).double()
    d = (x - y).flatten(1)
    c = 0.00054 * math.sqrt(18)
    expected = {
        "l2": (d**2).mean(1),
        "l1": d.abs().mean(1),
        "norm": (d**2).sum(1).sqrt(),
        "pseudo_huber": ((d**2).sum(1) + c**2).sqrt() - c,
        "huber": ((d**2 + 1e-6).sqrt() - 1e-3).mean(1),
    }
    assert set(expected) == set(DISTANCES) - {"lpips"}
    for name, value in expected.items():
        torch.testing.assert_close(distance(name)(x, y), value)


@settings(max_examples=30)
@given(st.floats(1e-6, 1e3), st.integers(0, 5))
def test_pseudo_huber_lies_between_zero_and_the_norm(scale, seed):
    x, y = scale * _images(seed=seed), scale * _images(seed=seed + 9)
    value, norm = pseudo_huber(x, y, 0.1), distance("norm")(x, y)
    assert bool((value >= 0).all()) and bool((value <= norm * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["l2", "l1", "norm", "pseudo_huber", "huber"])
def test_gradient_at_equal_images_is_zero(name):
    x = _images().requires_grad_()
    distance(name)(x, x.detach().clone()).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_lpips_without_its_weights_is_one_clear_error():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="torchvision"):
            distance("lpips")
