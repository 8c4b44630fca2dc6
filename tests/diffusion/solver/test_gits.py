"""GITS: costs by an independent formula, paths by brute force."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from diffusion.solver.mixture import network
from diffusion.solver.tuning import EDM, FAMILIES, FLOW, VP, bank, family
from oracles.gaussian import two_modes
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.gits import best_path, gits_times, local_errors, times_at
from genlight.diffusion.solver.presets import named_schedule, preset
from genlight.diffusion.solver.sample import sample

METRICS = ("l1", "l2", "deviation")


def noise(count: int = 32) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("discount", [0.8, 1.0, 1.15])
def test_path_is_the_best_of_all(discount: float) -> None:
    """Every path on a grid of 8 steps, random costs of any sign."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        costs = rng.normal(size=(9, 9))
        for steps in range(1, 9):
            paths = [(0, *inner, 8) for inner in combinations(range(1, 8), steps - 1)]

            def total(path: tuple[int, ...], costs: np.ndarray = costs) -> float:
                return sum(discount**k * costs[i, j] for k, (i, j) in enumerate(pairwise(path)))

            assert best_path(torch.from_numpy(costs), steps, discount) == min(paths, key=total)


def test_what_lies_below_the_diagonal_is_not_read() -> None:
    costs = torch.full((5, 5), torch.nan).double()
    costs[torch.ones(5, 5, dtype=torch.bool).triu(1)] = 1.0
    assert best_path(costs, 4) == (0, 1, 2, 3, 4)
    assert best_path(costs, 1) == (0, 4)


@pytest.mark.parametrize("metric", METRICS)
def test_costs_by_hand(metric: str) -> None:
    """Euler in σ for the view x/α, on a DDIM teacher made by hand; one mixture, no genlight."""
    levels, mixture = np.geomspace(80.0, 0.002, 9), two_modes()
    x = noise(8).numpy() * np.hypot(80.0, 1.0)
    states, slopes = [x], []
    for now, then in pairwise(levels):
        slopes.append(mixture.epsilon(torch.from_numpy(states[-1]), 1.0, float(now)).numpy())
        states.append(states[-1] + (then - now) * slopes[-1])
    chord = (states[0] - states[-1]) / np.linalg.norm(states[0] - states[-1], axis=1, keepdims=True)

    def bend(point: np.ndarray) -> np.ndarray:
        offset = point - states[-1]
        return np.abs(chord[:, 0] * offset[:, 1] - chord[:, 1] * offset[:, 0])

    found = local_errors(
        network(EDM, mixture), noise(8), named_schedule("ddim", EDM.schedule, 8), EDM, metric=metric, batch_rows=3
    )
    for i in range(9):
        for j in range(i + 1, 9):
            reached = states[i] + (levels[j] - levels[i]) * slopes[i]
            if metric == "deviation":
                wanted = (bend(reached) - bend(states[j])).mean()
            else:
                wanted = np.linalg.norm(reached - states[j], ord=int(metric[1]), axis=1).mean()
            assert found[i, j].item() == pytest.approx(wanted, rel=1e-6, abs=1e-8)
    assert not found.tril().any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_a_first_order_teacher_has_no_error_in_one_step(prediction: Prediction, metric: str) -> None:
    """In every family, from pure noise (flow) on; longer steps have some."""
    teacher = named_schedule("ddim", prediction.schedule, 10)
    costs = local_errors(network(prediction, two_modes()), noise(), teacher, prediction, metric=metric)
    one, two = costs.diagonal(1), costs.diagonal(2)
    assert bool(costs.isfinite().all())
    assert one.abs().max() < 1e-9 * costs.abs().max()
    assert two.abs().max() > 1e-6 * costs.abs().max()


def test_a_variance_preserving_schedule_is_judged_as_its_exploding_view() -> None:
    """The same noise levels σ/α on both are one trajectory of x/α."""
    half_log_snr = np.linspace(-4.38, 4.0, 9)
    costs = []
    for prediction in (VP, EDM):
        schedule = prediction.schedule
        times = tuple(schedule.t_of_half_log_snr(float(value)) for value in half_log_snr)
        teacher = preset("dpmpp_2m", schedule, times)
        costs.append(local_errors(network(prediction, two_modes()), noise(), teacher, prediction))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", FAMILIES, ids=family)
