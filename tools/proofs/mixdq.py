"""Proof of MixDQ on a text-to-image model of handwritten digits: docs/results/mixdq.json.

For each seed `fit experiment=mixdq/digits` trains a tiny Stable Diffusion that reads "a photo of a three" and samples
in 4 steps; its text encoder is random and its first token an outlier as large as SDXL's. Each network is quantized with
and without kept tokens, in eight bits, in four bits everywhere, and in bits chosen layer by layer within a mean of 4.0
and of 3.4 with inputs in floating point. The real command quantizes the first of them, for the table.

Content is the share of images in which a classifier of real digits sees the digit of the prompt; quality the Fréchet
distance in its features to held-out digits; fidelity the PSNR to images of full precision from the same noise, and the
signal-to-noise ratio of predictions along its trajectories. All are on noise that neither calibration nor a choice of
bits has seen.

Fréchet distances are of 400 samples, but those that are asked which choice of bits is better are of 4,000: the ratio of
two networks close to full precision moved by up to 0.045 from 400 samples to 1,000, a standard error of some 0.03, and
a ratio is to be told from 1 to within 0.01.

    make proof NAME=mixdq
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

from _commands import genlight, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

EXPERIMENT = "experiment=mixdq/digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLES, CALIBRATION, CHOOSING, TRAJECTORY = 400, 64, 16, 64
AVERAGES, RATIOS = (4.0, 3.4), (0.5, 0.6, 0.8, 1.0)
# for the Fréchet distance of choices of bits alone
MANY = 4000
KEEP = "^conv_in|^conv_out"
# inputs of keys and values in bits that make their steps as wide as SDXL's are in eight
FEW = 6
FULL, NAIVE, KEPT, UNIFORM, TEXT = "full precision", "W8A8 naive", "W8A8", "W4 everywhere", "keys and values"
SHOWN = ("sqnr", "psnr", "accuracy", "fd", "fd_many", "fd_spread", "predicted_sqnr")


def artifact_of(folder: Path, seed: int) -> Path:
    """The pipeline folder that a training left."""
    return folder / f"model-{seed}" / "fit" / "artifact"


def classifier(name: str) -> Path:
    """Weights of a classifier, which `fit experiment=features/<name>` makes."""
    from genlight.data.cache import default_cache_folder

    return default_cache_folder() / "features" / name / "fit" / "artifact" / "classifier.safetensors"


class Bench:
    """A trained pipeline, its calibration, and how good its images are in few bits.

    Args:
        module, data: the pipeline and what it is measured with.
        extractor: of features for the Fréchet distance.
        mixed: how bits are chosen.
        folder: of its files.
        samples: that judge a network.
    """

    def __init__(self, module: Any, data: Any, extractor: Any, mixed: Any, folder: Path, samples: int) -> None:
        import diffusers.quantizers  # noqa: F401 - before genlight's format, which registers with it
        from lightning.pytorch import Trainer

        from genlight.loops.evaluation import CandidateTrainer
        from genlight.loops.quantization_calibrate import QuantizationCalibration
        from genlight.loops.quantization_settings import GroupSettings
        from genlight.loops.quantization_work import QuantizationWork
        from genlight.metrics.generative import GenerativeMetrics
        from genlight.metrics.reference import prepare

        self.mixed = mixed
        method = QuantizationCalibration(
            "MixDQ",
            weight_symmetric=True,
            activation_symmetric=False,
            activation_mode="static",
            split_shortcuts=True,
            constant_tokens="warn",
            rounding="nearest",
            balance="none",
            keep=KEEP,
            groups=(GroupSettings(r"\.attn2\.|\.ff\.", "ssim"), GroupSettings()),
            samples=CALIBRATION,
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(accelerator="cpu", default_root_dir=folder, enable_model_summary=False, **quiet)
        self.work = QuantizationWork(method, CandidateTrainer(trainer), module, data)
        self.reference = self.work.reference("report", samples)
        self.along = self.work.reference("report", min(samples, TRAJECTORY))
        self.metrics = GenerativeMetrics(extractor, ["fd"])
        extractor.setup()
        prepare(self.metrics, data, None)

    def bits(self, weight: int, inputs: int, text_inputs: int | None = None) -> dict[str, tuple[int, int | None]]:
        """The same bits for all layers, and others for the inputs of those that read text."""
        text = self.work.special.text
        other = inputs if text_inputs is None else text_inputs
        return {name: (weight, other if name in text else inputs) for name in self.work.forms}

    def many(self, reference: Any, bits: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Fréchet distance of many images, with layers in some bits, and its deviation over parts of `SAMPLES`."""
        from genlight.loops.quantization_variants import Variant

        images = reference.images
        if bits is not None:
            with self.work.replaced(self.work.layers_of(Variant.mixed(self.work.method, "", bits), list(bits))):
                images = self.work.images(reference)
        return {"fd_many": self.distance(images), "fd_spread": stdev(map(self.distance, images.split(SAMPLES)))}

    def measure(self, bits: Mapping[str, Any], *, kept: bool = True, split: bool = True) -> dict[str, Any]:
        """All numbers with layers in some bits; those that are not named stay as they are."""
        from genlight.loops.quantization_variants import Variant
        from genlight.metrics.paired import image_scores

        variant = replace(Variant.mixed(self.work.method, "", bits), constant_tokens=kept, split=split)
        with self.work.replaced(self.work.layers_of(variant, list(bits))):
            images = self.work.images(self.reference)
            noise = self.work.noise(self.along)
        return {"sqnr": decibels(noise), **image_scores(images, self.reference.images), **self.judged(images)}

    def judged(self, images: Any) -> dict[str, Any]:
        """Content and Fréchet distance of images of the reference's noise."""
        return {**self.content(images), "fd": self.distance(images)}

    def content(self, images: Any) -> dict[str, Any]:
        """The share that shows the digit of its prompt."""
        seen = self.metrics.extractor.logits(images).argmax(dim=1)
        return {"accuracy": float((seen == self.reference.label).float().mean())}

    def distance(self, images: Any) -> float:
        """Fréchet distance to held-out images."""
        import torch

        self.metrics.reset()
        self.metrics.update(images, torch.arange(len(images)))
        (found,) = self.metrics.compute().values()
        return float(found)


