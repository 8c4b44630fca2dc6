"""Whether two metrics choose bits better than one, where content is read off images: docs/results/mixdq_shapes.json.

For each seed `fit experiment=mixdq/shapes` trains a tiny Stable Diffusion that reads "rose disc left of blue tile" and
samples in 4 steps. Weights of its network get bits layer by layer, inputs stay in floating point, within four averages
and by these choices, all from the same measurements of single layers:

- two metrics: SSIM of images for cross-attention and feed-forward, errors of predictions for all else;
- one metric for all layers: errors of predictions, or SSIM;
- two metrics as in the paper: sums of SSIM and of dB, each within a budget of its group by a ratio;
- one sum of dB for all layers.

Content is the share of images whose colours, shapes and places are those of the prompt, read off by rules; quality the
Fréchet distance to held-out images in features of a classifier, which knows nothing of the prompt asked for; fidelity
as in the proof `mixdq`, which says why Fréchet distances that decide are of 4,000 samples. Differences of content are
between images of the same noise, with their standard error. What two metrics gain has no bar: it is told as it comes
out.

    make proof NAME=mixdq_shapes
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from _commands import genlight, record, run
from mixdq import MANY, RATIOS, Bench, artifact_of, classifier, decibels

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

# ten images of each prompt; layers are compared on one image of every second prompt
SAMPLES, CHOOSING = 1080, 54
AVERAGES = (2.6, 3.0, 3.4, 4.0)
FULL, EIGHT, UNIFORM = "full precision", "W8", "W4 everywhere"
TWO, ONE, SSIM = "two metrics", "one metric", "one metric, SSIM"
PAPER, SUM_DB = "two metrics, paper", "one sum of dB for all layers"
# names of the choices in the package
KNOWN = {
    "mixed": TWO,
    "mixed, one metric": ONE,
    "mixed by group budgets": PAPER,
    "mixed, one sum of dB for all layers": SUM_DB,
}
CHANCE = "random bits"
SHOWN = (
    "content", "colours", "shapes", "places", "fd", "fd_many", "fd_spread", "sqnr", "psnr", "ssim", "predicted_sqnr",
    "bits",
)  # fmt: skip


class ShapesBench(Bench):
    """As for digits, with content by rules."""

    def content(self, images: Any) -> dict[str, Any]:
        """Shares of what is right, and which images have all of it."""
        import torch

        from genlight.metrics.coloured_shapes import PARTS, judged

        levels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        right = judged(levels, self.work.module.prompts_of(self.reference.label))
        whole, shares = right.all(dim=1), right.float().mean(dim=0).tolist()
        return {"content": float(whole.float().mean()), **dict(zip(PARTS, shares, strict=True)), "each": whole.tolist()}


def shapes_bench(folder: Path, seed: int, samples: int) -> ShapesBench:
    """The bench of a training on coloured shapes."""
    from genlight.data.coloured_shapes import ColouredShapesDataModule
    from genlight.loops.quantization_settings import MixedBits
    from genlight.metrics.features import ClassifierFeatures
    from genlight.modules.pipeline import PipelineModule

    module = PipelineModule(
        str(artifact_of(folder, seed)), num_inference_steps=4, guidance_scale=1.0, height=16, width=16
    )
    module.configure_model()
    module.prompts = list(ColouredShapesDataModule.class_names)
    shape = {"image_size": 16, "channels": 3, "num_classes": len(module.prompts), "noise_shape": module.sample_shape}
    data = ColouredShapesDataModule(**shape, batch_size=64, eval_batch_size=216, num_samples=samples, seed=seed)
    name = "coloured_shapes"
    extractor = ClassifierFeatures(str(classifier(name)), name, dtype="float32")
    mixed = MixedBits((2, 4, 8), (16,), average_bits=AVERAGES[0], ratios=RATIOS, every_metric=True, samples=CHOOSING)
    return ShapesBench(module, data, extractor, mixed, folder / f"bench-{seed}", samples)


def plans_of(bench: Bench, found: Sequence[Any], average: float) -> dict[str, dict[str, Any]]:
    """Bits of each layer within an average, by the way they were chosen."""
    from genlight.loops.quantization_bits import BitChoices, allocated_bits
    from genlight.quantization.allocation import allocate

    mixed = replace(bench.mixed, average_bits=average)
    made, _ = allocated_bits(bench.work, mixed, found)
    program = BitChoices(bench.work, mixed, found)
    by_ssim = allocate(program.table(lambda entry: entry.loss("ssim")), program.costs, program.limits)
    plans = {name: made[way] for way, name in KNOWN.items()}
    return {**plans, SSIM: program.bits(by_ssim), **{w: plan for w, plan in made.items() if w.startswith(CHANCE)}}


def measure(folder: Path, seed: int, samples: int) -> None:
    """All numbers of one seed, as JSON on the standard output."""
    import torch

    from genlight.loops.quantization_sensitivity import measure_sensitivity

    torch.set_num_threads(1)
    bench = shapes_bench(folder, seed, samples)
    work = bench.work
    found = measure_sensitivity(work, bench.mixed)
    noise = {(entry.layer, entry.bits): entry.noise for entry in found}
    weights = {name: layer.weight.numel() for name, layer in work.calibrated.layers.items()}
    rows: dict[str, dict[str, Any]] = {FULL: bench.judged(bench.reference.images)}

    def add(name: str, plan: Mapping[str, tuple[int, int | None]]) -> None:
        row = bench.measure(plan)
        row["predicted_sqnr"] = decibels(sum(noise[layer, bits] for layer, (bits, _) in plan.items()))
        row["bits"] = sum(weights[layer] * bits for layer, (bits, _) in plan.items()) / sum(weights.values())
        rows[name] = row

    add(EIGHT, bench.bits(8, 16))
    add(UNIFORM, bench.bits(4, 16))
    deciding: dict[str, Any] = {FULL: None, UNIFORM: bench.bits(4, 16)}
    for average in AVERAGES:
        for way, plan in plans_of(bench, found, average).items():
            if average == AVERAGES[-1] or not way.startswith(CHANCE):
                add(f"W{average:g} {way}", plan)
            if average == AVERAGES[-1] and way in (TWO, ONE):
                deciding[f"W{average:g} {way}"] = plan
    many = work.reference("report", MANY)
    for name, plan in deciding.items():
        rows[name] |= bench.many(many, plan)
    print(json.dumps({"seed": seed, "rows": rows, "layers": len(work.forms)}))


def difference(result: Mapping[str, Any], average: float, better: str, worse: str) -> dict[str, Any]:
    """What one way of choosing bits gains over another within an average."""
    one, other = (result["rows"][f"W{average:g} {way}"] for way in (better, worse))
    each = [float(a) - float(b) for a, b in zip(one["each"], other["each"], strict=True)]
    gains = {key: one[key] - other[key] for key in ("fd", "sqnr", "psnr", "ssim")}
    name = f"W{average:g} {better} - {worse}"
    error = stdev(each) / math.sqrt(len(each))
    return {"seed": result["seed"], "network": name, "content": mean(each), "content_error": error, **gains}


def bars_of(results: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The bars of the proof `mixdq` that ask the same here, of the seed for which each holds least."""

    def gain(key: str, better: str, worse: str) -> float:
        return float(min(result["rows"][better][key] - result["rows"][worse][key] for result in results))

    def ratio(row: str, to: str) -> float:
        return float(max(result["rows"][row]["fd_many"] / result["rows"][to]["fd_many"] for result in results))

    two, one, low = f"W4 {TWO}", f"W4 {ONE}", f"W3.4 {ONE}"
    off = [
        abs(row["predicted_sqnr"] - row["sqnr"])
        for result in results
        for row in result["rows"].values()
        if "predicted_sqnr" in row
    ]
    chance = min(gain("psnr", one, f"W4 {CHANCE} {index}") for index in range(3))
    distance = max(ratio(two, UNIFORM), ratio(one, UNIFORM))
    return [
        bar_at_least("mixed", "W4 by SSIM and SQNR - W4 everywhere: PSNR, dB", gain("psnr", two, UNIFORM), 3),
        bar_at_least("mixed-power", "W4 by noise powers - W4 everywhere: PSNR, dB", gain("psnr", one, UNIFORM), 6),
        bar_at_least("low-bits", "W3.4 by noise powers - W4 everywhere: PSNR, dB", gain("psnr", low, UNIFORM), 0),
        bar_at_least("allocation", "W4 by noise powers - best of 3 random choices: PSNR, dB", chance, 10),
        bar_at_most(
            "mixed-fd", f"Fréchet distance ({MANY} samples) of both W4 choices, the larger / W4 everywhere", distance, 1
        ),
        bar_at_most("additivity", "predicted - measured SQNR of all choices of bits, dB, largest", max(off), 2),
    ]


