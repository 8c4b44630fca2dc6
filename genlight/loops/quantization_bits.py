"""Bits of each layer from what each layer does alone: within one budget, in several ways, and over many budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from genlight.errors import in_config
from genlight.loops.quantization_latency import LayerTimes, latency_facts, layer_times
from genlight.loops.quantization_sensitivity import Sensitivity
from genlight.loops.quantization_variants import Variant
from genlight.loops.quantization_work import QuantizationWork
from genlight.quantization.allocation import (
    Allocation,
    Array,
    allocate_by_threshold,
    allocate_greedily,
    allocate_randomly,
    allocate_uniformly,
    group_budgets,
    pareto_allocations,
    solve_allocation,
)
from genlight.quantization.formats import FLOAT_BITS
from genlight.quantization.packing import packed_width
from genlight.quantization.trajectory import decibels

if TYPE_CHECKING:
    from genlight.loops.quantization_settings import MixedBits

# how bits are chosen: by what each group controls, exactly; and the rivals within the same budget
WAYS = ("mixed", "mixed, greedy", "mixed by weight error", "mixed by proxy", "mixed by threshold", "uniform bits")
# where bits of inputs are chosen too: one metric for all, sums of dB over all layers or (the paper) within budgets of
# groups, and chance
ONE_METRIC, SUM_DB = "mixed, one metric", "mixed, one sum of dB for all layers"
BUDGETS, RANDOM = "mixed by group budgets", "random bits"
_RANDOM_SEEDS = 3
_FRONT_POINTS = 9
_LEAST_QUALITY_BITS = 4  # of weights judged by predictions, in the MixDQ paper's budgets by group

# bits of the weight, and of the input; None: those of the settings
Choice = tuple[int, int | None]


def ways_of(mixed: MixedBits | None) -> tuple[str, ...]:
    """Names of the ways in which bits are chosen; () without mixed bits."""
    if mixed is None:
        return ()
    if mixed.activation_choices is None:
        return WAYS
    budgets = (BUDGETS,) if mixed.ratios and mixed.objective != "group_budgets" else ()
    return (*WAYS, ONE_METRIC, SUM_DB, *budgets, *(f"{RANDOM} {seed}" for seed in range(_RANDOM_SEEDS)))


class BitCosts:
    """What each choice of each layer costs, and what is allowed, as far as that is known before layers are measured.

    A layer whose group may not have a choice has in its column the nearest that it may have.

    Attributes:
        names: of the layers, rows of all tables.
        choices: columns of all tables, cheapest first.
        weights: numbers in the weight of each layer.
        every: costs by the names of all limits that there are; "megabytes" has the bytes of codes alone.
        units: by which a limit is multiplied to be one of a sum of costs, by its name.
        limits: of the sums of costs, those that are given.
    """

    def __init__(self, work: QuantizationWork, mixed: MixedBits) -> None:
        self.work, self.mixed = work, mixed
        self.names = list(work.forms)
        self.choices = choices_of(mixed)
        self._own = [_as_may_be(self.choices, *mixed.choices_in(work.groups[name])) for name in self.names]
        layers: dict[str, Any] = {name: work.network.get_submodule(name) for name in self.names}
        weights = {name: layer.weight.numel() for name, layer in layers.items()}
        self.weights = np.array(list(weights.values()), dtype=np.float64)
        self.every = {
            "average_bits": self._costs(lambda name, choice: weights[name] * choice[0]),
            "average_activation_bits": self._costs(lambda name, choice: work.inputs[name] * (choice[1] or 0)),
            "megabytes": self._costs(lambda name, choice: _bytes_of_codes(layers[name].weight, choice[0])),
            "bit_operations": self._costs(
                lambda name, choice: work.macs[name] * choice[0] * (choice[1] or work.forms[name].activation.bits)
            ),
        }
        self.units = {
            "average_bits": float(self.weights.sum()),
            "average_activation_bits": float(sum(work.inputs[name] for name in self.names)),
            "megabytes": 1e6,
            "bit_operations": float(self.every["bit_operations"].max(axis=1).sum()),
        }
        given = {name: getattr(mixed, name) for name in self.units}
        self.limits = {name: float(value * self.units[name]) for name, value in given.items() if value is not None}

    def check(self) -> None:
        """Raises ValueError where a limit is below what the least choices come to."""
        for name, limit in self.limits.items():
            least = int(self.every[name].min(axis=1).sum())
            if math.floor(limit) < least:
                known = math.ceil(1e4 * least / self.units[name]) / 1e4
                value = getattr(self.mixed, name)
                raise ValueError(f"{name} = {value:g} is below {known:g}, the least that the choices of layers come to")

    def _costs(self, cost: Callable[[str, Choice], float]) -> Array:
        rows = zip(self.names, self._own, strict=True)
        return np.array([[cost(name, choice) for choice in own] for name, own in rows], dtype=np.float64)


class BitChoices(BitCosts):
    """The program of a network: what each choice of each layer costs and does, and what is allowed.

    Attributes:
        times: of the layers, if milliseconds are limited.
        costs: of the limits that are given.
        decibels: losses that add up signal-to-noise ratios; an input that is not rounded counts as in the most bits in
            which it is, for beside its 200 dB nothing else would matter.
        unproved: ways of choosing, for which the solver stopped before it had proved its answer.
    """

    def __init__(self, work: QuantizationWork, mixed: MixedBits, found: Sequence[Sensitivity]) -> None:
        """From the sensitivities of all layers in all bits; measures their times where these are limited.

        Raises ValueError where a limit is below what the least, or the fastest, choices come to.
        """
        super().__init__(work, mixed)
        self._found = {(entry.layer, entry.bits, entry.activation_bits): entry for entry in found}
        self.every["megabytes"] = self.table(lambda entry: entry.bytes, of_weights=True)
        self.check()
        self.times: LayerTimes | None = None
        if mixed.milliseconds is not None:
            self.times = layer_times(work, dict(zip(self.names, self._own, strict=True)))
            self.every["milliseconds"] = self._costs(self.times.of)
            self.limits["milliseconds"] = self._limit_of_time(self.times, mixed.milliseconds)
        self.costs = {name: self.every[name] for name in self.limits}
        inputs = {e.layer: e.noise for e in found if e.bits == FLOAT_BITS > (e.activation_bits or FLOAT_BITS)}
        self.decibels = self.table(
            lambda e: -decibels(inputs.get(e.layer, 1.0) if e.bits == e.activation_bits == FLOAT_BITS else e.noise)
        )
        self.unproved: list[str] = []

    def solve(
        self,
        way: str,
        losses: Array,
        costs: Mapping[str, Array] | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> Allocation:
        """The choices with the least sum of losses within all limits, or within others of some layers.

        Args:
            way: of choosing, to which the answer belongs.
            losses: of each layer and choice.
            costs: likewise, by name; None: those of all layers.
            limits: None: those that are given.
        """
        found = solve_allocation(losses, costs or self.costs, limits or self.limits)
        if found.gap and way not in self.unproved:
            self.unproved.append(way)
        return found

    def _limit_of_time(self, times: LayerTimes, milliseconds: float) -> float:
        limit, least = times.limit(milliseconds), int(self.every["milliseconds"].min(axis=1).sum())
        if limit < least:
            raise ValueError(
                f"milliseconds = {milliseconds:g} is below {times.call(least):.3f}, the least that one call of the "
                f"network with {times.samples} samples is predicted to take on this machine"
            )
        return float(limit)

    def table(self, value: Callable[[Sensitivity], float], *, of_weights: bool = False) -> Array:
        """A number of each layer and choice: that of its weight, and added to it that of its input."""

        def one(name: str, choice: Choice) -> float:
            bits, activation = choice
            if activation is None:
                return value(self._found[name, bits, None])
            weight = value(self._found[name, bits, FLOAT_BITS])
            return weight if of_weights else weight + value(self._found[name, FLOAT_BITS, activation])

        return self._costs(one)

    def bits(self, chosen: Sequence[int]) -> dict[str, Choice]:
        """The choices of a solver by layer."""
        return {name: own[j] for name, own, j in zip(self.names, self._own, chosen, strict=True)}

    def groups(self) -> dict[str, list[int]]:
        """Rows of the layers that are judged by each metric."""
        found: dict[str, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(self.work.metrics[name], []).append(row)
        return found


def choices_of(mixed: MixedBits) -> list[Choice]:
    """Bits that a layer may have, cheapest first."""
    if mixed.activation_choices is None:
        return [(bits, None) for bits in sorted(mixed.choices)]
    pairs = list(product(sorted(mixed.choices), sorted(mixed.activation_choices)))
    pairs.sort(key=lambda pair: (pair[0] * pair[1], pair))
    return [*pairs]


def _as_may_be(choices: Sequence[Choice], weights: Sequence[int], inputs: Sequence[int] | None) -> list[Choice]:
    """The nearest that a layer may have to each choice."""

    def nearest(bits: int | None, among: Sequence[int] | None) -> Any:
        return None if bits is None or among is None else min(among, key=lambda own: (abs(own - bits), own))

    return [(nearest(weight, weights), nearest(activation, inputs)) for weight, activation in choices]


def _bytes_of_codes(weight: Tensor, bits: int) -> int:
    if bits == FLOAT_BITS:
        return weight.nbytes
    return len(weight) * packed_width(weight[0].numel(), bits)


def check_budget(work: QuantizationWork, mixed: MixedBits) -> None:
    """Before the calibration, that each limit can be kept by itself; of megabytes and milliseconds not all is known.

    Raises:
        UserError: a limit is below what the least bits come to.
    """
    with in_config("method.mixed"):
        BitCosts(work, mixed).check()


def allocated_bits(
    work: QuantizationWork, mixed: MixedBits, found: Sequence[Sensitivity]
) -> tuple[dict[str, dict[str, Choice]], dict[str, Any]]:
    """Bits of each layer, by the way they were chosen, all within the budget; and facts of the exact program.

    Raises:
        UserError: the budget is below what the least bits come to, or the fastest where milliseconds are limited.
    """
    with in_config("method.mixed"):
        program = BitChoices(work, mixed, found)
        noise = program.table(lambda e: e.noise)
        best = program.solve(ONE_METRIC, noise)
        budgets = _by_budgets(program) if mixed.ratios else ()
        if mixed.objective == "group_budgets":
            own = budgets
        else:
            losses = program.decibels if mixed.objective == "sum_db" else noise
            own = _decoupled(program, program.solve(WAYS[0], losses).chosen)
        # inputs have no error of a weight
        errors = program.table(lambda e: e.weight_error if e.bits < FLOAT_BITS else e.layer_noise)
        ways = {
            WAYS[0]: own,
            WAYS[1]: allocate_greedily(noise, program.costs, program.limits),
            WAYS[2]: program.solve(WAYS[2], errors).chosen,
            WAYS[3]: program.solve(WAYS[3], program.table(lambda e: e.layer_noise)).chosen,
            WAYS[4]: allocate_by_threshold(_relative_errors(program), program.costs, program.limits),
            WAYS[5]: allocate_uniformly(program.costs, program.limits),
            ONE_METRIC: best.chosen,
            BUDGETS: budgets,
        }
        if mixed.activation_choices is not None:
            ways[SUM_DB] = program.solve(SUM_DB, program.decibels).chosen
            for seed in range(_RANDOM_SEEDS):
                ways[f"{RANDOM} {seed}"] = allocate_randomly(program.costs, program.limits, seed)
        facts = {
            "predicted_sqnr": decibels(float(noise[range(len(noise)), ways[WAYS[0]]].sum())),
            "optimality_gap": best.gap / best.loss if best.loss else 0.0,
            "unproved": [way for way in ways_of(mixed) if way in program.unproved],
            "front": _front(program, noise, "average_bits"),
            "memory_front": _front(program, noise, "megabytes"),
        }
    bits = {way: program.bits(ways[way]) for way in ways_of(mixed)}
    if program.times is not None and mixed.milliseconds is not None:
        uniform = [program.bits([j] * len(program.names)) for j in range(len(program.choices))]
        facts["latency"] = latency_facts(program.times, mixed.milliseconds, bits, uniform)
    return bits, facts


def _relative_errors(program: BitChoices) -> Array:
    """Error of the weight over its variance; an input, which has none, counts with the noise of its layer's output."""
    layers = program.work.calibrated.layers
    variances = {name: float(layers[name].weight.detach().float().var(correction=0)) for name in program.names}
    return program.table(
        lambda e: e.weight_error / (variances[e.layer] or 1.0) if e.bits < FLOAT_BITS else e.layer_noise
    )