def digits_bench(folder: Path, seed: int, samples: int) -> Bench:
    """The bench of a training on digits."""
    from genlight.data.digits import DigitsDataModule
    from genlight.loops.quantization_settings import MixedBits
    from genlight.metrics.features import ClassifierFeatures
    from genlight.modules.pipeline import PipelineModule

    artifact = str(artifact_of(folder, seed))
    module = PipelineModule(artifact, num_inference_steps=4, guidance_scale=1.0, height=8, width=8)
    module.configure_model()
    module.prompts = [f"a photo of a {name}" for name in NAMES]
    shape = {"image_size": 8, "channels": 1, "num_classes": 10, "noise_shape": module.sample_shape}
    data = DigitsDataModule(**shape, batch_size=64, eval_batch_size=200, num_samples=samples, seed=seed)
    extractor = ClassifierFeatures(str(classifier("digits")), "digits", dtype="float32")
    mixed = MixedBits((2, 4, 8), (16,), average_bits=AVERAGES[0], ratios=RATIOS, samples=CHOOSING)
    return Bench(module, data, extractor, mixed, folder / f"bench-{seed}", samples)


def decibels(noise: float) -> float:
    """A noise-to-signal ratio in dB."""
    from genlight.quantization.trajectory import decibels as in_decibels

    return in_decibels(noise)


def measure(folder: Path, seed: int, samples: int) -> None:
    """All numbers of one seed, as JSON on the standard output."""
    import torch

    from genlight.loops.quantization_bits import allocated_bits
    from genlight.loops.quantization_sensitivity import measure_sensitivity

    torch.set_num_threads(1)
    bench = digits_bench(folder, seed, samples)
    work = bench.work
    text = [name for name in work.special.text if name in work.forms]
    rows: dict[str, dict[str, float]] = {FULL: bench.judged(bench.reference.images)}
    only = {name: (16, 8) for name in text}
    few = bench.bits(8, 8, FEW)
    rows[f"{TEXT} A8 naive"] = bench.measure(only, kept=False)
    rows[f"{TEXT} A8"] = bench.measure(only)
    rows[f"W8A8, {TEXT} A{FEW} naive"] = bench.measure(few, kept=False)
    rows[f"W8A8, {TEXT} A{FEW}"] = bench.measure(few)
    rows[NAIVE] = bench.measure(bench.bits(8, 8), kept=False, split=False)
    rows[KEPT] = bench.measure(bench.bits(8, 8))
    rows[UNIFORM] = bench.measure(bench.bits(4, 16))
    found = measure_sensitivity(work, bench.mixed)
    noise = {(entry.layer, entry.bits): entry.noise for entry in found}
    rows[UNIFORM]["predicted_sqnr"] = decibels(sum(noise[name, 4] for name in work.forms))
    for average in AVERAGES:
        plans, _ = allocated_bits(work, replace(bench.mixed, average_bits=average), found)
        for way, plan in plans.items():
            row = bench.measure(plan)
            row["predicted_sqnr"] = decibels(sum(noise[name, bits] for name, (bits, _) in plan.items()))
            rows[f"W{average:g} {way}"] = row
        if average == AVERAGES[0]:
            four = {f"W4 {way}": plans[way] for way in ("mixed", "mixed, one metric")}
            for name, bits in ((FULL, None), (UNIFORM, bench.bits(4, 16)), *four.items()):
                rows[name] |= bench.many(work.reference("report", MANY), bits)
    print(json.dumps({"seed": seed, "rows": rows, "layers": len(work.forms), "text": len(text)}))