def test_chosen_times_serve_the_euler_step(prediction: Prediction) -> None:
    """DDIM on the chosen 5 of 40 steps is nearer to the teacher than on the grid made by the teacher's own rule."""
    model, schedule = network(prediction, two_modes()), prediction.schedule
    teacher = named_schedule("dpmpp_2m", schedule, 40, spacing="edm")
    times = gits_times(model, noise(128), teacher, prediction, 5, discount=1.0)
    assert times[0] == schedule.t_max and times[-1] == schedule.t_min and len(times) == 6
    assert set(times) <= set(teacher.times)
    unseen, errors = bank(prediction, 2, 1024), []
    for candidate in (preset("ddim", schedule, times), named_schedule("ddim", schedule, 5, spacing="edm")):
        found = sample(model, unseen.noise, compile_schedule(candidate, schedule), prediction)
        errors.append((found - unseen.target).square().mean().sqrt().item())
    assert errors[0] * 1.1 < errors[1]


def test_conditions_and_chunks() -> None:
    ideal, told = network(VP, two_modes()), []

    def model(x: Tensor, timestep: Tensor, *, gain: Tensor) -> Tensor:
        return gain * ideal(x, timestep)

    teacher = named_schedule("dpmpp_2m", VP.schedule, 8)
    options = {"conditions": {"gain": torch.linspace(0.9, 1.1, 10).double()[:, None]}}
    whole = local_errors(model, noise(10), teacher, VP, **options)
    parts = local_errors(
        model, noise(10), teacher, VP, batch_rows=4, progress=lambda done, of: told.append((done, of)), **options
    )
    torch.testing.assert_close(whole, parts)
    assert told == [(4, 10), (8, 10), (10, 10)]


def test_a_clean_end() -> None:
    """A teacher that goes on to σ = 0, where x/α is the image."""
    teacher = named_schedule("dpmpp_2m", VP.schedule, 8, end="clean")
    costs = local_errors(network(VP, two_modes()), noise(), teacher, VP)
    assert bool(costs.isfinite().all())
    assert times_at(teacher, VP, best_path(costs, 3))[-1] is None


def test_integer_timesteps() -> None:
    """The same costs for a network that looks its timesteps up."""
    ideal, seen = network(VP, two_modes()), []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep.dtype)
        return ideal(x, timestep)

    teacher = preset("dpmpp_2m", VP.schedule, (999.0, 700.0, 400.0, 100.0, 0.0))
    costs = [local_errors(model, noise(), teacher, VP, integer_timesteps=whole) for whole in (False, True)]
    torch.testing.assert_close(*costs)
    assert set(seen) == {torch.float64, torch.int64}
    seen.clear()
    times = gits_times(model, noise(), teacher, VP, 2, integer_timesteps=True)
    assert set(seen) == {torch.int64}
    assert times[0] == 999.0 and times[1] in teacher.times[1:-1] and times[2] == 0.0


def test_bad_calls() -> None:
    costs, model = torch.zeros(4, 4), network(FLOW, two_modes())
    for steps in (0, 4):
        with pytest.raises(ValueError, match="has 1 to 3"):
            best_path(costs, steps)
    with pytest.raises(ValueError, match="discount = 0"):
        best_path(costs, 2, discount=0)
    with pytest.raises(ValueError, match="finite above the diagonal"):
        best_path(torch.full((4, 4), torch.inf), 2)
    with pytest.raises(ValueError, match="metric = 'l3'"):
        local_errors(model, noise(), named_schedule("ddim", FLOW.schedule, 4), FLOW, metric="l3")
    for name in ("unipc_2_bh2", "dpmpp_2s"):
        with pytest.raises(ValueError, match="multistep schedule without correctors"):
            local_errors(network(VP, two_modes()), noise(), named_schedule(name, VP.schedule, 4), VP)