def _decoupled(program: BitChoices, exact: tuple[int, ...]) -> tuple[int, ...]:
    """Each metric's layers share what errors of the prediction gave them, by their own metric."""
    chosen = list(exact)
    for metric, rows in program.groups().items():
        if metric != "sqnr":
            losses = program.table(lambda entry, metric=metric: entry.loss(metric))[rows]  # type: ignore[misc]
            own = {name: cost[rows] for name, cost in program.costs.items()}
            share = {name: sum(float(cost[i, exact[i]]) for i in rows) for name, cost in program.costs.items()}
            for i, j in zip(rows, program.solve(WAYS[0], losses, own, share).chosen, strict=True):
                chosen[i] = j
    return tuple(chosen)


def _by_budgets(program: BitChoices) -> tuple[int, ...]:
    """The paper's way: a budget for each group by a ratio, sums of dB or SSIM within it, and the ratio that does best.

    What is judged by predictions has four bits or more there, unless no ratio leaves it that many, and no input stays
    in floating point that may be rounded. Ratios are tried on the images of the select draw. Those with a budget below
    the least bits are left out.
    """
    work, mixed = program.work, program.mixed
    for least in (_LEAST_QUALITY_BITS, 0):
        best, best_error = None, np.inf
        for ratio in mixed.ratios:
            try:
                chosen = _at_ratio(program, ratio, least)
            except ValueError:  # a budget below the least bits
                continue
            error = work.image_error(Variant.mixed(work.method, BUDGETS, program.bits(chosen)), mixed.samples)
            error = error if math.isfinite(error) else np.inf
            if best is None or error < best_error:
                best, best_error = chosen, error
        if best is not None:
            return best
    raise ValueError(f"ratios = {list(mixed.ratios)}: none of them gives budgets that can be kept")


