"""What a searched combination is always compared with: means and one-parameter extrapolations of the same members."""

import math
from typing import Any, Protocol

import numpy as np

from genlight.checkpoints.bases import Array, ema_profile, profile_horizons
from genlight.checkpoints.ema_profiles import lawa_weights, power_gamma, power_weights, swa_weights
from genlight.checkpoints.mixing import Checkpoints

LINE_STEPS = (-0.5, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
NEON_WEIGHTS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
_SIGMA_REL = (0.01, 0.28)


class TakesWeights(Protocol):
    """A space with a candidate for any weights over members."""

    def candidate_of(self, weights: Array) -> Any:
        """The candidate that mixes members with these weights [K] in all groups."""
        ...


def baseline_candidates(trajectory: Checkpoints, space: TakesWeights, singles: int = 20) -> dict[str, Any]:
    """`baseline_weights` as candidates of a space of combinations, by name."""
    return {name: space.candidate_of(weights) for name, weights in baseline_weights(trajectory, singles).items()}


def baseline_weights(trajectory: Checkpoints, singles: int = 20) -> dict[str, Array]:
    """Weights [K] over members, each summing to one, by name; equal ones once, under the first name.

    - `last`: the newest member.
    - `single STEP`: one member; evenly spaced ones where there are more than `singles`.
    - `ema HORIZON`: exponential means over checkpoints, with horizons in checkpoints.
    - `swa`: the mean of all (Izmailov et al. 2018); `lawa N`: of the last N members (Kaddour 2022).
    - `power ema SIGMA`: power-function profiles of a relative width σ_rel (Karras et al. 2024, section 3.1).
    - `line L`: last + L (last - mean of all); above 0 it extrapolates.
    - `neon STEP W`: (1 + W) last - W degraded (Alemohammad et al. 2025), with the oldest or the middle member for the
      degraded weights, which that paper makes by training on its own samples.

    Raises:
        ValueError: fewer than two members, or `singles` below 1.
    """
    if singles < 1:
        raise ValueError(f"singles = {singles!r} must be 1 or more")
    counts = [member.count for member in trajectory.members]
    steps = [member.last_step for member in trajectory.members]
    number = len(counts)
    every = np.eye(number)
    last, mean = every[-1], swa_weights(counts)
    named: list[tuple[str, Array]] = [("last", last)]
    chosen = sorted({round(i) for i in np.linspace(0, number - 1, min(singles, number))})
    named += [(f"single {steps[i]}", every[i]) for i in chosen]
    named += [(f"ema {horizon:.4g}", ema_profile(counts, horizon)) for horizon in profile_horizons(counts)]
    named += [("swa", mean)]
    named += [(f"lawa {2**k}", lawa_weights(counts, 2**k)) for k in range(1, math.ceil(math.log2(number)))]
    named += [
        (f"power ema {sigma:.3g}", power_weights(steps, power_gamma(float(sigma))))
        for sigma in np.geomspace(*_SIGMA_REL, 31)
    ]
    named += [(f"line {size:g}", last + size * (last - mean)) for size in LINE_STEPS]
    for i in sorted({0, (number - 1) // 2}):
        named += [(f"neon {steps[i]} {w:g}", (1 + w) * last - w * every[i]) for w in NEON_WEIGHTS]
    found: dict[bytes, tuple[str, Array]] = {}
    for name, weights in named:
        # + 0.0 makes one of the two zeros
        found.setdefault((weights.round(9) + 0.0).tobytes(), (name, weights))
    return dict(found.values())
