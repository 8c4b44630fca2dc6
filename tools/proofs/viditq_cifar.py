"""ViDiT-Q on CIFAR-10 with a DiT-S of 256 tokens: docs/results/viditq_cifar.json. Needs the data and a GPU.

`fit experiment=viditq/cifar10` trains the network, for a limited time. Then processes side by side measure what the
proof `viditq` measures on digits, and besides the Fréchet distance between samples of the quantized network and of full
precision from equal noise, in the features of `fit experiment=features/cifar10`, which is to be run before or
meanwhile; and the real command quantizes the network once more, for the table.

Signal-to-noise ratios are in dB, of predictions along trajectories of full precision, both guidance branches, on noise
that neither calibration nor the choice of bits has seen; products are of the numbers that codes stand for, in float32
(TF32 for the Fréchet distance). What does not end in time is recorded as not measured, and its bar as failed.

    python tools/proofs/viditq_cifar.py --folder runs/viditq_cifar --seconds 370
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from _commands import ROOT, bar_if_measured, in_use, record, report
from viditq import (
    BITS,
    BOTH,
    DYNAMIC,
    FACTOR,
    FACTORS,
    ROTATION,
    SCALE,
    STATIC,
    Bench,
    mixed_plans,
    with_outliers,
)

from genlight import io
from genlight.reports.proof import Bar, bar_at_least, bar_at_most

EXPERIMENT = "experiment=viditq/cifar10"
FEATURES = Path("features", "cifar10", "fit", "artifact", "classifier.safetensors")
EVEN = ("W8A8", "W6A6", "W4A4")
GPTQ, TWICE = "static-dynamic, GPTQ", "static-dynamic, rounded twice"
FULL, CHUNK = "full precision", 500
# a network and numbers that a CPU can take, to try the program
TINY = (
    "module.network.num_layers=2",
    "module.network.num_attention_heads=2",
    "module.network.attention_head_dim=16",
    "module.network.patch_size=8",
    "data.batch_size=16",
    "data.eval_batch_size=16",
)
# seconds that writing the record may take, and share of the time for measuring that another command's features may
_LAST, PATIENCE = 8.0, 0.2
Item = tuple[str, str, Callable[[], float]]
Claim = tuple[str, str, Callable[[], float], float]


class DeviceBench(Bench):
    """As on a CPU, wherever the module lies; the numbers that codes stand for are multiplied, not the codes."""

    def noise(self, layers: Mapping[str, Any], calls: Sequence[Any]) -> float:
        return super().noise(self.placed(layers), calls)

    def placed(self, layers: Mapping[str, Any]) -> Mapping[str, Any]:
        """Layers on the network's device."""
        for layer in layers.values():
            layer.to(next(self.network.parameters()).device).execution = "fake"
        return layers


