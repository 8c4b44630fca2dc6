"""What a calibration and all rivals will cost, from a calibration, in a dry run of few samples, and a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from genlight.loops.cost import FirstValidation, first_validation, method_cost, report_line, timed
from genlight.loops.quantization_bits import check_budget, choices_of, ways_of
from genlight.loops.quantization_latency import TIMES, TURNS
from genlight.loops.quantization_libraries import library_phases
from genlight.loops.quantization_report import DEQUANTIZED, FULL, LAYERS, TORCHAO, VARIANTS, variants_of
from genlight.loops.quantization_samples import SAMPLES, samples_each
from genlight.loops.quantization_sensitivity import measured_layer, probes_of
from genlight.loops.quantization_settings import check_metrics
from genlight.loops.quantization_speed import ROUNDS, SPEED, step_times
from genlight.loops.quantization_variants import Variant
from genlight.loops.quantization_work import CALIBRATION, QuantizationWork, checked_work
from genlight.quantization.accounting import tensor_bytes
from genlight.reports.cost import CostEstimate, Phase, PlannedFile

if TYPE_CHECKING:
    from genlight.loops.quantization_calibrate import QuantizationCalibration
    from genlight.loops.quantization_settings import MixedBits

_MEASURED = 3
# tokens that never change are found over so many samples
_LEAST_SAMPLES = 8
_SHARE = 8
_TOGETHER = 8


def quantization_cost(method: QuantizationCalibration, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
    """The cost of a dry run's method: what is measured is a calibration of few samples."""
    few = min(method.samples, max(_LEAST_SAMPLES, method.samples // _SHARE))
    work = checked_work(replace(method, samples=few), trainer, module, datamodule)
    first = first_validation(trainer, module, datamodule, dry=True)
    check_metrics(method.groups, first.logged)
    if method.mixed is not None:
        check_budget(work, method.mixed)
    (calibrated,) = timed([lambda: work.calibrated])
    # several processes measure full precision once more, each all of it
    whole = first.every * work.evaluations.shares if work.evaluations.shares > 1 else 0
    phases = [
        Phase(FULL, first.batch_seconds, whole),
        Phase("calibration", (calibrated / few,), method.samples - few),
    ]
    kept = [part for entry in work.calibrated.statistics.values() for part in vars(entry).values()]
    files = [PlannedFile(CALIBRATION, sum(part.nbytes for part in kept if isinstance(part, Tensor)))]
    return calibrated_cost(work, first, phases, [] if method.statistics is not None else files)


def calibrated_cost(
    work: QuantizationWork,
    first: FirstValidation,
    phases: Sequence[Phase] = (),
    files: Sequence[PlannedFile] = (),
) -> CostEstimate:
    """What is left once the network is calibrated.

    Args:
        work: of the run, with nothing quantized.
        first: validation in full precision.
        phases: what comes before that.
        files: likewise.
    """
    method, mixed = work.method, work.method.mixed
    if method.special:
        work.special  # noqa: B018 - it takes a calibration's time, and only once
    # a batch of one would take far more than its share
    count = min(method.trajectory, _TOGETHER)
    plain = work.reference("search", count)
    # in a network of which every layer is quantized, in the way that takes least time to make
    layers = work.layers(Variant("dynamic", "none", "nearest"))
    with work.replaced(layers):
        replay = timed([lambda: work.noise(plain)] * 2)[0] / count
        sample = timed([lambda: work.images(plain)])[0] / count
        line = report_line(work.evaluations, work.module, work.datamodule)
        packed = tensor_bytes(work.network)
    (turn,) = timed([lambda: step_times(work, layers, rounds=1)])
    probes = [] if mixed is None else probes_of(mixed, work.groups)
    layer: tuple[float, ...] = (0.0,)
    if mixed is not None:
        # with and without images, as many of each as there are
        probes.sort(key=lambda probe: work.metrics[probe[0]])
        chosen = probes[:: max(1, len(probes) // (_MEASURED + 1))][: _MEASURED + 1]
        layer = timed([partial(measured_layer, work, mixed, *probe) for probe in chosen])
    each = line.seconds(work.datamodule.num_samples) + (sample + replay) * method.trajectory
    variants = variants_of(method, {way: {} for way in ways_of(mixed)})
    seconds = tuple(each + _making(work, variant) for variant in variants)
    tried = 0 if mixed is None else len(mixed.ratios)
    images = fmean(seconds) - each + sample * (mixed.samples if mixed is not None else 0)
    phases = [
        *phases,
        Phase(LAYERS, layer, work.evaluations.rounds(len(probes))),
        *([] if mixed is None or mixed.milliseconds is None else [_times_of_layers(work, mixed, replay)]),
        *(library_phases(work, each, sample) if method.rivals else []),
        Phase("ratios of budgets", (images,), tried),
        Phase(VARIANTS, seconds, work.evaluations.rounds(len(variants))),
        Phase(SPEED, (turn,), ROUNDS),
        Phase(SAMPLES, (sample,), samples_each(work) if method.samples_out else 0),
    ]
    return method_cost(work.evaluations, first, phases, [*files, *_artifacts(work, packed)], pictures=5)


def _artifacts(work: QuantizationWork, packed: int) -> list[PlannedFile]:
    """Folders of the whole pipeline, whose quantized network takes `packed` bytes."""
    whole = tensor_bytes(getattr(work.module, "networks", work.module))
    # text encoders and the autoencoder of a pipeline are in each of them
    small = whole - tensor_bytes(work.network) + packed
    files = [PlannedFile("artifact", small)]
    files += [PlannedFile(f"artifact/{TORCHAO}", small)] if work.method.torchao else []
    return files + ([PlannedFile(f"artifact/{DEQUANTIZED}", whole)] if work.method.dequantized else [])


def _times_of_layers(work: QuantizationWork, mixed: MixedBits, replay: float) -> Phase:
    """As if each layer had a shape of its own; `replay` is seconds of all calls for one sample."""
    call = replay / len(work.contexts) * int(work.datamodule.eval_batch_size)
    return Phase(TIMES, (call,), (len(choices_of(mixed)) + 1) * (TURNS + 1))


def _making(work: QuantizationWork, variant: Variant) -> float:
    """Seconds of the layers of a variant, from a few of them; the first of its kind balances its inputs besides."""
    names = list(work.forms)
    chosen = names[:: max(1, len(names) // _MEASURED)][:_MEASURED]
    return timed([lambda: work.layers_of(variant, chosen)])[0] * len(names) / len(chosen)
