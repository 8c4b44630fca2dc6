"""The flow to codes against what is known in closed form, against diffusers' schedulers, and as a sampler."""

import itertools
from typing import Any

import diffusers
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from genlight.diffusion import flow_codes
from genlight.diffusion.flow_codes import final_log_weights, flow_choice, log_weights, transport, velocity
from genlight.nets.autoregressive import SamplingSettings, decode, parallel_probabilities
from genlight.nets.llamagen import LlamaGen, LlamaGenTransformer
from genlight.nets.vq import VectorQuantizer

NORMAL = torch.distributions.Normal(0.0, 1.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(probabilities: Tensor, count: int) -> Tensor:
    return probabilities.log().expand(count, -1)


def agreement(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted).float().mean())


@pytest.mark.parametrize(("method", "steps", "share"), [("2m", 64, 0.998), ("heun", 64, 0.998), ("euler", 256, 0.985)])
def test_on_a_line_a_token_is_a_quantile(method: Any, steps: int, share: float) -> None:
    """The flow keeps the order of points, so Φ(ε) tells the interval of cumulative probability."""
    codebook = normal(12, 1, seed=1).sort(0).values * 1.5
    probabilities = normal(12, seed=2).softmax(0)
    noise = normal(6000, 1, seed=3)
    tokens = transport(noise, same(probabilities, 6000), codebook, steps=steps, method=method)[1]
    wanted = torch.searchsorted(probabilities.cumsum(0), NORMAL.cdf(noise[:, 0])).clamp(max=11)
    assert agreement(tokens, wanted) >= share


@pytest.mark.parametrize("dimensions", [2, 7])
def test_two_codes_are_parted_by_a_plane(dimensions: int) -> None:
    codebook, noise = normal(2, dimensions, seed=4), normal(5000, dimensions, seed=5)
    share = torch.tensor([0.3, 0.7])
    direction = torch.nn.functional.normalize(codebook[1] - codebook[0], dim=0)
    wanted = (noise @ direction > NORMAL.icdf(share[0])).long()
    assert agreement(transport(noise, same(share, 5000), codebook)[1], wanted) >= 0.998


def test_symmetric_codes_win_by_their_inner_product() -> None:
    codebook = torch.cat((torch.eye(4), -torch.eye(4)))
    noise = normal(4000, 4, seed=6)
    tokens = transport(noise, torch.zeros(4000, 8), codebook)[1]
    assert agreement(tokens, (noise @ codebook.T).argmax(1)) >= 0.998


def test_a_grid_of_codes_is_decided_axis_by_axis() -> None:
    first, second = torch.tensor([-1.0, 0.2, 1.0]), torch.tensor([-0.5, 0.9])
    shares = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.4])
    codebook = torch.cartesian_prod(first, second)
    noise = normal(4000, 2, seed=7)
    tokens = transport(noise, same(torch.outer(*shares).flatten(), 4000), codebook, steps=64)[1]
    axes = [
        transport(noise[:, [axis]], same(shares[axis], 4000), codes[:, None], steps=64)[1]
        for axis, codes in enumerate((first, second))
    ]
    assert agreement(tokens, axes[0] * 2 + axes[1]) >= 0.998


