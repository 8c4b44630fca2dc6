"""Proof of ViDiT-Q on handwritten digits: docs/results/viditq.json.

One class-conditional transformer of 16 tokens is trained by `fit experiment=viditq/digits`. For each seed, which draws
noise, rotations and where outliers lie, its network is quantized in every way, as it is and with static outliers:
functions unchanged, two inputs of each attention and each feed-forward layer multiplied by a factor that the weights
undo. The real command quantizes it once more with mixed bits, for the table.

Every number is the signal-to-noise ratio in dB of the network's predictions along trajectories of full precision, both
guidance branches, on noise that neither calibration nor the choice of bits has seen.

    make proof NAME=viditq
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from _commands import genlight, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

EXPERIMENT = "experiment=viditq/digits"
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
KEEP = r"embed|norm|^proj_out"
SAMPLES = 40
GUIDANCE = 1.5
# outliers: channels of each input, and their factors
CHANNELS, FACTOR, FACTORS = 2, 30.0, (10.0, 30.0, 100.0)
LOW, HIGH, RANDOM_PLANS = 3, 8, 5
STATIC, DYNAMIC, SCALE, ROTATION, BOTH = "static", "dynamic", "scale", "rotation", "static-dynamic"
KINDS = {STATIC: "none", DYNAMIC: "none", SCALE: "scale", ROTATION: "rotation", BOTH: "static_dynamic"}


class Bench:
    """A network, its calibration, and how good it is in few bits."""

    def __init__(self, module: Any, network: Any, seed: int, samples: int) -> None:
        import torch

        from genlight.quantization.calls import numbered_calls, sampling_calls
        from genlight.quantization.convert import LayerGroup, formats_of_layers
        from genlight.quantization.formats import LayerFormat
        from genlight.quantization.observers import InputObserver, layers_by_input
        from genlight.quantization.recipe import CalibratedNetwork
        from genlight.quantization.statistics import StatisticsSettings
        from genlight.quantization.trajectory import recorded_calls, replay

        module.network, self.network, self.seed = network, network, seed
        generator = torch.Generator().manual_seed(1000 + seed)
        groups = [LayerGroup(KEEP), LayerGroup(".*", LayerFormat())]
        names = [name for name, form in formats_of_layers(network, groups).items() if form is not None]

        def sample(count: int) -> None:
            noise, label = torch.randn(count, *module.sample_shape, generator=generator), torch.arange(count) % 10
            module.sample_latents(noise.to(module.device), label.to(module.device))

        with torch.no_grad():
            contexts = sampling_calls(network, lambda: sample(1))
            with recorded_calls(network) as self.calls:
                sample(samples)
            with recorded_calls(network) as self.choosing:
                sample(max(1, samples // 4))
            inputs = layers_by_input(network, names, lambda: replay(network, self.calls[0]))
            settings = StatisticsSettings(2, contexts[0].num_steps, torch.float32, 512, seed)
            observer = InputObserver(network, [group[0] for group in inputs], settings)
            observer.begin("proof")
            with observer, numbered_calls(network, contexts):
                sample(samples)
        layers: dict[str, Any] = {name: network.get_submodule(name) for name in names}
        self.calibrated = CalibratedNetwork(layers, tuple(inputs), observer.statistics)

    def layers(self, kind: str, bits: tuple[int, int], rounding: str = "nearest", **each: int) -> dict[str, Any]:
        """Quantized layers; `each` gives weights of some layers other bits."""
        from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
        from genlight.quantization.recipe import BalanceSettings, balanced_input, quantized_layer

        activation = ActivationFormat(bits[1])
        if kind == STATIC:
            activation = ActivationFormat(bits[1], True, "static", "tensor")
        form = LayerFormat(WeightFormat(bits[0], False, rounding=rounding), activation)  # type: ignore[arg-type]
        settings = BalanceSettings(KINDS[kind], seed=self.seed)  # type: ignore[arg-type]
        made = {}
        for index, names in enumerate(self.calibrated.groups):
            forms = [replace(form, weight=replace(form.weight, bits=each.get(name, bits[0]))) for name in names]
            lowest = min(forms, key=lambda form: form.weight.bits)
            balance = balanced_input(self.calibrated, index, lowest, settings).balance
            for name, own in zip(names, forms, strict=True):
                made[name] = quantized_layer(self.calibrated, name, own, balance)
        return made

    def rounded_twice(self, bits: tuple[int, int]) -> dict[str, Any]:
        """Scaled, rounded, rotated and rounded again."""
        import torch

        from genlight.quantization.balance import Balance, balance_weight, unbalance_weight
        from genlight.quantization.convert import quantize_layer
        from genlight.quantization.weights import quantize_weight

        made = self.layers(BOTH, bits)
        for name, layer in made.items():
            scale = Balance(layer.balance.scale)
            plain = copy.deepcopy(self.calibrated.layers[name])
            once = quantize_weight(balance_weight(plain.weight.detach(), scale), layer.form.weight).dequantized()
            with torch.no_grad():
                plain.weight.copy_(unbalance_weight(once, scale))
            made[name] = quantize_layer(plain, layer.form, balance=layer.balance)
        return made

    def noise(self, layers: Mapping[str, Any], calls: Sequence[Any]) -> float:
        """Noise-to-signal ratio with these layers in place, along some calls."""
        from genlight.quantization.convert import replace_layers
        from genlight.quantization.trajectory import noise_to_signal

        replace_layers(self.network, layers)
        try:
            return noise_to_signal(self.network, calls)
        finally:
            replace_layers(self.network, {name: self.calibrated.layers[name] for name in layers})

    def sqnr(self, layers: Mapping[str, Any]) -> float:
        """In dB, along the calls that chose nothing."""
        from genlight.quantization.trajectory import decibels

        return decibels(self.noise(layers, self.calls))


def with_outliers(network: Any, factor: float, seed: int) -> Any:
    """The same function with `CHANNELS` inputs of each attention and feed-forward layer multiplied by a factor."""
    import torch

    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in network.transformer_blocks:
            linear, width = block.norm1.linear, block.norm1.linear.in_features
            attention = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
            # rows of the modulation: shift and scale of attention, its gate, shift and scale of feed-forward, its gate
            for first, readers in ((0, attention), (3 * width, [block.ff.net[0].proj])):
                channels = torch.randperm(width, generator=generator)[:CHANNELS]
                for rows in (first + channels, first + width + channels):
                    linear.weight[rows] *= factor
                    linear.bias[rows] *= factor
                linear.bias[first + width + channels] += factor - 1
                for reader in readers:
                    reader.weight[:, channels] /= factor
    return network


def mixed_plans(bench: Bench) -> dict[str, dict[str, float]]:
    """SQNR of plans of 3 and 8 bits at equal budgets: by sensitivity, by the error of weights, at random."""
    import numpy as np

    from genlight.quantization.allocation import allocate
    from genlight.quantization.recipe import weight_error

    names = list(bench.calibrated.layers)
    choices = [bench.layers(BOTH, (bits, 8)) for bits in (LOW, HIGH)]
    noise = np.array([[bench.noise({n: layers[n]}, bench.choosing) for layers in choices] for n in names])
    error = np.array([[weight_error(bench.calibrated.layers[n], layers[n]) for layers in choices] for n in names])
    weights = np.array([bench.calibrated.layers[name].weight.numel() for name in names])
    costs = {"bits": weights[:, None] * np.array([LOW, HIGH])}
    rng = np.random.default_rng(bench.seed)
    found = {}
    for share in (0.25, 0.5):
        limit = {"bits": (LOW + (HIGH - LOW) * share) * float(weights.sum())}

        def measured(losses: Any, limit: dict[str, float] = limit) -> float:
            chosen = allocate(losses, costs, limit)
            plan = {name: (LOW, HIGH)[j] for name, j in zip(names, chosen, strict=True)}
            return bench.sqnr(bench.layers(BOTH, (LOW, 8), **plan))

        ranks = [np.stack([rng.random(len(names)), np.zeros(len(names))], axis=1) for _ in range(RANDOM_PLANS)]
        found[f"{share:.0%}"] = {
            "sensitivity": measured(noise),
            "weight error": measured(error),
            "random": fmean(measured(losses) for losses in ranks),
        }
    return found


def measure(folder: Path, seed: int, samples: int) -> None:
    """All numbers of one seed, as JSON on the standard output."""
    import torch

    from genlight.modules.diffusion import DiffusionModule

    torch.set_num_threads(1)
    module = DiffusionModule(pretrained=str(folder / "model" / "fit" / "artifact"), class_conditional=None)
    module.configure_model()
    module.guidance_scale = GUIDANCE
    natural: Any = module.net.eval()
    rows = {}
    bench = Bench(module, natural, seed, samples)
    for word, bits in BITS.items():
        rows[f"natural {word}"] = {kind: bench.sqnr(bench.layers(kind, bits)) for kind in KINDS}
    both = rows["natural W4A8"]
    both["static-dynamic, GPTQ"] = bench.sqnr(bench.layers(BOTH, BITS["W4A8"], "gptq"))
    both["static-dynamic, rounded twice"] = bench.sqnr(bench.rounded_twice(BITS["W4A8"]))
    plans = mixed_plans(bench)
    for factor in FACTORS:
        changed = with_outliers(natural, factor, seed)
        bench.network = changed
        same = bench.sqnr({})
        if same < 100:
            raise RuntimeError(f"outliers of {factor} change the function: {same:.1f} dB")
        own = Bench(module, changed, seed, samples)
        for word, bits in BITS.items():
            rows[f"outliers {factor:g} {word}"] = {
                kind: own.sqnr(own.layers(kind, bits)) for kind in KINDS if factor == FACTOR or kind == BOTH
            }
    print(json.dumps({"seed": seed, "rows": rows, "plans": plans}))


def speed() -> None:
    """Seconds of a float32 product over those of int8, one thread; JSON on the standard output."""
    import torch
    from torch.utils.benchmark import Timer

    torch.set_num_threads(1)
    x, w = torch.randn(1024, 1152), torch.randn(1152, 1152)
    values = {
        "x": x,
        "w": w,
        "a": x.mul(40).clamp(-127, 127).to(torch.int8),
        "b": w.mul(40).clamp(-127, 127).to(torch.int8),
    }
    seconds = [
        min(Timer(statement, globals={**values, "torch": torch}).blocked_autorange(min_run_time=2).times)
        for statement in ("x @ w.t()", "torch._int_mm(a, b.t())")
    ]
    print(json.dumps({"ratio": seconds[0] / seconds[1]}))


def bars_of(results: Sequence[Mapping[str, Any]], ratio: float) -> list[Bar]:
    """Every claim, from the means over seeds."""

    def mean(row: str, kind: str) -> float:
        return fmean(result["rows"][row][kind] for result in results)

    def gain(words: Sequence[str], where: str, better: str, worse: str) -> float:
        """The least of some bits."""
        return min(mean(f"{where} {word}", better) - mean(f"{where} {word}", worse) for word in words)

    def plan(share: str, rival: str) -> float:
        return fmean(result["plans"][share]["sensitivity"] - result["plans"][share][rival] for result in results)

    outliers, even, every = f"outliers {FACTOR:g}", ("W8A8", "W6A6", "W4A4"), tuple(BITS)
    invariance = max(
        abs(result["rows"][f"outliers 100 {word}"][BOTH] - result["rows"][f"outliers 10 {word}"][BOTH])
        for result in results
        for word in BITS
    )
    gptq = mean("natural W4A8", "static-dynamic, GPTQ") - mean("natural W4A8", BOTH)
    twice = mean("natural W4A8", BOTH) - mean("natural W4A8", "static-dynamic, rounded twice")
    mean_of, least = "dB, mean of seeds", "dB, mean of seeds, least of"
    both, only = f"outliers {FACTOR:g}: static-dynamic", ["W4A8"]
    gains = [
        ("c1", f"dynamic per token - static, {least} W8A8, W6A6, W4A4", gain(even, "natural", DYNAMIC, STATIC), 3),
        ("c2-token", f"{both} - dynamic, {least} W8A8, W6A6", gain(even[:2], outliers, BOTH, DYNAMIC), 8),
        ("c2-rotation", f"{both} - rotation, {least} all bits", gain(every, outliers, BOTH, ROTATION), 3),
        ("c2-scale", f"{both} - scale, {least} W8A8, W6A6, W4A4", gain(even, outliers, BOTH, SCALE), 0.8),
        ("c2-scale-w4a8", f"{both} - scale at W4A8, {mean_of}", gain(only, outliers, BOTH, SCALE), -1.5),
        ("c4", f"rounded once - twice, static-dynamic W4A8, {mean_of}", twice, 1),
        ("c5", f"GPTQ - nearest, static-dynamic W4A8, {mean_of}", gptq, 3),
    ]
    for share, rival, word, bar in (
        ("25%", "random", "random", 1.0),
        ("50%", "random", "random", 2.0),
        ("25%", "weight error", "error", 0.7),
        ("50%", "weight error", "error", 1.5),
    ):
        what = f"bits by sensitivity - by {rival}, {share} in 8 bits, {mean_of}"
        gains.append((f"c6-{word}-{share[:-1]}", what, plan(share, rival), bar))
    changed = f"outliers {FACTORS[-1]:g} against {FACTORS[0]:g}: change of static-dynamic, dB, largest"
    product = "float32 / int8 product of 1024 x 1152 x 1152, one thread"
    return [
        *(bar_at_least(*each) for each in gains),
        bar_at_most("c3", changed, invariance, 0.2),
        bar_at_least("c7", product, ratio, 1.5),
    ]


def table_of(results: Sequence[Mapping[str, Any]], command: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Means over seeds, then the plans, then what the command reported."""
    rows: list[dict[str, Any]] = []
    for name in results[0]["rows"]:
        kinds = results[0]["rows"][name]
        rows.append({"network": name} | {kind: fmean(r["rows"][name][kind] for r in results) for kind in kinds})
    for share in results[0]["plans"]:
        ways = results[0]["plans"][share]
        rows.append(
            {"network": f"{share} in 8 bits, else 3"}
            | {f"bits by {way}": fmean(r["plans"][share][way] for r in results) for way in ways}
        )
    for row in command["table"]:
        kept = {key: row[key] for key in ("sqnr", "psnr", "ssim", "fd_digits", "bits", "megabytes")}
        rows.append({"network": f"validate: {row['variant']}", **kept})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="trajectories, and as many to calibrate")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use the model of an earlier one")
    parser.add_argument("--show", action="store_true", help="print the bars and write nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        where = [EXPERIMENT, f"run.root={folder}"]
        if not (folder / "model" / "fit" / "artifact").is_dir():
            genlight("fit", *where, "run.name=model")
        ratio = json.loads(run(__file__, "--speed"))["ratio"]
        command = pool.submit(
            genlight,
            "validate",
            *where,
            "run.name=mixed",
            "run.overwrite=true",
            f"ckpt_path={folder}/model/fit/artifact",
        )
        tasks = [pool.submit(run, __file__, "--measure", folder, seed, arguments.samples) for seed in arguments.seeds]
        results = [json.loads(task.result()) for task in tasks]
        command.result()
        bars = bars_of(results, ratio)
        table = table_of(results, report(folder / "mixed" / "validate"))
    if arguments.show:
        print(json.dumps({"bars": [vars(bar) for bar in bars], "table": table}, indent=1))
    else:
        record("viditq", bars, table, arguments.seeds, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["--speed"]:
        speed()
    else:
        main()
