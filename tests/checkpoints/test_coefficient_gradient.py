"""Descent on coefficients finds closed-form optima; the Fréchet distance equals the closed form of Gaussians."""

from collections.abc import Mapping

import numpy as np
import pytest
import scipy.linalg
import torch
from checkpoints.stand_in import MemoryTrajectory, live_weights, random_trajectory
from torch import Tensor

from genlight.checkpoints.bases import project_to_simplex
from genlight.checkpoints.gradient import FrechetTarget, descend
from genlight.checkpoints.mixing import WeightMixer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quadratic_optimum(trajectory: MemoryTrajectory, goal: Mapping[str, Tensor]) -> float:
    """min ‖Σ α_i θ_i - θ*‖² over Σ α = 1 is 1 / (1ᵀG⁻¹1), at α* = G⁻¹1 / (1ᵀG⁻¹1); G_ij = ⟨θ_i - θ*, θ_j - θ*⟩."""
    rows = torch.stack([torch.cat([(t[n].double() - goal[n]).reshape(-1) for n in goal]) for t in trajectory.tensors])
    return float(1 / torch.linalg.solve((rows @ rows.T), torch.ones(len(rows), dtype=torch.float64)).sum())


def test_a_descent_reaches_the_optimum_of_a_quadratic() -> None:
    trajectory = random_trajectory(6, noise=0.3)
    goal = {name: torch.randn(shape).double() for name, shape in trajectory.shapes.items()}
    live = live_weights(trajectory)

    def loss(step: int) -> tuple[float, dict[str, Tensor]]:
        apart = {name: live[name].double() - goal[name] for name in goal}
        return float(sum(d.square().sum() for d in apart.values())), {n: 2 * d for n, d in apart.items()}

    mixer = WeightMixer(trajectory, live)
    found = descend(mixer, loss, steps=600, lr=0.05)
    assert loss(0)[0] <= 1.01 * quadratic_optimum(trajectory, goal)
    assert len(found.losses) == 600 and found.losses[-1] < found.losses[0]
    mixed = {name: tensor.clone() for name, tensor in live.items()}
    mixer.mix(found.coefficients)
    assert all(torch.equal(mixed[name], live[name]) for name in live)
    convex = descend(mixer, loss, steps=200, lr=0.05, project=project_to_simplex).coefficients
    assert convex.min() >= 0 and convex.sum() <= 1 + 1e-9
    small = descend(mixer, loss, steps=200, penalty=1e4).coefficients
    assert np.abs(small).max() < 0.05


def test_a_descent_that_diverges_ends_with_finite_weights() -> None:
    trajectory = random_trajectory(3)
    live = live_weights(trajectory)
    mixer = WeightMixer(trajectory, live)

    def loss(step: int) -> tuple[float, dict[str, Tensor]]:
        if step == 5:
            raise torch.linalg.LinAlgError("did not converge")
        return (float("nan") if step == 3 else 1.0), {name: torch.ones_like(live[name]) for name in live}

    found = descend(mixer, loss, steps=20)
    assert found.losses == (1.0, 1.0, 1.0) and np.isfinite(found.coefficients).all()
    assert all(tensor.isfinite().all() for tensor in live.values())
    with pytest.raises(ValueError, match="steps = 0"):
        descend(mixer, loss, steps=0)


def sqrtm_distance(x: Tensor, y: Tensor) -> float:
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    # (a b) has the eigenvalues of a^½ b a^½
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(a) @ b @ scipy.linalg.sqrtm(a))
    shift = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(shift + np.trace(a) + np.trace(b) - 2 * np.trace(np.real(root)))


def whitened(features: Tensor) -> Tensor:
    """The same samples with mean 0 and covariance 1, exactly."""
    centred = features - features.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False).T


def test_the_distance_of_gaussians_has_its_closed_form() -> None:
    """‖m1 - m2‖² + Σ (√a - √b)² for diagonal covariances a and b; the ridge is added to both."""
    white = whitened(torch.randn(500, 6, dtype=torch.float64))
    m1, m2, a, b = (torch.rand(6, dtype=torch.float64) for _ in range(4))
    for ridge in (0.0, 1e-3):
        target = FrechetTarget(m2, torch.diag(b), ridge)
        expected = (m1 - m2).square().sum() + ((a + ridge).sqrt() - (b + ridge).sqrt()).square().sum()
        assert float(target.distance(m1 + white * a.sqrt())) == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("dead", [0, 20])
def test_it_equals_the_square_root_form_and_vanishes_on_itself(dead: int) -> None:
    mixing = torch.randn(64, 64, dtype=torch.float64)
    x = torch.randn(400, 64, dtype=torch.float64) @ mixing
    y = torch.randn(300, 64, dtype=torch.float64) + 0.3
    x[:, :dead] = 0
    y[:, :dead] = 0
    assert float(FrechetTarget.of(y, 0.0).distance(x)) == pytest.approx(sqrtm_distance(x, y), rel=1e-6)
    with_ridge = FrechetTarget.of(y)
    assert abs(float(with_ridge.distance(y))) <= 1e-8
    assert abs(float(FrechetTarget.of(y[:, dead:], 0.0).distance(y[:, dead:]))) <= 1e-8


def test_its_gradient_is_that_of_the_value_also_with_dead_features() -> None:
    x = torch.randn(12, 4, dtype=torch.float64)
    x[:, 0] = 0
    target = FrechetTarget.of(torch.randn(50, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(target.distance, (x.requires_grad_(),), atol=1e-4)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        FrechetTarget(torch.zeros(4), torch.eye(4)).distance(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="ridge = -1"):
        FrechetTarget(torch.zeros(4), torch.eye(4), -1)
