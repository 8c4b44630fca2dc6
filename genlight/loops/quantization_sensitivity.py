"""How much each layer in few bits costs the whole network, one layer at a time; each answer is kept at once.

What chooses bits within a group of layers is the metric that the group controls (ViDiT-Q, arXiv:2406.02540, section on
metric-decoupled mixed precision); how much of the budget a group gets is decided by errors of the prediction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from scipy.stats import spearmanr

from genlight import io
from genlight.callbacks.progress import StepProgress
from genlight.callbacks.signals import RunInterrupted, SignalGuard
from genlight.errors import UserError, in_config
from genlight.loops.quantization_work import QuantizationWork, Variant, image_scores
from genlight.quantization.accounting import tensor_bytes
from genlight.quantization.allocation import Array, allocate, allocate_greedily
from genlight.quantization.recipe import layer_noise, weight_error
from genlight.search.archive import seal, unseal

if TYPE_CHECKING:
    from genlight.loops.quantization_settings import MixedBits

FILE = "search/sensitivity/history.jsonl"
# how bits are chosen: as the paper does but exactly; and the rivals within the same budget
WAYS = ("mixed", "mixed, greedy", "mixed by weight error", "mixed by proxy")
_KIND, _VERSION = "sensitivity", 1


@dataclass(frozen=True)
class Sensitivity:
    """What one layer in some bits does, all others in full precision.

    Attributes:
        layer: its name.
        bits: of its weight; its input has the bits of the settings.
        noise: noise-to-signal ratio of the network's predictions along the trajectory.
        psnr: of the images against those of full precision, in dB; None where no group asks for images.
        ssim: likewise.
        layer_noise: the cheap proxy: noise-to-signal ratio of the layer's own output.
        weight_error: mean squared error of its weight.
        bytes: that it takes in memory.
    """

    layer: str
    bits: int
    noise: float
    psnr: float | None
    ssim: float | None
    layer_noise: float
    weight_error: float
    bytes: int

    def loss(self, metric: str) -> float:
        """What the metric says, lower is better and additive in small errors."""
        if metric == "psnr" and self.psnr is not None:
            return float(10 ** (-self.psnr / 10))
        if metric == "ssim" and self.ssim is not None:
            return 1 - self.ssim
        return self.noise


_LINE: TypeAdapter[Sensitivity] = TypeAdapter(Sensitivity)


def measure_sensitivity(work: QuantizationWork, mixed: MixedBits) -> list[Sensitivity]:
    """Every layer in every choice of bits, from where an earlier run stopped.

    Raises:
        UserError: the file is of another network, data or settings.
        CorruptFileError: a line is damaged.
        RunInterrupted: a signal asked to stop; what was measured is kept.
    """
    path, header = work.folder / FILE, _header(work, mixed)
    found = _read(path, header)
    trainer = work.evaluations.trainer
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    guard = next((c for c in callbacks if isinstance(c, SignalGuard)), SignalGuard())
    display = next((c.display for c in callbacks if isinstance(c, StepProgress)), None)
    pending = [(name, bits) for bits in sorted(mixed.choices) for name in work.forms]
    if display is not None:
        display.start("sensitivity", len(pending), len(found))
    try:
        with guard.listening():
            for number, (name, bits) in enumerate(pending[len(found) :], start=len(found) + 1):
                if guard.requested(trainer) is not None:
                    raise RunInterrupted(guard.requested(trainer))
                entry = _one(work, mixed, name, bits)
                io.append_line(path, seal({"kind": "result", **asdict(entry)}))
                found.append(entry)
                if display is not None and display.due():
                    display.show("sensitivity", number, f"{name}, {bits} bits")
    finally:
        if display is not None:
            display.stop("sensitivity")
    return found


def _one(work: QuantizationWork, mixed: MixedBits, name: str, bits: int) -> Sensitivity:
    group = work.calibrated.groups[work.calibrated.group_of(name)]
    variant = Variant("one layer", work.method.balance, work.method.rounding, bits=dict.fromkeys(group, bits))
    layer = work.layers_of(variant, [name])[name]
    reference = work.reference("select", mixed.samples)
    wants_images = {"psnr", "ssim"} & set(work.metrics.values())
    with work.replaced({name: layer}):
        noise = work.noise(reference)
        scores = image_scores(work.images(reference), reference.images) if wants_images else {}
    return Sensitivity(
        name, bits, noise, scores.get("psnr"), scores.get("ssim"),
        layer_noise(work.calibrated, name, layer),
        weight_error(work.calibrated.layers[name], layer),
        tensor_bytes(layer),
    )  # fmt: skip


def allocated_bits(work: QuantizationWork, mixed: MixedBits, found: list[Sensitivity]) -> dict[str, dict[str, int]]:
    """Bits of each layer, by the way they were chosen, all within the budget.

    Raises:
        UserError: the budget is below what the least bits come to.
    """
    names, choices = list(work.forms), sorted(mixed.choices)
    by_place = {(entry.layer, entry.bits): entry for entry in found}

    def table(value: Any) -> Array:
        return np.array([[value(by_place[name, bits]) for bits in choices] for name in names], dtype=np.float64)

    weights = {name: work.calibrated.layers[name].weight.numel() for name in names}
    macs = {name: work.macs.get(name, 0) * work.forms[name].activation.bits for name in names}
    costs = {
        "average_bits": table(lambda e: weights[e.layer] * e.bits),
        "megabytes": table(lambda e: e.bytes),
        "bit_operations": table(lambda e: macs[e.layer] * e.bits),
    }
    limits: dict[str, float] = {}
    if mixed.average_bits is not None:
        limits["average_bits"] = mixed.average_bits * sum(weights.values())
    if mixed.megabytes is not None:
        limits["megabytes"] = mixed.megabytes * 1e6
    if mixed.bit_operations is not None:
        limits["bit_operations"] = mixed.bit_operations * float(costs["bit_operations"][:, -1].sum())
    costs = {name: costs[name] for name in limits}
    noise = table(lambda e: e.noise)
    with in_config("method.mixed"):
        exact = allocate(noise, costs, limits)
        decoupled = _decoupled(work, table, exact, costs)
        ways = (
            decoupled,
            allocate_greedily(noise, costs, limits),
            allocate(table(lambda e: e.weight_error), costs, limits),
            allocate(table(lambda e: e.layer_noise), costs, limits),
        )
    return {
        way: {name: choices[j] for name, j in zip(names, chosen, strict=True)}
        for way, chosen in zip(WAYS, ways, strict=True)
    }


def _decoupled(
    work: QuantizationWork, table: Any, exact: tuple[int, ...], costs: Mapping[str, Array]
) -> tuple[int, ...]:
    """Each metric's layers share what errors of the prediction gave them, by their own metric."""
    names, chosen = list(work.forms), list(exact)
    for metric in set(work.metrics.values()) - {"sqnr"}:
        rows = [i for i, name in enumerate(names) if work.metrics[name] == metric]
        losses = table(lambda entry, metric=metric: entry.loss(metric))[rows]
        own = {name: cost[rows] for name, cost in costs.items()}
        share = {name: sum(float(cost[i, exact[i]]) for i in rows) for name, cost in costs.items()}
        for i, j in zip(rows, allocate(losses, own, share), strict=True):
            chosen[i] = j
    return tuple(chosen)


