"""The oracles against themselves: derivatives by autograd, integrals by Monte Carlo, ODEs by a second solver."""

import pytest
import torch
from oracles.gaussian import Gaussian, two_modes

LEVELS = [(0.999, 0.045), (0.8, 0.6), (0.05, 0.99875), (1.0, 3.0), (0.4, 0.6)]


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(alpha: float, sigma: float) -> None:
    mixture = two_modes()
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(mixture.score(x.detach(), alpha, sigma), gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_x0_and_epsilon_explain_x_t(alpha: float, sigma: float) -> None:
    mixture = two_modes()
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rebuilt = alpha * mixture.x0(x, alpha, sigma) + sigma * mixture.epsilon(x, alpha, sigma)
    torch.testing.assert_close(rebuilt, x, rtol=1e-10, atol=1e-10)


def test_x0_at_the_ends() -> None:
    mixture = two_modes()
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean = (mixture.weights[:, None] * mixture.means).sum(0)
    torch.testing.assert_close(mixture.x0(x, 0.0, 1.0), mean.expand(5, 2))
    torch.testing.assert_close(mixture.x0(x, 1.0, 0.0), x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow", "edm"])
def test_no_function_of_x_t_predicts_better_than_the_oracle(prediction_type: str) -> None:
    """The mean squared error of the ideal output rises when it is moved in any direction: it is a conditional mean."""
    mixture, generator = two_modes(), torch.Generator().manual_seed(3)
    alpha, sigma = 0.7, 0.5
    x0, eps = mixture.sample(400_000, generator), torch.randn(400_000, 2, generator=generator, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    radius = (alpha**2 + sigma**2) ** 0.5
    level = sigma / alpha
    target = {
        "epsilon": eps,
        "sample": x0,
        "flow": eps - x0,
        "v_prediction": (alpha * eps - sigma * x0) / radius,
        "edm": (x0 - 0.25 / (level**2 + 0.25) * x / alpha) * (level**2 + 0.25) ** 0.5 / (level * 0.5),
    }[prediction_type]
    error = mixture.output(prediction_type, x, alpha, sigma) - target
    for probe in (torch.ones_like(x), x, x**2, torch.sin(3 * x)):
        mean, spread = (error * probe).mean(), (error * probe).std() / (error.numel()) ** 0.5
        assert abs(mean) < 5 * spread


def test_the_exact_flow_of_a_gaussian_solves_the_ode() -> None:
    gaussian = Gaussian(torch.tensor([0.3, -0.5]), 0.4)
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    exact = gaussian.flow(x, 1.0, 12.0, 1.0, 0.02)
    torch.testing.assert_close(gaussian.solve_ode(x, 12.0, 0.02), exact, rtol=1e-8, atol=1e-8)


def test_the_ode_carries_noise_to_the_data() -> None:
    mixture, generator = two_modes(), torch.Generator().manual_seed(5)
    noise = 60 * torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    samples = mixture.solve_ode(noise, 60.0, 1e-3)
    left = (samples - mixture.means[0]).norm(dim=1) < (samples - mixture.means[1]).norm(dim=1)
    assert abs(left.double().mean() - 0.3) < 0.025
    torch.testing.assert_close(samples[left].std(0), mixture.stds[0].expand(2), rtol=0.06, atol=0)