def _at_ratio(program: BitChoices, ratio: float, least: int) -> tuple[int, ...]:
    """A choice for each layer, where layers judged by predictions have weights of `least` bits or more.

    Raises:
        ValueError: the budget of a group is below the least bits that it may have.
    """
    way = WAYS[0] if program.mixed.objective == "group_budgets" else BUDGETS
    groups = program.groups()
    quality = groups.get("sqnr", [])
    content = [row for rows in groups.values() for row in rows if row not in set(quality)]
    weights = program.weights
    average = float(program.mixed.average_bits or 0.0)
    budgets = group_budgets(average, ratio, float(weights[content].sum() / weights.sum()))
    losses = program.decibels.copy()
    for metric, rows in groups.items():
        if metric != "sqnr":
            losses[rows] = program.table(lambda entry, metric=metric: entry.loss(metric))[rows]  # type: ignore[misc]
    rounded = [j for j, (_, inputs) in enumerate(program.choices) if inputs != FLOAT_BITS]
    every = rounded or range(len(program.choices))
    columns = ([*every], [j for j in every if program.choices[j][0] >= least])
    chosen = [0] * len(program.names)
    for rows, of, budget in zip((content, quality), columns, budgets, strict=True):
        costs = {name: cost[np.ix_(rows, of)] for name, cost in program.costs.items()}
        limits = {}
        for name, cost in program.costs.items():
            limits[name] = program.limits[name] * float(cost[rows].max(1).sum() / cost.max(1).sum())
        limits["average_bits"] = float(budget * weights[rows].sum())
        found = program.solve(way, losses[np.ix_(rows, of)], costs, limits).chosen if rows else ()
        for row, j in zip(rows, found, strict=True):
            chosen[row] = of[j]
    return tuple(chosen)


def _front(program: BitChoices, noise: Array, name: str) -> list[dict[str, float]]:
    """What the least noise would be within other limits of the size of weights, all limits of anything else kept."""
    costs = program.every[name]
    values = np.linspace(float(costs.min(1).sum()), float(costs.max(1).sum()), _FRONT_POINTS).tolist()
    others = {key: limit for key, limit in program.limits.items() if key not in ("average_bits", "megabytes")}
    return [
        {
            name: value / program.units[name],
            "predicted_sqnr": decibels(found.loss),
            "gap": found.gap / (found.loss or 1),
        }
        for value, found in pareto_allocations(noise, program.every, others, name, values)
    ]