def bars_of(results: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Every claim, of the seed for which it holds least."""

    def gain(key: str, better: str, worse: str) -> float:
        return float(min(result["rows"][better][key] - result["rows"][worse][key] for result in results))

    def ratio(key: str, row: str, to: str) -> float:
        return float(max(result["rows"][row][key] / result["rows"][to][key] for result in results))

    decoupled, power, low = "W4 mixed", "W4 mixed, one metric", "W3.4 mixed, one metric"
    few, text = f"W8A8, {TEXT} A{FEW}", f"{TEXT} A8"
    off = [
        abs(row["predicted_sqnr"] - row["sqnr"])
        for result in results
        for row in result["rows"].values()
        if "predicted_sqnr" in row
    ]
    chance = min(gain("psnr", power, f"W4 random bits {index}") for index in range(3))
    distance = max(ratio("fd_many", row, UNIFORM) for row in (decoupled, power))
    shown = f"share of images that show their prompt's digit, W8A8 with A{FEW} in keys and values of text"
    gains = [
        ("bos", "kept first token - naive, A8 in keys and values of text, all else exact: SQNR, dB",
         gain("sqnr", text, f"{text} naive"), 15),
        ("bos-content", f"full precision - naive: {shown}", gain("accuracy", FULL, f"{few} naive"), 0.25),
        ("mixed", "W4 by SSIM and SQNR - W4 everywhere: PSNR, dB", gain("psnr", decoupled, UNIFORM), 3),
        ("mixed-power", "W4 by noise powers - W4 everywhere: PSNR, dB", gain("psnr", power, UNIFORM), 6),
        ("low-bits", "W3.4 by noise powers - W4 everywhere: PSNR, dB", gain("psnr", low, UNIFORM), 0),
        ("allocation", "W4 by noise powers - best of 3 random choices: PSNR, dB", chance, 10),
    ]  # fmt: skip
    losses = [
        ("bos-content-kept", f"full precision - kept first token: {shown}", -gain("accuracy", few, FULL), 0.02),
        ("mixed-fd", f"Fréchet distance ({MANY} samples) of both W4 choices, the larger / W4 everywhere", distance, 1),
        ("w8a8", "Fréchet distance, W8A8 / full precision", ratio("fd", KEPT, FULL), 1.05),
        ("additivity", "predicted - measured SQNR of all choices of bits, dB, largest", max(off), 2),
    ]
    return [*(bar_at_least(*each) for each in gains), *(bar_at_most(*each) for each in losses)]


def table_of(results: Sequence[Mapping[str, Any]], command: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every row of every seed, then what the command reported."""
    rows: list[dict[str, Any]] = [
        {"seed": result["seed"], "network": name} | {key: row.get(key) for key in SHOWN}
        for result in results
        for name, row in result["rows"].items()
    ]
    for row in command["table"]:
        kept = {key: row[key] for key in ("sqnr", "psnr", "ssim", "fd_digits", "bits", "input_bits", "megabytes")}
        rows.append({"seed": results[0]["seed"], "network": f"validate: {row['variant']}", **kept})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images that judge a network")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use the models of an earlier one")
    parser.add_argument("--show", action="store_true", help="print the bars and write nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder, first = arguments.folder or Path(name), arguments.seeds[0]

        def command(kind: str, run_name: str, seed: int, *words: str) -> None:
            given = (EXPERIMENT, f"run.root={folder}", f"run.name={run_name}", "run.overwrite=true", f"seed={seed}")
            genlight(kind, *given, *words)

        def train(seed: int) -> None:
            if not artifact_of(folder, seed).is_dir():
                command("fit", f"model-{seed}", seed)

        if not classifier("digits").is_file():
            genlight("fit", "experiment=features/digits")
        list(pool.map(train, arguments.seeds))
        whole = pool.submit(command, "validate", "mixed", first, f"ckpt_path={artifact_of(folder, first)}")
        tasks = [pool.submit(run, __file__, "--measure", folder, seed, arguments.samples) for seed in arguments.seeds]
        results = [json.loads(task.result()) for task in tasks]
        whole.result()
        bars, table = bars_of(results), table_of(results, report(folder / "mixed" / "validate"))
    if arguments.show:
        print(json.dumps({"bars": [vars(bar) for bar in bars], "table": table}, indent=1))
    else:
        record("mixdq", bars, table, arguments.seeds, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