def said(what: str) -> None:
    """A line with the time of day, at once."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def loaded(folder: Path) -> Any:
    """The trained model on the GPU, if there is one."""
    import torch

    from genlight.modules.diffusion import DiffusionModule

    torch.set_num_threads(1)
    source = str(folder / "model" / "fit" / "artifact")
    module = DiffusionModule(pretrained=source, class_conditional=None, num_inference_steps=None, guidance_scale=None)
    module.configure_model()
    module.net.eval()
    return module.to("cuda" if torch.cuda.is_available() else "cpu")


def natural(module: Any, seed: int, samples: int) -> Iterator[Item]:
    """The network as it is, what bars need first."""
    bench = DeviceBench(module, module.net, seed, samples)

    def row(word: str, kind: str, rounding: str = "nearest") -> Item:
        name = GPTQ if rounding == "gptq" else kind
        return f"natural {word}", name, lambda: bench.sqnr(bench.layers(kind, BITS[word], rounding))

    yield from (row(word, kind) for word in EVEN for kind in (STATIC, DYNAMIC))
    yield row("W4A8", BOTH)
    yield row("W4A8", BOTH, "gptq")
    yield "natural W4A8", TWICE, lambda: bench.sqnr(bench.rounded_twice(BITS["W4A8"]))
    yield from (row(word, kind) for word in EVEN for kind in (BOTH, ROTATION, SCALE))
    yield from (row("W4A8", kind) for kind in (STATIC, DYNAMIC, ROTATION, SCALE))


def outliers(module: Any, seed: int, samples: int) -> Iterator[Item]:
    """The same function with planted channels, first with the factor of most bars."""
    plain = module.net
    for factor in (FACTOR, *(factor for factor in FACTORS if factor != FACTOR)):
        yield f"outliers {factor:g} W32A32", "changed alone", partial(changed_alone, module, plain, factor, seed)
        bench = DeviceBench(module, with_outliers(plain, factor, seed), seed, samples)

        def row(word: str, kind: str, bench: DeviceBench = bench, factor: float = factor) -> Item:
            return f"outliers {factor:g} {word}", kind, lambda: bench.sqnr(bench.layers(kind, BITS[word]))

        kinds = (BOTH, ROTATION, SCALE, DYNAMIC, STATIC) if factor == FACTOR else (BOTH,)
        yield from (row(word, kind) for kind in kinds for word in BITS)


def changed_alone(module: Any, plain: Any, factor: float, seed: int) -> float:
    """SQNR of the changed network, with nothing quantized: only the rounding of float32 remains."""
    bench = DeviceBench(module, plain, seed, 2)
    bench.network = with_outliers(plain, factor, seed)
    found = bench.sqnr({})
    if found < 80:
        raise RuntimeError(f"outliers of {factor} change the function: {found:.1f} dB")
    return found


def plans(module: Any, seed: int, samples: int) -> Iterator[Item]:
    """Bits by layer, all at once."""
    for share, ways in mixed_plans(DeviceBench(module, module.net, seed, samples)).items():
        for way in ways:
            yield f"{share} in 8 bits, else 3", way, partial(ways.__getitem__, way)


class Distances:
    """Fréchet distances to full precision, of samples of equal noise."""

    def __init__(self, module: Any, features: Path, seed: int, samples: int) -> None:
        from genlight.metrics.features import ClassifierFeatures

        self.module, self.seed = module, seed
        bench = DeviceBench(module, module.net, seed, samples)
        self.plain = bench.calibrated.layers
        eight, four = BITS["W8A8"], BITS["W4A8"]
        self.layers = {
            FULL: {},
            f"W8A8 {STATIC}": bench.placed(bench.layers(STATIC, eight)),
            f"W8A8 {DYNAMIC}": bench.placed(bench.layers(DYNAMIC, eight)),
            f"W4A8 {DYNAMIC}": bench.placed(bench.layers(DYNAMIC, four)),
            f"W4A8 {GPTQ}": bench.placed(bench.layers(BOTH, four, "gptq")),
        }
        self.extractor = ClassifierFeatures(str(features), "cifar10", dtype="float32")
        self.extractor.setup()
        self.extractor.to(module.device)
        self.seen: dict[str, list[Any]] = {name: [] for name in self.layers}

    def add(self, count: int, chunk: int) -> None:
        """Features of so many more samples of each network."""
        import torch

        from genlight.quantization.convert import replace_layers

        device = self.module.device
        generator = torch.Generator().manual_seed(10**6 + 1000 * self.seed + chunk)
        noise = torch.randn(count, *self.module.sample_shape, generator=generator).to(device)
        label = torch.arange(count, device=device) % 10
        for name, layers in self.layers.items():
            replace_layers(self.module.net, layers)
            with torch.no_grad():
                self.seen[name].append(self.extractor(self.module.sample(noise, label)).double().cpu())
            replace_layers(self.module.net, {layer: self.plain[layer] for layer in layers})

    def values(self) -> dict[str, float]:
        """Distance of each network."""
        import torch

        from genlight.metrics.generative import GenerativeMetrics
        from genlight.metrics.statistics import ReferenceStatistics

        full = torch.cat(self.seen[FULL])
        fingerprint = self.extractor.fingerprint
        reference = ReferenceStatistics(full.sum(0), full.t() @ full, len(full), fingerprint, "full precision", "test")
        metrics, found = GenerativeMetrics(self.extractor, ("fd",)), {}
        for name in self.layers:
            metrics.set_reference(reference)
            features = torch.cat(self.seen[name])
            metrics.update_features(features, features.new_zeros(len(features), 1))
            if name != FULL:
                found[name] = float(metrics.compute()["fd_cifar10"])
        return found


def measured_part(part: str, arguments: argparse.Namespace) -> None:
    """One part, in a process of its own; its rows so far are written after each number."""
    import torch

    end = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"rows": [], "failure": None}
    try:
        module = loaded(arguments.folder)
        if part == "distance":
            torch.set_float32_matmul_precision("high")
            distances = Distances(module, arguments.features, arguments.seeds[0], arguments.samples)
            size = min(CHUNK, arguments.count)
            for chunk in range(arguments.count // size):
                if time.monotonic() > end:
                    break
                distances.add(size, chunk)
                found |= {"distances": distances.values(), "count": size * (chunk + 1)}
                io.atomic_write_json(arguments.out, found)
                said(f"{part}: {found['count']} samples, {found['distances']}")
            return
        for seed in arguments.seeds:
            for row, kind, work in PARTS[part](module, seed, arguments.samples):
                if time.monotonic() > end:
                    return
                found["rows"].append({"seed": seed, "row": row, "kind": kind, "value": work()})
                io.atomic_write_json(arguments.out, found)
                said(f"{part}: {row} {kind} {found['rows'][-1]['value']:.2f}")
    except Exception as error:
        found["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        io.atomic_write_json(arguments.out, found)
        traceback.print_exc()


PARTS: dict[str, Callable[[Any, int, int], Iterator[Item]]] = {"natural": natural, "outliers": outliers, "plans": plans}


class Results:
    """What all parts found."""

    def __init__(self, parts: Mapping[str, Mapping[str, Any]]) -> None:
        self.rows: dict[str, dict[str, dict[int, float]]] = {}
        for part in parts.values():
            for each in part.get("rows", ()):
                self.rows.setdefault(each["row"], {}).setdefault(each["kind"], {})[each["seed"]] = each["value"]
        distance = parts.get("distance", {})
        self.distances: dict[str, float] = distance.get("distances", {})
        self.count: int = distance.get("count", 0)

    def mean(self, row: str, kind: str) -> float:
        """Over seeds; KeyError where there is none."""
        return fmean(self.rows[row][kind].values())

    def gain(self, words: Sequence[str], where: str, better: str, worse: str) -> float:
        """The least of some bits."""
        return min(self.between(f"{where} {word}", better, worse) for word in words)

    def between(self, row: str, better: str, worse: str) -> float:
        """How much better one kind is than another."""
        return self.mean(row, better) - self.mean(row, worse)

    def invariance(self) -> float:
        """How much the factor of outliers matters, at most."""
        low, high = (f"outliers {factor:g}" for factor in (FACTORS[0], FACTORS[-1]))
        return max(abs(self.mean(f"{high} {word}", BOTH) - self.mean(f"{low} {word}", BOTH)) for word in BITS)

    def table(self) -> list[dict[str, Any]]:
        """Means over seeds, then distances."""
        rows: list[dict[str, Any]] = [
            {"network": name} | {kind: fmean(values.values()) for kind, values in kinds.items()}
            for name, kinds in self.rows.items()
        ]
        what = f"Fréchet distance to full precision, {self.count} samples of equal noise"
        return rows + [{"network": name, what: value} for name, value in self.distances.items()]


def bars_of(found: Results) -> list[Bar]:
    """Every claim; one that could not be measured fails."""
    where, every, natural, least = f"outliers {FACTOR:g}", tuple(BITS), "natural W4A8", "dB, least of"
    samples = f"Fréchet distance to full precision, {found.count} samples of equal noise"

    def gain(words: Sequence[str], network: str, better: str, worse: str) -> Callable[[], float]:
        return partial(found.gain, words, network, better, worse)

    def distance(better: str, worse: str) -> Callable[[], float]:
        return lambda: found.distances[better] / found.distances[worse]

    three, eight = "W8A8, W6A6, W4A4", "W8A8, W6A6"
    at_least: list[Claim] = [
        ("c1", f"dynamic per token - static, {least} {three}", gain(EVEN, "natural", DYNAMIC, STATIC), 3),
        ("c2-token", f"{where}: {BOTH} - dynamic, {least} {eight}", gain(EVEN[:2], where, BOTH, DYNAMIC), 8),
        ("c2-rotation", f"{where}: {BOTH} - rotation, {least} all bits", gain(every, where, BOTH, ROTATION), 3),
        ("c2-scale", f"{where}: {BOTH} - scale, {least} {three}", gain(EVEN, where, BOTH, SCALE), 0.8),
        ("c2-scale-w4a8", f"{where}: {BOTH} - scale at W4A8, dB", gain(("W4A8",), where, BOTH, SCALE), -1.5),
        ("c4", f"rounded once - twice, {BOTH} W4A8, dB", partial(found.between, natural, BOTH, TWICE), 1),
        ("c5", f"GPTQ - nearest, {BOTH} W4A8, dB", partial(found.between, natural, GPTQ, BOTH), 3),
    ]
    for share, rival, word, limit in (
        ("25%", "random", "random", 1.0),
        ("50%", "random", "random", 2.0),
        ("25%", "weight error", "error", 0.7),
        ("50%", "weight error", "error", 1.5),
    ):
        what, row = f"bits by sensitivity - by {rival}, {share} in 8 bits, dB", f"{share} in 8 bits, else 3"
        plan = partial(found.between, row, "sensitivity", rival)
        at_least.append((f"c6-{word}-{share[:-1]}", what, plan, limit))
    change = f"outliers {FACTORS[-1]:g} against {FACTORS[0]:g}: change of {BOTH}, dB, largest"
    eights, fours = (f"W8A8 {DYNAMIC}", f"W8A8 {STATIC}"), (f"W4A8 {GPTQ}", f"W4A8 {DYNAMIC}")
    at_most: list[Claim] = [
        ("c3", change, found.invariance, 0.2),
        ("fd-w8a8", f"{samples}: {' / '.join(eights)}", distance(*eights), 0.5),
        ("fd-w4a8", f"{samples}: {' / '.join(fours)}", distance(*fours), 0.5),
    ]
    made = [bar_if_measured(bar_at_least, *claim) for claim in at_least]
    return made + [bar_if_measured(bar_at_most, *claim) for claim in at_most]


def started(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """A Python process whose output goes to a file."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=surroundings, stdout=file, stderr=subprocess.STDOUT
        )


