"""Gauss-Newton's normal equations of a fit, by differences of samples: the network needs no gradients.

A table is a few numbers, so the way from a vector of parameters to samples has a narrow middle. Samples are
differentiated by the entries of the table, where tables that differ in one row share all evaluations before it; the
entries are differentiated by the parameters, which costs no evaluations.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.teacher import TuningProblem

_CHAIN_DIFFERENCE = 1e-4
_DIFFERENCES = {torch.float64: 1e-5, torch.float32: 2e-3}
# in 16 bits, which round a state of size 1 by 2e-3
_COARSE_DIFFERENCE = 6e-2


def normal_equations(
    problem: TuningProblem,
    make: Callable[[Tensor], SolverTable],
    raw: Tensor,
    difference: float | None = None,
    *,
    central: bool = True,
) -> tuple[Tensor, Tensor]:
    """(JᵀJ, Jᵀr) [P, P] and [P] of the training residuals r over √(number of elements), so that rᵀr is the squared RMS.

    J is by differences in the entries of the table, row by row: tables that differ in row i only share the evaluations
    before i. The way from parameters to entries is differentiated exactly where tables carry gradients, else by
    differences too. Where no parameter moves an entry, both are zero.

    Args:
        difference: None: what suits the precision of the states, see `goes_both_ways`.
        central: differences to both sides; one side costs half as much and is off by the order of `difference`.
    """
    table = detached(make(raw))
    chain = _chain(make, raw)
    used = chain.any(1).nonzero().flatten()
    if len(used) == 0:
        return torch.zeros(len(raw), len(raw), dtype=torch.float64), torch.zeros(len(raw), dtype=torch.float64)
    central = goes_both_ways(problem.dtype, difference, central)
    difference = difference or _DIFFERENCES.get(problem.dtype, _COARSE_DIFFERENCE)
    # the root, so that differences stay above float32's rounding where the noise is small; above that of 16 bits, one
    # size for all noise
    power = 0.5 if problem.dtype in _DIFFERENCES else 0.0
    steps = _neighbours(table, problem.prediction.schedule, used, difference, central, power)
    most = max(len(pairs) for pairs in steps)
    size = table.nfe + 1
    curvature, slope = torch.zeros(len(used), len(used), dtype=torch.float64), torch.zeros(len(used)).double()
    with torch.no_grad():
        for part in problem.train.chunks(max(1, problem.batch_rows // ((1 + central) * most))):
            own = problem.sample(part, table).double().flatten()
            residual = own - part.target.double().flatten()
            columns = residual.new_zeros(len(used), len(residual))
            for pairs in steps[:size]:
                if pairs:
                    ups, downs = [up for _, up, _, _ in pairs], [down for _, _, down, _ in pairs if central]
                    found = problem.sample_many(part, [*ups, *downs]).double().flatten(1)
                    widths = found.new_tensor([width for *_, width in pairs])[:, None]
                    below = found[len(ups) :] if central else own
                    columns[[index for index, *_ in pairs]] = (found[: len(ups)] - below) / widths
            curvature += (columns @ columns.T).cpu()
            slope += (columns @ residual).cpu()
    chain, count = chain[used], problem.train.target.numel()
    return chain.T @ curvature @ chain / count, chain.T @ slope / count


def goes_both_ways(dtype: torch.dtype, difference: float | None, central: bool) -> bool:
    """Whether differences are to both sides: where asked for, and by default the large ones of states of 16 bits."""
    return central or (difference is None and dtype not in _DIFFERENCES)


def _chain(make: Callable[[Tensor], SolverTable], raw: Tensor) -> Tensor:
    """The derivative of the entries by the parameters, [entries, P]."""
    with torch.enable_grad():
        values = raw.detach().clone().requires_grad_()
        entries = _entries(make(values))
    if entries.requires_grad:
        return torch.autograd.functional.jacobian(lambda values: _entries(make(values)), raw)
    columns = []
    for index in range(len(raw)):
        ends = []
        for difference in (_CHAIN_DIFFERENCE, -_CHAIN_DIFFERENCE):
            moved = raw.detach().clone()
            moved[index] += difference
            try:
                ends.append((difference, _entries(make(moved))))
            except ValueError:  # beyond what makes a table
                ends.append((0.0, entries))
        (up, above), (down, below) = ends
        columns.append((above - below) / (up - down) if up != down else torch.zeros_like(entries))
    return torch.stack(columns, 1)


def _entries(table: SolverTable) -> Tensor:
    """Everything in a table that may be tuned: weights row by row, then times."""
    rows, columns = torch.tril_indices(table.nfe + 1, table.nfe + 1)
    return torch.cat([table.weights[rows, columns], table.times])


def _neighbours(
    table: SolverTable, noise_schedule: NoiseSchedule, used: Tensor, difference: float, central: bool, power: float
) -> list[list[tuple[int, SolverTable, SolverTable, float]]]:
    """For each row of the table: (position in `used`, table above, table below, distance) of its entries; the table
    below is the table itself unless `central`. Weights are moved by the `power` of their units."""
    size = table.nfe + 1
    rows, columns = torch.tril_indices(size, size)
    units = weight_units(table, noise_schedule)
    units[:, 1:] **= power
    units[:, 0] = units[:, 1] / table.initial_scale
    low, high = noise_schedule.half_log_snr(noise_schedule.t_max), noise_schedule.half_log_snr(noise_schedule.t_min)
    result: list[list[tuple[int, SolverTable, SolverTable, float]]] = [[] for _ in range(size)]
    for position, entry in enumerate(used.tolist()):
        if entry < len(rows):
            row, column = int(rows[entry]), int(columns[entry])
            moved = torch.zeros_like(table.weights)
            moved[row, column] = difference * units[row, column]
            up = replace(table, weights=table.weights + moved)
            down = replace(table, weights=table.weights - moved) if central else table
            width = (up.weights - down.weights)[row, column].item()
        else:
            row = entry - len(rows)
            half_log_snr = noise_schedule.half_log_snr(table.times[row].item())
            # away from the nearer end of the noise schedule where one side must do
            away = difference if half_log_snr - low < high - half_log_snr else -difference
            ends = [min(max(half_log_snr + d, low), high) for d in (away, -away)][: 1 + central]
            times = [table.times.clone() for _ in ends]
            for values, end in zip(times, ends, strict=True):
                values[row] = noise_schedule.t_of_half_log_snr(end)
            up, down, *_ = *(replace(table, times=values) for values in times), table
            width = (up.times - down.times)[row].item()
        result[row].append((position, up, down, width))
    return result


def weight_units(table: SolverTable, noise_schedule: NoiseSchedule) -> Tensor:
    """What counts as one unit of each weight [E + 1, E + 1]: the noise level σ of its row, that of the last evaluation
    for the result, shared out by the size of what it weighs."""
    sigma = noise_schedule.sigma(table.times.detach())
    rows = torch.cat([sigma, sigma[-1:]])[:, None].expand(-1, len(sigma) + 1).clone()
    rows[:, 0] /= table.initial_scale
    return rows


def detached(table: SolverTable) -> SolverTable:
    """The same numbers without gradients."""
    return replace(
        table,
        weights=table.weights.detach().clone(),
        mean_weights=table.mean_weights.detach().clone(),
        times=table.times.detach().clone(),
    )
