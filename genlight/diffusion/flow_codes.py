"""The flow that carries Gaussian noise to the codes of a distribution of tokens (Liu et al. 2024, arXiv 2412.17153).

The path from noise ε to a code c is x_t = t·c + (1 - t)·ε, t from 0 to 1. For a target Σ_j p_j δ(c_j) the velocity of
flow matching is known in closed form, so that a noise vector, a distribution and a codebook give one code, without
chance, and normal noise gives code j with probability p_j.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from genlight.nets.autoregressive import Choose

Method = Literal["euler", "heun", "2m"]
# numbers [rows, V] that one step holds several times: 64 MiB each in float32
CHUNK_NUMBERS = 1 << 24


def log_weights(x: Tensor, t: float, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """Unnormalised log posterior of the code that the flow through x at time t ends in.

    l_j = log p_j + (t⟨x, c_j⟩ - t²|c_j|²/2) / (1 - t)²; the term of |x|² is common to all codes. In log space no weight
    underflows before all have been compared.

    Args:
        x: [N, C].
        t: in [0, 1).
        log_probs: [N, V], up to a constant of each row; -inf for a code that may not be chosen.
        codebook: [V, C].

    Returns:
        [N, V].
    """
    over = t / (1 - t) ** 2
    return torch.addmm(log_probs - (over * t / 2) * codebook.square().sum(1), x, codebook.T, alpha=over)


def posterior_mean(x: Tensor, t: float, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """D(x, t), the expected code, [N, C]; arguments as in `log_weights`."""
    return log_weights(x, t, log_probs, codebook).softmax(-1) @ codebook


def velocity(x: Tensor, t: float, log_probs: Tensor, codebook: Tensor) -> Tensor:
    """dx/dt = (D(x, t) - x) / (1 - t), [N, C]; arguments as in `log_weights`."""
    return (posterior_mean(x, t, log_probs, codebook) - x) / (1 - t)


def final_log_weights(
    noise: Tensor, log_probs: Tensor, codebook: Tensor, *, steps: int = 32, method: Method = "2m"
) -> Tensor:
    """Follow the flow from t = 0 to the last of `steps` even times, 1 - 1/steps; `log_weights` there, [N, V].

    The velocity is singular at t = 1, and every method takes its last step at first order: it ends in the posterior
    mean, ``softmax(-1) @ codebook`` of what is returned.

    Args:
        noise: [N, C].
        log_probs: [N, V].
        codebook: [V, C].
        steps: of the uniform grid over [0, 1].
        method: "euler"; "heun", two evaluations a step; or "2m", the multistep of second order of DPM-Solver++ (Lu et
            al. 2022, arXiv 2211.01095, algorithm 2) in λ = log(t / (1 - t)), one evaluation a step.
    """
    x, before = noise, torch.zeros_like(noise)
    times = [step / steps for step in range(steps)]
    for index, (t, s) in enumerate(itertools.pairwise(times)):
        mean = posterior_mean(x, t, log_probs, codebook)
        target = mean
        # λ is -∞ at t = 0: the first two steps are of first order
        if method == "2m" and index > 1:
            gain = (_log_ratio(s) - _log_ratio(t)) / (_log_ratio(t) - _log_ratio(times[index - 1])) / 2
            target = mean + gain * (mean - before)
        x_next = torch.lerp(x, target, (s - t) / (1 - t))
        if method == "heun":
            slope = (mean - x) / (1 - t) + velocity(x_next, s, log_probs, codebook)
            x_next = x + (s - t) / 2 * slope
        x, before = x_next, mean
    return log_weights(x, times[-1], log_probs, codebook)


def _log_ratio(t: float) -> float:
    return math.log(t / (1 - t))


@torch.no_grad()
def transport(
    noise: Tensor, log_probs: Tensor, codebook: Tensor, *, steps: int = 32, method: Method = "2m"
) -> tuple[Tensor, Tensor]:
    """The code that the flow carries each noise vector to: the likeliest at the last time before 1.

    Computed in at least float32, whatever autocast says: lower precision changes tokens. Rows are independent and
    treated together, as many at a time as memory for a step should hold.

    Args:
        noise: [N, C].
        log_probs: [N, V], of the row's distribution, up to a constant; -inf for codes that may not be chosen.
        codebook: [V, C].
        steps, method: as in `final_log_weights`.

    Returns:
        The codes, [N, C], rows of the codebook as they are, and their indices [N] int64.

    Raises:
        ValueError: shapes that do not fit; `steps` below 1; an unknown method; a row that is not finite or allows no
            code, with its number.
    """
    if noise.ndim != 2 or codebook.shape[1:] != noise.shape[1:] or log_probs.shape != (len(noise), len(codebook)):
        shapes = [list(tensor.shape) for tensor in (noise, log_probs, codebook)]
        raise ValueError(f"noise, log_probs and codebook {shapes} must be [N, C], [N, V] and [V, C]")
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1")
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r} must be one of {', '.join(get_args(Method))}")
    wrong = ~(log_probs.amax(-1).isfinite() & noise.isfinite().all(-1))
    if wrong.any():
        raise ValueError(f"row {int(wrong.nonzero()[0])} must have finite noise and a finite largest log_probs")
    dtype = torch.promote_types(noise.dtype, torch.float32)
    codes = codebook.to(dtype)
    tokens = torch.empty(len(noise), dtype=torch.long, device=noise.device)
    rows = max(1, CHUNK_NUMBERS // len(codes))
    with torch.autocast(noise.device.type, enabled=False):
        for start in range(0, len(noise), rows):
            part = slice(start, start + rows)
            weights = final_log_weights(
                noise[part].to(dtype), log_probs[part].to(dtype), codes, steps=steps, method=method
            )
            tokens[part] = weights.argmax(-1)
    return codebook[tokens], tokens


def flow_choice(
    noise: Tensor, codebook: Tensor, group_sizes: Sequence[int], *, steps: int = 32, method: Method = "2m"
) -> Choose:
    """Makes `genlight.nets.autoregressive.decode` a function of noise: each token by `transport` of its own vector.

    Args:
        noise: [B, N, C], one vector for each token.
        codebook: [V, C].
        group_sizes: of the model; their sum is N.
        steps, method: as in `final_log_weights`.

    Raises:
        ValueError: noise of another length; when it chooses, as `transport`.
    """
    ends = list(itertools.accumulate(group_sizes, initial=0))
    if noise.ndim != 3 or noise.shape[1] != ends[-1]:
        raise ValueError(f"noise {list(noise.shape)} must be [B, {ends[-1]}, {codebook.shape[1]}]")

    def choose(probabilities: Tensor, group: int) -> Tensor:
        part = noise[:, ends[group] : ends[group + 1]].flatten(0, 1)
        tokens = transport(part, probabilities.flatten(0, 1).log(), codebook, steps=steps, method=method)[1]
        return tokens.view(probabilities.shape[:2])

    return choose