def ended(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str | None:
    """Wait, and stop it when the time is up; how it failed, None where it did not."""
    try:
        code = process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "did not end in time"
    lines = log.read_text(errors="replace").strip().splitlines()
    return None if code == 0 else f"exit code {code}: {lines[-1][:200] if lines else ''}"


def features_in(folder: Path, seconds: float) -> Path | None:
    """The feature network, in the run root or in the cache; while another command makes it, it is waited for."""
    from genlight.data.cache import default_cache_folder

    end, places = time.monotonic() + seconds, [root / FEATURES for root in (folder, default_cache_folder())]
    while any(in_use(place.parents[1]) for place in places) and time.monotonic() < end:
        time.sleep(0.2)
    return next((place for place in places if place.is_file()), None)


def measured(
    arguments: argparse.Namespace, folder: Path, seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All parts side by side, and the real command: what they found, and lines of the table."""
    end = time.monotonic() + seconds
    features = features_in(folder, PATIENCE * seconds)
    own = [str(Path(__file__)), "--folder", str(folder), "--samples", str(arguments.samples)]
    own += ["--seconds", str(max(5.0, end - time.monotonic() - 12)), "--count", str(arguments.count)]
    own += ["--seeds", *map(str, arguments.seeds)]
    words = ["-m", "genlight", "validate", EXPERIMENT, f"run.root={folder}", "run.name=w4a8", "run.overwrite=true"]
    words += [f"ckpt_path={folder}/model/fit/artifact", "trainer.precision=32-true", "method.mixed=null"]
    # it reports at its end alone: no rivals, which the parts measure, and nothing is compiled
    words += ["method.rivals=false", "method.compiled=false", "method.dequantized=false"]
    few = max(1, arguments.samples // 2)
    words += [f"method.samples={few}", f"method.trajectory={few}"]
    words += [f"data.num_samples={arguments.validated}", *(TINY if arguments.tiny else ())]
    words += [f"metrics.extractor.path={features}", "metrics.metrics=[fd]"] if features else ["metrics=none"]
    names = [*PARTS, *(["distance"] if features else [])]
    # what an earlier call left is not a result of this one
    for name in names:
        (folder / f"{name}.json").unlink(missing_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    for name in names:
        extra = ["--part", name, "--out", str(folder / f"{name}.json"), "--features", str(features)]
        running[name] = started(folder / f"{name}.log", *own, *extra)
    running["validate"] = started(folder / "validate.log", *words)
    parts: dict[str, Any] = {}
    table: list[dict[str, Any]] = [] if features else [{"network": "distance", "failure": "no feature network"}]
    for name, process in running.items():
        failure = ended(process, folder / f"{name}.log", end - time.monotonic())
        file = folder / f"{name}.json"
        if name in names and file.is_file():
            parts[name] = io.read_json(file)
            failure = parts[name]["failure"] or failure
        if failure is None and name == "validate":
            columns = ("sqnr", "psnr", "ssim", "fd_cifar10", "bits", "megabytes")
            for row in report(folder / "w4a8" / "validate")["table"]:
                kept = {key: row[key] for key in columns if key in row}
                table.append({"network": f"validate W4A8: {row['variant']}", **kept})
        if failure is not None:
            table.append({"network": name, "failure": failure})
        said(f"{name} ended: {failure or 'well'}")
    return parts, table


def trained(arguments: argparse.Namespace, folder: Path, seconds: float) -> str | None:
    """Train unless the folder has the model; how it failed, None where it did not."""
    if (folder / "model" / "fit" / "artifact").is_dir():
        return None
    length = int(arguments.train_seconds)
    words = ["-m", "genlight", "fit", EXPERIMENT, f"run.root={folder}", "run.name=model", "run.overwrite=true"]
    words += [f"trainer.max_time=00:{length // 3600:02}:{length // 60 % 60:02}:{length % 60:02}"]
    # the rate falls with the time, and the average is of the last steps, however few there are
    words += [f"module.lr_scheduler.seconds={length}", "callbacks.ema.decay=0.995", *(TINY if arguments.tiny else ())]
    log = folder / "fit.log"
    return ended(started(log, *words), log, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and use the model of an earlier one")
    parser.add_argument("--seconds", type=float, default=370.0, help="of all of it")
    parser.add_argument("--train-seconds", type=float, default=190.0, help="of the training steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one after the other, as time allows")
    parser.add_argument("--samples", type=int, default=64, help="trajectories, and as many to calibrate")
    parser.add_argument("--count", type=int, default=5000, help="samples of the Fréchet distance, as time allows")
    parser.add_argument("--validated", type=int, default=500, help="samples of each row of validate")
    parser.add_argument("--tiny", action="store_true", help="a tiny network, and print the bars and write nothing")
    parser.add_argument("--part", choices=[*PARTS, "distance"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        measured_part(arguments.part, arguments)
        return
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.folder or Path(name)).resolve()
        io.create_folder(folder)
        said("training")
        failure = trained(arguments, folder, arguments.seconds - _LAST)
        said(f"trained: {failure or 'well'}")
        parts: dict[str, Any] = {}
        table: list[dict[str, Any]] = [{"network": "fit", "failure": failure}] if failure else []
        if failure is None:
            left = arguments.seconds - (time.monotonic() - begun) - _LAST
            parts, table = measured(arguments, folder, left)
    found = Results(parts)
    bars, table = bars_of(found), found.table() + table
    if arguments.tiny:
        for line in (*bars, *table):
            print(line)
        return
    words = ["--seconds", f"{arguments.seconds:g}"]
    record("viditq_cifar", bars, table, arguments.seeds, begun, words)


if __name__ == "__main__":
    main()