@pytest.mark.parametrize("method", ["euler", "heun", "2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 32])
def test_the_only_code_allowed_is_always_found(method: Any, steps: int) -> None:
    codebook, noise = normal(9, 3, seed=8), 3 * normal(40, 3, seed=9)
    log_probs = torch.full((40, 9), -torch.inf)
    wanted = torch.arange(40) % 9
    log_probs[torch.arange(40), wanted] = -5.0
    embedding, tokens = transport(noise, log_probs, codebook, steps=steps, method=method)
    assert torch.equal(tokens, wanted) and torch.equal(embedding, codebook[wanted])


def test_normal_noise_becomes_the_distribution() -> None:
    count = 20000
    codebook, probabilities = normal(8, 3, seed=10), (1.5 * normal(8, seed=11)).softmax(0)
    tokens = transport(normal(count, 3, seed=12), same(probabilities, count), codebook, steps=64)[1]
    expected = probabilities * count
    statistic = float(((tokens.bincount(minlength=8) - expected).square() / expected).sum())
    assert statistic < chi2.ppf(0.999, 7)


def test_rows_do_not_know_each_other_and_the_frame_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook, noise = normal(16, 5, seed=13), normal(500, 5, seed=14)
    log_probs = 2 * normal(500, 16, seed=15)
    tokens = transport(noise, log_probs, codebook)[1]
    rotation = torch.linalg.qr(normal(5, 5, seed=16))[0]
    assert agreement(transport(noise @ rotation, log_probs, codebook @ rotation)[1], tokens) >= 0.99
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert agreement(order[transport(noise, log_probs[:, order], codebook[order])[1]], tokens) >= 0.99
    # a constant of each row is none of the distribution
    assert agreement(transport(noise, log_probs + normal(500, 1, seed=17), codebook)[1], tokens) >= 0.99
    monkeypatch.setattr(flow_codes, "CHUNK_NUMBERS", 16 * 7)
    assert agreement(transport(noise, log_probs, codebook)[1], tokens) >= 0.99


def scheduler_end(scheduler: Any, noise: Tensor, log_probs: Tensor, codebook: Tensor, steps: int) -> Tensor:
    """Where a scheduler of diffusers ends whose time is σ = 1 - t, and whose model is given the exact velocity."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        t = 1 - float(timestep) / scheduler.config.num_train_timesteps
        x = scheduler.step(-velocity(x, t, log_probs, codebook), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("method", ["euler", "heun", "2m"])
def test_steps_are_those_of_diffusers(method: Any) -> None:
    steps = 20
    codebook, noise, log_probs = normal(32, 4, seed=18), normal(300, 4, seed=19), normal(300, 32, seed=20)
    schedulers: dict[str, Any] = {
        "euler": diffusers.FlowMatchEulerDiscreteScheduler(),
        # its grid ends at 1 / num_train_timesteps
        "heun": diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=steps),
        "2m": diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=1_000_000,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            solver_order=2,
            flow_shift=1.0,
        ),
    }
    wanted = scheduler_end(schedulers[method], noise, log_probs, codebook, steps)
    weights = final_log_weights(noise, log_probs, codebook, steps=steps, method=method)
    error = (weights.softmax(-1) @ codebook - wanted).abs()
    # the grid of the multistep ends at 1 / num_train_timesteps, in whole timesteps
    assert error.max() < (5e-3 if method == "2m" else 1e-3) and error.mean() < 1e-4


def test_weights_stay_finite_where_densities_vanish() -> None:
    codebook, log_probs = 3 * normal(50, 6, seed=21), torch.linspace(0, -69, 50).expand(20, -1)
    for t in (0.0, 0.5, 0.99, 1 - 1e-4):
        x = t * codebook[:20] + (1 - t) * normal(20, 6, seed=22)
        found = log_weights(x, t, log_probs, codebook).softmax(-1)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(20))
        distance = (x[:, None].double() - t * codebook.double()).square().sum(-1) / (2 * (1 - t) ** 2)
        wanted = (log_probs.double() - distance).softmax(-1)
        assert (found - wanted).abs().max() < (1e-4 if t < 0.999 else 0.5)


def test_bfloat16_is_refused_its_precision() -> None:
    codebook, noise, log_probs = normal(64, 4, seed=23), normal(200, 4, seed=24), normal(200, 64, seed=25)
    tokens = transport(noise, log_probs, codebook)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transport(noise, log_probs, codebook)[1], tokens)


@torch.no_grad()
def test_a_chain_of_tokens_has_the_distribution_of_the_network() -> None:
    """All 81 sequences of four tokens of three codes, counted against their probability."""
    torch.manual_seed(0)
    transformer = LlamaGenTransformer(3, 2, 16, 2, 2, num_classes=2, multiple_of=8).eval()
    for parameter in transformer.parameters():
        parameter.mul_(3.0)
    torch.nn.init.normal_(transformer.head.weight, std=0.3)
    quantizer = VectorQuantizer(3, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    model, settings, count = LlamaGen(transformer, quantizer), SamplingSettings(guidance_scale=1.5), 20000
    everything = torch.tensor(list(itertools.product(range(3), repeat=4)))
    label = torch.ones(81, dtype=torch.long)
    chances = parallel_probabilities(model, everything, label, settings).gather(2, everything[..., None]).prod(1)[:, 0]
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0))
    choose = flow_choice(normal(count, 4, 4, seed=26), model.codebook, model.group_sizes, steps=64)
    tokens = decode(model, label[:1].expand(count), settings, choose)
    counts = (tokens * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81)
    expected = chances * count
    statistic = float(((counts - expected).square() / expected).sum())
    assert statistic < chi2.ppf(0.999, 80)
    assert chances.max() > 3 * chances.min()


def test_what_does_not_fit_is_named() -> None:
    noise, log_probs, codebook = torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"\[N, C\], \[N, V\] and \[V, C\]"):
        transport(noise, log_probs[:3], codebook)
    with pytest.raises(ValueError, match="steps = 0"):
        transport(noise, log_probs, codebook, steps=0)
    with pytest.raises(ValueError, match="method = 'rk4'"):
        transport(noise, log_probs, codebook, method="rk4")  # type: ignore[arg-type]
    for value in (-torch.inf, torch.nan):
        log_probs[2] = value
        with pytest.raises(ValueError, match="row 2"):
            transport(noise, log_probs, codebook)
    with pytest.raises(ValueError, match=r"\[B, 4, 2\]"):
        flow_choice(torch.zeros(2, 3, 2), codebook, (1,) * 4)
