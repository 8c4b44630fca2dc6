"""What quantization made of a network, beside full precision and all rivals, on noise that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genlight import io
from genlight.callbacks.timing import print_line
from genlight.loops.evaluation import in_rounds
from genlight.loops.quantization_bits import WAYS, Choice, allocated_bits
from genlight.loops.quantization_latency import latency_notes, measured_latency
from genlight.loops.quantization_libraries import OTHERS, library_rows
from genlight.loops.quantization_samples import SAMPLES, write_samples
from genlight.loops.quantization_sensitivity import Sensitivity, measure_sensitivity, proxy_correlation
from genlight.loops.quantization_settings import network_of
from genlight.loops.quantization_speed import SPEED, StepTimes, measured_speeds, milliseconds
from genlight.loops.quantization_variants import Variant, VariantRows, finite
from genlight.loops.quantization_work import QuantizationWork
from genlight.loops.result import MethodResult
from genlight.metrics.paired import INTERVALS, image_scores, perceptual_scores
from genlight.metrics.text_image import middle_frame
from genlight.quantization.balance import balance_sample
from genlight.quantization.convert import layers_left_out, replace_layers
from genlight.quantization.diffusers_format import marked_quantized
from genlight.quantization.formats import FLOAT_BITS
from genlight.quantization.layers import QuantizedLayer
from genlight.quantization.recipe import dequantized_layer
from genlight.quantization.steps import following_steps
from genlight.quantization.torchao_format import as_torchao
from genlight.quantization.trajectory import decibels
from genlight.reports.cost import CostEstimate
from genlight.reports.quantization_figures import bits_by_layer, channel_ranges, sensitivity_map
from genlight.reports.search_figures import pareto_picture, sampler_comparison

if TYPE_CHECKING:
    from genlight.loops.quantization_calibrate import QuantizationCalibration

FACTS = "quantization.json"
DEQUANTIZED, TORCHAO = "dequantized", "torchao"
_KIND, _VERSION = "quantization", 1
FULL, DYNAMIC, NAIVE = "full precision", "dynamic", "naive"
_MOST_CHANNELS = 1024
_GROUP_SIZE = 128  # in place of a search for each layer (Q-DiT, arXiv:2406.17343)
_NAMED = 3  # layers of a kind, in the report
LAYERS, VARIANTS = "layers in few bits", "variants"  # in the account of time


def variants_of(method: QuantizationCalibration, bits: Mapping[str, Mapping[str, Choice]]) -> list[Variant]:
    """Everything that is measured, in the order of the table.

    Args:
        method: the settings.
        bits: of layers, by the way they were chosen; empty without mixed bits.
    """
    own = [Variant.mixed(method, method.title)]
    own += [Variant.mixed(method, f"{method.title} {way}", chosen) for way, chosen in bits.items()]
    if not method.rivals:
        return own[:2]
    whole = own[0]
    shared = [replace(whole, name="one range for all steps", by_step=False)] if whole.by_step else []
    if method.special:
        return [
            replace(whole, name=NAIVE, constant_tokens=False, split=False, by_step=False),
            *([replace(whole, name="no constant tokens", constant_tokens=False)] if whole.constant_tokens else []),
            *([replace(whole, name="no split", split=False)] if whole.split else []),
            *shared,
            *own,
        ]
    # in eight bits a range for each row does; where the settings have groups, every rival has them
    grouped = method.weight_bits < 8 and method.weight_group_size is None
    rivals = [
        Variant("static", "none", "nearest", mode="static"),
        Variant(DYNAMIC, "none", "nearest", mode="dynamic"),
        *([Variant("groups (Q-DiT)", "none", "nearest", group_size=_GROUP_SIZE, mode="dynamic")] if grouped else []),
        Variant("scale (SmoothQuant)", "scale", "nearest"),
        Variant("rotation (QuaRot)", "rotation", "nearest"),
        Variant("static-dynamic", "static_dynamic", "nearest"),
    ]
    return [*rivals, *shared, *own]


def quantization_result(work: QuantizationWork, own: Mapping[str, float], predicted: CostEstimate) -> MethodResult:
    """Table, metrics, pictures and artifact.

    Args:
        work: of the run, with nothing quantized.
        own: what full precision reaches.
        predicted: what all of it was to cost.
    """
    method, evaluations = work.method, work.evaluations
    first = bool(evaluations.trainer.is_global_zero)
    reference = work.reference("report", method.trajectory)
    one = reference.images[:1]
    paired = ("sqnr", *image_scores(one, one), *perceptual_scores(one, one, work.module.device))
    full: dict[str, Any] = {"variant": FULL, **dict.fromkeys((*paired, *INTERVALS))}
    full |= {name.removeprefix("val/"): value for name, value in own.items()} | work.size()
    with evaluations.timing(LAYERS):
        found = measure_sensitivity(work, method.mixed) if method.mixed is not None else []
    bits, program = ({}, {}) if method.mixed is None else evaluations.agreed(allocated_bits(work, method.mixed, found))
    with evaluations.timing(OTHERS):
        others, notes = library_rows(work) if method.rivals else ([], [])
    winner = f"{method.title} {WAYS[0]}" if bits else method.title
    own_rows, images, layers = _measured(work, variants_of(method, bits), winner, VariantRows(work, own, paired))
    rows = [full, *others, *own_rows]
    with evaluations.timing(SPEED):  # in one process, while the others wait
        speeds = evaluations.agreed(measured_speeds(work, layers) if first else None)
        if "latency" in program:
            program["latency"]["measured"] = evaluations.agreed(measured_latency(work, layers) if first else None)
    verdict = speeds.verdict(winner)
    chosen = next(row for row in rows if row["variant"] == winner)
    if first:
        print_line(verdict)
        _pictures(work, {FULL: middle_frame(reference.images), **images}, winner, layers, found)
        if bits:
            _front_picture(work.folder / "figures" / "front.png", program["front"], own_rows)
    # a model card is about its artifact, so the run's own metrics are those of the winner
    headline = {name: chosen[name.removeprefix("val/")] for name in own}
    headline |= {f"{name.removeprefix('val/')}_full_precision": value for name, value in own.items()}
    headline |= {f"{name}_full_precision": full[name] for name in ("bits", "megabytes")}
    if method.samples_out:
        with evaluations.timing(SAMPLES):
            write_samples(work, layers)
    key = method.title.lower().replace("-", "")
    headline |= {f"{name}_{key}": chosen[name] for name in (*paired, "bits", "megabytes")}
    headline |= proxy_correlation(work, found)
    headline |= {name: value for name, value in program.items() if isinstance(value, float)}
    facts = {**_facts(work, layers, rows), "allocation": program}
    notes = [*_unproved(method.title, program), *latency_notes(method.title, program.get("latency")), *notes]
    return MethodResult(
        headline,
        method=f"{method.title} (post-training quantization)",
        table=_with_times(rows, winner, speeds.plain),
        notes=[verdict, *_notes(work, winner, chosen, full), *notes],
        predicted=predicted,
        spent=evaluations.spent,
        save=lambda folder, module: save_artifact(work, layers, facts, folder, module),
    )


def _measured(
    work: QuantizationWork, variants: Sequence[Variant], winner: str, kept: VariantRows
) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, QuantizedLayer]]:
    """Rows of the variants, images of those that are shown, and the layers of the winner.

    What an earlier run has measured is read; then only what is shown and the artifact are made again. Several processes
    measure one variant each.
    """
    evaluations = work.evaluations
    rows, images, layers = list[dict[str, Any]](), dict[str, Tensor](), dict[str, QuantizedLayer]()

    def one(variant: Variant) -> tuple[dict[str, Any], Tensor | None]:
        row, shown = kept.get(variant), variant.name in (DYNAMIC, NAIVE, winner)
        if row is not None and not shown:
            return row, None
        made = work.layers(variant)
        if variant.name == winner:
            layers.update(made)
        if row is None:
            row, image = work.measure(made)
            row = finite(row)
        else:
            with work.replaced(made):
                image = middle_frame(work.images(work.reference("report", work.method.trajectory)))
        return row, image if shown else None

    with evaluations.timing(VARIANTS):
        evaluations.display.start(VARIANTS, len(variants))
        for found in in_rounds(evaluations, [partial(one, variant) for variant in variants]):
            for row, image in found:
                variant = variants[len(rows)]
                kept.keep(variant, row)
                rows.append({"variant": variant.name, **row})
                if image is not None:
                    images[variant.name] = image
            evaluations.display.show(VARIANTS, len(rows))
        if not layers:  # another process made them
            layers = work.layers(next(variant for variant in variants if variant.name == winner))
    return rows, images, layers


def _with_times(rows: Sequence[Mapping[str, Any]], winner: str, times: StepTimes) -> list[dict[str, Any]]:
    """The rows with milliseconds of a step, which only full precision and the winner have."""
    found = {FULL: milliseconds(times.full), winner: milliseconds(times.quantized)}
    none = dict.fromkeys(found[FULL])
    return [{**row, **found.get(row["variant"], none)} for row in rows]


def _notes(work: QuantizationWork, winner: str, chosen: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    method = work.method
    special = []
    if method.special:
        known, forms = work.special, work.forms.keys()
        special = [
            f"{len(forms & known.splits)} convolutions have scales for two feature maps; "
            f"{len(forms & set(known.text))} layers keep what they make of the text tokens {list(known.positions)}, "
            "the same for every prompt"
        ]
    steps = work.ranges.steps
    by_step = [] if steps is None else [_by_step(steps.timesteps.tolist())]
    video = [
        "psnr and ssim are of all frames; motion is the root mean square change of the motion (Lucas and Kanade) "
        "against the videos of full precision, in pixels a frame; video_fd is a Fréchet distance to those, in features "
        "of frames"
    ]
    rivals = f". Rows of rivals have rounding to nearest, those of {method.title} {_weights(method)}"
    return [
        *special,
        *by_step,
        *(video if "motion" in chosen else []),
        f"the metrics of the run are those of {winner}, which is the artifact",
        f"sqnr is of the network's predictions along {method.trajectory} trajectories of full precision of the report "
        "draw, all steps and guidance branches; psnr and ssim are of images against those of full precision with the "
        f"same noise{'' if method.special else rivals}",
        f"{winner}: {len(work.forms)} layers in {chosen['bits']:.3g} bits a weight and "
        f"{chosen['input_bits']:.3g} an input; {chosen['megabytes']:.3g} of {full['megabytes']:.3g} MB in memory, "
        f"{chosen['file_megabytes']:.3g} of {full['file_megabytes']:.3g} in a file",
        _left_out(layers_left_out(work.network, work.forms, method.keep)),
        "calibrated on the search draw, bits chosen on the select draw",
    ]


def _by_step(timesteps: Sequence[float]) -> str:
    return (
        f"inputs have a range for each of {len(timesteps)} timesteps, {timesteps[0]:g} to {timesteps[-1]:g}; a "
        "sampling at other timesteps takes the nearest"
    )


def _unproved(title: str, program: Mapping[str, Any]) -> list[str]:
    """Where the solver of the integer programs stopped before it had proved its answers."""
    ways = [f"{title} {way}" for way in program.get("unproved", ())]
    if not ways:
        return []
    return [
        f"not proved to be the best within the budget, for the solver stopped at its limit of work: {', '.join(ways)}; "
        f"of the least sum of noise powers that was found at most {100 * program['optimality_gap']:.2g} % can be saved"
    ]


def _weights(method: QuantizationCalibration) -> str:
    """What the method does to weights and rivals do not."""
    clip = "" if method.clip == "none" else f", clipping by {method.clip}"
    return method.rounding + clip + (f", a branch of rank {method.rank}" if method.rank else "")


def _left_out(layers: Mapping[str, tuple[str, str]]) -> str:
    """Layers that stay in floating point, by type and reason, with a few names of each."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, kind in layers.items():
        kinds.setdefault(kind, []).append(name)
    parts = [
        f"{len(names)} {kind} ({reason}): {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
        for (kind, reason), names in kinds.items()
    ]
    return f"left in floating point: {'; '.join(parts) or 'no layer'}"


