"""How much each layer in few bits costs the whole network, one layer at a time; each answer is kept at once.

What chooses bits within a group of layers is the metric that the group controls (ViDiT-Q, arXiv:2406.02540, section on
metric-decoupled mixed precision); how much of the budget a group gets is decided by errors of the prediction.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from scipy.stats import spearmanr

from genlight import io
from genlight.callbacks.signals import RunInterrupted, SignalGuard
from genlight.errors import UserError
from genlight.loops.evaluation import in_rounds
from genlight.loops.quantization_settings import METRICS
from genlight.loops.quantization_variants import Variant
from genlight.loops.quantization_work import QuantizationWork
from genlight.metrics.paired import image_scores
from genlight.quantization.accounting import tensor_bytes
from genlight.quantization.formats import FLOAT_BITS
from genlight.quantization.recipe import layer_noise, weight_error
from genlight.quantization.trajectory import decibels
from genlight.search.archive import seal, unseal

if TYPE_CHECKING:
    from genlight.loops.quantization_settings import GroupSettings, MixedBits

FILE = "search/sensitivity/history.jsonl"
_KIND, _VERSION = "sensitivity", 4
# noise-to-signal ratio that stands for all that are worse and for predictions that are no numbers: beside it a sum of
# losses still tells others apart
_WORST = 100.0
_FARTHEST = 1e6  # likewise of metrics


@dataclass(frozen=True)
class Sensitivity:
    """What one layer in some bits does, all others in full precision.

    Attributes:
        layer: its name.
        bits: of its weight.
        activation_bits: of its input; None: those of the settings.
        noise: noise-to-signal ratio of the network's predictions along the trajectory, 100 at most.
        psnr: of the images against those of full precision, in dB; None where the layer's group asks for no images.
        ssim: likewise.
        motion: change of the motion of videos, in pixels a frame; likewise, and None of images.
        shift: how far what `validate` logs is from that of full precision, 10⁶ at most; None where the layer's group
            asks for another metric.
        layer_noise: the cheap proxy: noise-to-signal ratio of the layer's own output, 100 at most.
        weight_error: mean squared error of its weight.
        bytes: that it takes in memory.
    """

    layer: str
    bits: int
    activation_bits: int | None
    noise: float
    psnr: float | None
    ssim: float | None
    motion: float | None
    shift: float | None
    layer_noise: float
    weight_error: float
    bytes: int

    def loss(self, metric: str) -> float:
        """What the metric says, lower is better and additive in small errors."""
        if metric == "psnr" and self.psnr is not None:
            return float(10 ** (-self.psnr / 10))
        if metric == "ssim" and self.ssim is not None:
            return 1 - self.ssim
        if metric == "motion" and self.motion is not None:
            return self.motion**2
        return self.noise if metric in METRICS or self.shift is None else self.shift


_LINE: TypeAdapter[Sensitivity] = TypeAdapter(Sensitivity)


def probes_of(mixed: MixedBits, groups: Mapping[str, GroupSettings]) -> list[tuple[str, int, int | None]]:
    """What is measured: layer, bits of its weight and of its input, one of them at a time where both are chosen.

    Args:
        mixed: how bits are chosen.
        groups: of layers, by name, which say what a layer may have.
    """
    may = {name: mixed.choices_in(group) for name, group in groups.items()}
    alone = None if mixed.activation_choices is None else FLOAT_BITS
    inputs = sorted(mixed.activation_choices or ())
    return [
        *((name, bits, alone) for bits in sorted(mixed.choices) for name in may if bits in may[name][0]),
        *((name, FLOAT_BITS, bits) for bits in inputs for name in may if bits in (may[name][1] or ())),
    ]


def measure_sensitivity(work: QuantizationWork, mixed: MixedBits) -> list[Sensitivity]:
    """Every layer in every choice of bits, from where an earlier run stopped; several processes measure one each.

    Raises:
        UserError: the file is of another network, data or settings.
        CorruptFileError: a line is damaged.
        RunInterrupted: a signal asked to stop; what was measured is kept.
    """
    path, evaluations = work.folder / FILE, work.evaluations
    trainer, display = evaluations.trainer, evaluations.display
    header = _header(work, mixed)
    known = evaluations.agreed(_read(path, header))
    if known is None and trainer.is_global_zero:
        io.append_line(path, header)
    found: list[Sensitivity] = known or []
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    guard = next((c for c in callbacks if isinstance(c, SignalGuard)), SignalGuard())
    probes = probes_of(mixed, work.groups)
    pending = [partial(measured_layer, work, mixed, *probe) for probe in probes[len(found) :]]
    with display.phase("sensitivity", len(probes), len(found)), guard.listening():
        for entries in in_rounds(evaluations, pending):
            if trainer.is_global_zero:
                for entry in entries:
                    io.append_line(path, seal({"kind": "result", **asdict(entry)}))
            found += entries
            last = found[-1]
            note = f"{last.layer}, {min(last.bits, last.activation_bits or last.bits)} bits"
            display.show("sensitivity", len(found), note)
            if (code := guard.requested(trainer)) is not None:
                raise RunInterrupted(code)
    return found


def measured_layer(
    work: QuantizationWork, mixed: MixedBits, name: str, bits: int, activation: int | None
) -> Sensitivity:
    """One layer in some bits, in a network of full precision."""
    if bits == FLOAT_BITS == activation:  # a layer that may stay as it is
        return Sensitivity(
            name, bits, activation, 0.0, 100.0, 1.0, 0.0, 0.0, 0.0, 0.0, tensor_bytes(work.calibrated.layers[name])
        )
    group = work.calibrated.groups[work.calibrated.group_of(name)]
    variant = Variant.mixed(work.method, "one layer", dict.fromkeys(group, (bits, activation)))
    layer = work.layers_of(variant, [name])[name]
    reference = work.reference("select", mixed.samples)
    metric, shift = work.metrics[name], None
    wants_images = mixed.every_metric or metric in ("psnr", "ssim", "motion")
    full = None if metric in METRICS else work.full_metric(metric, mixed.samples)
    with work.replaced({name: layer}):
        noise = work.noise(reference)
        scores = image_scores(work.images(reference), reference.images) if wants_images else {}
        if full is not None:
            shift = _bounded(abs(work.metric(metric, mixed.samples) - full), _FARTHEST)
    if not math.isfinite(noise):
        own = "its own" if activation is None else activation
        warnings.warn(
            f"{name} with {bits} bits a weight and {own} an input: predictions are not finite, which counts as "
            f"{decibels(_WORST):g} dB",
            stacklevel=2,
        )
    return Sensitivity(
        name, bits, activation, _bounded(noise), scores.get("psnr"), scores.get("ssim"), scores.get("motion"),
        shift, _bounded(layer_noise(work.calibrated, name, layer)),
        weight_error(work.calibrated.layers[name], layer),
        tensor_bytes(layer),
    )  # fmt: skip


def _bounded(value: float, most: float = _WORST) -> float:
    return value if value < most else most  # NaN is not less


def proxy_correlation(work: QuantizationWork, found: list[Sensitivity]) -> dict[str, float]:
    """Spearman's rank correlation of the cheap proxy with the metric of each layer's group, by bits."""
    result = {}
    for bits, activation in sorted({(entry.bits, entry.activation_bits) for entry in found}, key=str):
        entries = [entry for entry in found if (entry.bits, entry.activation_bits) == (bits, activation)]
        if len(entries) < 3 or bits == activation:
            continue
        kind = f"{bits}_bits" if bits != FLOAT_BITS else f"{activation}_bits_input"
        measured = [entry.loss(work.metrics[entry.layer]) for entry in entries]
        rank = float(spearmanr([entry.layer_noise for entry in entries], measured).statistic)
        result[f"proxy_rank_correlation_{kind}"] = rank
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
        "choices": json.dumps({name: mixed.choices_in(group) for name, group in work.groups.items()}, sort_keys=True),
        "images": "of all layers" if mixed.every_metric else "of layers that are judged by them",
        "inputs": f"{method.activation_mode} {method.parts_in_words}",
    }
    return seal({"kind": _KIND, "version": _VERSION, "fingerprint": fingerprint})


def _read(path: Any, header: str) -> list[Sensitivity] | None:
    """What was measured before; None where the file was not begun."""
    lines = io.read_lines(path) if path.exists() else []
    if not lines:
        return None
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