def proxy_correlation(work: QuantizationWork, found: list[Sensitivity]) -> dict[str, float]:
    """Spearman's rank correlation of the cheap proxy with the metric of each layer's group, by bits."""
    result = {}
    for bits in sorted({entry.bits for entry in found}):
        entries = [entry for entry in found if entry.bits == bits]
        if len(entries) < 3:
            continue
        measured = [entry.loss(work.metrics[entry.layer]) for entry in entries]
        rank = float(spearmanr([entry.layer_noise for entry in entries], measured).statistic)
        result[f"proxy_rank_correlation_{bits}_bits"] = rank
    return result


def _header(work: QuantizationWork, mixed: MixedBits) -> str:
    method = work.method
    fingerprint = {
        **work.fingerprint,
        "layers": json.dumps({name: repr(form) for name, form in work.forms.items()}, sort_keys=True),
        "metrics": json.dumps(work.metrics, sort_keys=True),
        "balance": repr(method.balancing),
        "rank": str(method.rank),
        "samples": f"{method.samples} to calibrate, {mixed.samples} to compare",
        "choices": str(sorted(mixed.choices)),
    }
    return seal({"kind": _KIND, "version": _VERSION, "fingerprint": fingerprint})


def _read(path: Any, header: str) -> list[Sensitivity]:
    lines = io.read_lines(path) if path.exists() else []
    if not lines:
        io.append_line(path, header)
        return []
    if lines[0] != header:
        there, here = (unseal(line, f"line 1 of {path}") for line in (lines[0], header))
        keys = [key for key in here["fingerprint"] if there.get("fingerprint", {}).get(key) != here["fingerprint"][key]]
        raise UserError(f"{path} belongs to another calibration: {', '.join(keys) or 'another version'} differ")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        content = unseal(line, f"line {number} of {path}")
        content.pop("kind", None)
        try:
            found.append(_LINE.validate_json(json.dumps(content), strict=True, extra="forbid"))
        except ValidationError as error:
            raise io.CorruptFileError(
                f"line {number} of {path} is no sensitivity: {error.errors()[0]['msg']}"
            ) from None
    return found