def _facts(
    work: QuantizationWork, layers: Mapping[str, QuantizedLayer], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How it was quantized and what came of it, as JSON."""
    method = work.method
    alphas: dict[str, float | None] = {}
    for index, names in enumerate(work.calibrated.groups):
        lowest = min((layers[name].form for name in names), key=lambda form: form.weight.bits)
        alphas |= dict.fromkeys(names, work.balance(index, lowest, method.balance).alpha)
    weights = {name: work.calibrated.layers[name].weight.numel() for name in layers}
    total = sum(weights[name] * layer.form.weight.bits for name, layer in layers.items())
    return {
        "kind": _KIND,
        "version": _VERSION,
        "average_weight_bits": total / sum(weights.values()),
        "activation_bits": method.activation_bits,
        "rounding": method.rounding,
        "clip": method.clip,
        "balance": asdict(method.balancing),
        "rank": method.rank,
        "seeds": {"rotation": method.seed, "data": int(getattr(work.datamodule, "seed", 0))},
        "calibration": {**work.fingerprint, "samples": method.samples},
        "layers": {
            name: {
                "weight_bits": layer.form.weight.bits,
                "activation_bits": layer.form.activation.bits,
                "alpha": alphas[name],
            }
            for name, layer in layers.items()
        },
        "left_out": {
            name: {"type": kind, "reason": reason}
            for name, (kind, reason) in layers_left_out(work.network, work.forms, method.keep).items()
        },
        "scores": [dict(row) for row in rows],
    }


def _pictures(
    work: QuantizationWork,
    images: Mapping[str, Tensor],
    winner: str,
    layers: Mapping[str, QuantizedLayer],
    found: Sequence[Sensitivity],
) -> None:
    figures = work.folder / "figures"
    shown = [name for name in (FULL, DYNAMIC, NAIVE, winner) if name in images]
    sampler_comparison({name: images[name] for name in shown}, figures / "comparison.png")
    bits_by_layer({name: layer.form.weight.bits for name, layer in layers.items()}, figures / "bits.png")
    if found:
        by_layer: dict[str, dict[int, float]] = {}
        for entry in found:
            # where inputs are measured too, the picture shows weights
            if entry.bits != FLOAT_BITS:
                by_layer.setdefault(entry.layer, {})[entry.bits] = decibels(entry.noise)
        groups = {name: f"{work.groups[name].metric}: {work.groups[name].pattern}" for name in by_layer}
        if by_layer:  # not where groups leave all weights as they are
            sensitivity_map(by_layer, figures / "sensitivity.png", groups=groups)
    name, before, after = _widest(work, layers)
    channel_ranges(before, after, figures / "ranges.png", title=name)


def _front_picture(path: Path, front: Sequence[Mapping[str, float]], rows: Sequence[Mapping[str, Any]]) -> None:
    """What was predicted for other averages, and what was measured."""
    predicted = [(point["average_bits"], 10 ** (-point["predicted_sqnr"] / 10)) for point in front]
    measured = [(row["bits"], 10 ** (-row["sqnr"] / 10)) for row in rows]
    pareto_picture(measured, predicted, path, "bits a weight", "noise-to-signal ratio", title="front: predicted")


def _widest(work: QuantizationWork, layers: Mapping[str, QuantizedLayer]) -> tuple[str, list[float], list[float]]:
    """The layer with the most uneven input, and the largest magnitude of each channel before and after its balance."""

    def unevenness(absmax: Tensor) -> float:
        return float(absmax.max() / absmax.mean().clamp(min=1e-30))

    samples = {}
    for names in work.calibrated.groups:
        sample = work.calibrated.statistics[names[0]].sample
        assert sample is not None
        samples[names[0]] = sample
    name = max(samples, key=lambda name: unevenness(samples[name].abs().amax(0)))
    after = balance_sample(samples[name], layers[name].balance)
    columns = [values.abs().amax(0)[:_MOST_CHANNELS].tolist() for values in (samples[name], after)]
    return name, columns[0], columns[1]


def save_artifact(
    work: QuantizationWork, layers: Mapping[str, QuantizedLayer], facts: Mapping[str, Any], folder: Path, module: Any
) -> None:
    """The module with quantized layers, what was done to it, and if asked for the same for torchao and in floats."""
    network = network_of(module)
    plain = {name: network.get_submodule(name) for name in layers}
    apart = ("kind", "version", "scores", "layers", "left_out")
    settings = {key: value for key, value in facts.items() if key not in apart}
    try:
        replace_layers(network, layers)
        with following_steps(network, work.ranges.steps), marked_quantized(network, settings):
            module.save_pretrained(folder)
        _write_readme(folder, network.dtype)
        if work.method.torchao:
            with as_torchao(network, layers):
                module.save_pretrained(folder / TORCHAO)
        if work.method.dequantized:
            rounded = {name: dequantized_layer(plain[name], layer) for name, layer in layers.items()}
            replace_layers(network, rounded)
            module.save_pretrained(folder / DEQUANTIZED)
    finally:
        replace_layers(network, plain)
    io.atomic_write_json(folder / FACTS, facts)


def _write_readme(folder: Path, dtype: torch.dtype) -> None:
    """How to load: genlight must be imported, which the writer of the folder does not know; and the type of the network
    is said, as diffusers would read an autoencoder in float32 beside it.
    """
    readme, line = folder / "README.md", "from diffusers import DiffusionPipeline\n"
    example = f'# Load\n\n```python\n{line}\npipeline = DiffusionPipeline.from_pretrained(".")\n```\n'
    text = readme.read_text("utf-8") if readme.is_file() else example
    imports = "import genlight  # knows how quantized layers are read\n"
    if dtype is not torch.float32:
        imports, call = f"{imports}import torch\n", 'from_pretrained("."'
        text = text.replace(call, f"{call}, dtype={dtype}")
    io.atomic_write_text(readme, text.replace(line, imports + line))
