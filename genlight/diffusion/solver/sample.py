"""Sampling with compiled tables: weighted sums of noise and network outputs, and nothing else.

The network is called as everywhere in genlight: model(input_scale(t) · x_t, model_timestep(t)), with per-sample
timesteps [rows] in the type of the state. What it says is turned into data or noise by `Prediction`. The state is
float32, or float64 for float64 noise; tensors have any rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable

Model = Callable[[Tensor, Tensor], Tensor]


def sample(
    model: Model,
    noise: Tensor,
    table: SolverTable,
    prediction: Prediction,
    *,
    mean: Tensor | None = None,
    integer_timesteps: bool = False,
) -> Tensor:
    """x at the end of the table [B, ...] from standard normal noise [B, ...].

    Args:
        model: called `table.nfe` times.
        prediction: what the network predicts, and the noise schedule that the table was compiled on.
        mean: the mean image of an analytical first step, shape that broadcasts against [B, ...].
        integer_timesteps: give int64 timesteps, for networks that look them up; times between integers are an error.

    Raises ValueError for an output of another shape than x, a mean image missing, timesteps that are not integers.
    """
    return sample_many(model, noise, [table], prediction, mean=mean, integer_timesteps=integer_timesteps)[0]


def sample_many(
    model: Model,
    noise: Tensor,
    tables: Sequence[SolverTable],
    prediction: Prediction,
    *,
    mean: Tensor | None = None,
    integer_timesteps: bool = False,
) -> Tensor:
    """x at the end of each of S tables [S, B, ...] from the same standard normal noise [B, ...].

    All tables go through the network together, S · B rows at a time with the S schedules outermost: a conditional model
    repeats its conditions `len(x) // B` times. Evaluations that are the same in all tables, as the first mostly is, are
    made once, with B rows. Arguments and errors are those of `sample`; the tables must have one nfe and one basis.
    """
    plan = _plan(tables, noise, prediction, mean, integer_timesteps)
    batch, start = len(noise), noise.to(plan.weights.dtype).unsqueeze(0)
    outputs: list[Tensor] = []
    for i in range(plan.weights.shape[1]):
        # one row of tables stands for all as long as they agree
        rows = slice(0, 1) if plan.shared[i] else slice(None)
        x = _over(plan.weights[rows, i, 0], start) * start
        if mean is not None:
            x = x + _over(plan.mean_weights[rows, i], start) * mean.to(x)
        for j, output in enumerate(outputs):
            x = torch.addcmul(x, _over(plan.weights[rows, i, 1 + j], start), output)
        if i == plan.weights.shape[1] - 1:
            return x.expand(len(tables), *noise.shape) if plan.shared[i] else x
        said = model(
            (_over(plan.input_scale[rows, i], start) * x).flatten(0, 1),
            plan.timesteps[rows, i].repeat_interleave(batch),
        )
        if said.shape != (len(x) * batch, *noise.shape[1:]):
            raise ValueError(
                f"the network answers {tuple(said.shape)} to x of shape {(len(x) * batch, *noise.shape[1:])}; "
                "a network that also predicts variances must drop them"
            )
        said = said.to(x.dtype).reshape(x.shape)
        outputs.append(_over(plan.of_x[rows, i], start) * x + _over(plan.of_output[rows, i], start) * said)
    raise RuntimeError("a table without rows")


@dataclass(frozen=True)
class _Plan:
    """Everything that does not depend on the network, on the device and in the type of the state; see `SolverTable`."""

    weights: Tensor  # [S, E + 1, E + 1], column 0 weighs standard normal noise
    mean_weights: Tensor  # [S, E + 1]
    timesteps: Tensor  # [S, E]
    input_scale: Tensor  # [S, E]
    of_x: Tensor  # [S, E]: the basis output is of_x · x + of_output · network output
    of_output: Tensor  # [S, E]
    shared: list[bool]  # [E + 1]: evaluation i is the same in all tables


def _plan(
    tables: Sequence[SolverTable], noise: Tensor, prediction: Prediction, mean: Tensor | None, integers: bool
) -> _Plan:
    if not tables or len({(table.nfe, table.basis) for table in tables}) != 1:
        kinds = sorted({(table.nfe, table.basis) for table in tables})
        raise ValueError(f"tables: schedules sampled together need one (nfe, basis), not {kinds}")
    weights = torch.stack([table.weights for table in tables])
    scale = torch.tensor([table.initial_scale for table in tables], dtype=torch.float64)
    weights = torch.cat([weights[:, :, :1] * scale[:, None, None], weights[:, :, 1:]], dim=2)
    mean_weights = torch.stack([table.mean_weights for table in tables])
    if mean is None and bool(mean_weights.any()):
        raise ValueError("mean: the analytical first step 'mean' needs the mean image of the data")
    times = torch.stack([table.times for table in tables])
    of_x, of_output = _conversion(times, prediction, tables[0].basis)
    timesteps = prediction.schedule.model_timestep(times)
    whole = (timesteps.detach() == timesteps.detach().round()).flatten()
    if integers and not bool(whole.all()):
        raise ValueError(
            f"integer_timesteps: timestep {timesteps.flatten()[~whole][0].item():g} is not an integer; use "
            "spacings.on_integers, or a network that takes fractions"
        )
    device, dtype = noise.device, torch.promote_types(noise.dtype, torch.float32)

    def state(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    return _Plan(
        weights=state(weights),
        mean_weights=state(mean_weights),
        timesteps=timesteps.round().to(device, torch.int64) if integers else state(timesteps),
        input_scale=state(prediction.schedule.input_scale(times)),
        of_x=state(of_x),
        of_output=state(of_output),
        shared=_shared(weights, mean_weights, times),
    )


def _conversion(times: Tensor, prediction: Prediction, basis: str) -> tuple[Tensor, Tensor]:
    """How the output as data or noise is made of x and of what the network says, at times [S, E]: its two factors."""
    to = {"data": "sample", "noise": "epsilon"}[basis]
    zero, one = torch.zeros_like(times), torch.ones_like(times)
    # the conversion is linear, so its factors are what it makes of (x, output) = (1, 0) and (0, 1)
    of_x = prediction.convert(zero, one, times, to=to)
    of_output = prediction.convert(one, zero, times, to=to)
    bad = ~(of_x.isfinite() & of_output.isfinite())
    if bool(bad.any()):
        raise ValueError(
            f"prediction_type = {prediction.prediction_type!r} does not determine the {basis} at time "
            f"{times[bad][0].item():g}, where alpha = {prediction.schedule.alpha(times[bad][0]).item():g}"
        )
    return of_x, of_output


def _shared(weights: Tensor, mean_weights: Tensor, times: Tensor) -> list[bool]:
    """For each evaluation, and for the result: whether it and all before are the same in all tables."""
    rows = torch.cat([weights, mean_weights[:, :, None]], dim=2).detach()
    equal = (rows == rows[:1]).all(2).all(0)
    equal[:-1] &= (times == times[:1]).detach().all(0)
    return [bool(value) for value in equal.cumprod(0)]


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Values [S] shaped to multiply `like` [S, B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