def table_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every row of every seed, and what two metrics gain over one."""
    rows = [
        {"seed": result["seed"], "network": name} | {key: row.get(key) for key in SHOWN}
        for result in results
        for name, row in result["rows"].items()
    ]
    pairs = ((TWO, ONE), (TWO, SSIM), (PAPER, SUM_DB))
    return rows + [difference(r, average, *pair) for pair in pairs for average in AVERAGES for r in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images that judge a network")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use the models of an earlier one")
    parser.add_argument("--show", action="store_true", help="print the bars and write nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)

        def measured(seed: int) -> dict[str, Any]:
            if not artifact_of(folder, seed).is_dir():
                given = (f"run.root={folder}", f"run.name=model-{seed}", "run.overwrite=true", f"seed={seed}")
                genlight("fit", "experiment=mixdq/shapes", *given)
            found: dict[str, Any] = json.loads(run(__file__, "--measure", folder, str(seed), str(arguments.samples)))
            return found

        if not classifier("coloured_shapes").is_file():
            genlight("fit", "experiment=features/coloured_shapes")
        results = list(pool.map(measured, arguments.seeds))
    bars, table = bars_of(results), table_of(results)
    if arguments.show:
        print(json.dumps({"bars": [vars(bar) for bar in bars], "table": table}, indent=1))
    else:
        record("mixdq_shapes", bars, table, arguments.seeds, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
