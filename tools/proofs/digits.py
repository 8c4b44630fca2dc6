"""Proof of the training pipeline on handwritten digits: docs/results/digits.json.

For each seed: fit, validate, and validate of the untrained network, by the commands a user types, in processes of their
own. Besides: the same command twice gives the same weights; overhead of the Trainer; CPU time of a fit of one step.

    make proof NAME=digits
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

from _commands import ROOT, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most
from genlight.trainer.checkpoint_io import load_checkpoint


def genlight(*words: str) -> tuple[float, float]:
    """One command in a process of its own; returns wall and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "genlight", *words], check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def one_seed(folder: Path, seed: int) -> dict[str, float]:
    """Scores of the trained and the untrained network, and what the run cost."""
    common = (f"run.root={folder}", f"seed={seed}")
    fit_seconds, fit_cpu = genlight("fit", *common, f"run.name=s{seed}")
    validate_seconds, _ = genlight("validate", *common, f"run.name=s{seed}", f"ckpt_path={folder}/s{seed}/fit")
    genlight("validate", *common, f"run.name=u{seed}")
    trained, untrained = report(folder / f"s{seed}" / "validate"), report(folder / f"u{seed}" / "validate")
    fit = report(folder / f"s{seed}" / "fit")
    fd, fd_untrained = (r["metrics"]["val/fd_digits"] for r in (trained, untrained))
    floor = trained["floor"]["metrics"]["fd_digits"]
    return {
        "seed": seed,
        "fd": fd,
        "fd untrained": fd_untrained,
        "floor": floor,
        "gain": fd_untrained / fd,
        "fd / floor": fd / floor,
        "fit s": fit_seconds,
        "fit CPU s": fit_cpu,
        "validate s": validate_seconds,
        "predicted fit s": fit["predicted"]["total_seconds"],
    }


def same_weights_twice(folder: Path) -> bool:
    """Two processes, the same short command, compared bit for bit."""
    states = []
    for name in ("one", "two"):
        genlight("fit", f"run.root={folder}", f"run.name={name}", "trainer.max_steps=30")
        states.append(load_checkpoint(folder / name / "fit" / "checkpoints" / "step-000030.ckpt")["state_dict"])
    return all((states[0][name] == states[1][name]).all() for name in states[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = ("data.num_samples=20", "module.num_inference_steps=1")
        genlight("validate", f"run.root={folder}", "run.name=warm", *few)  # trains the feature network
        rows = [one_seed(folder, seed) for seed in seeds]
        identical = same_weights_twice(folder)
        short = ("trainer.max_steps=1", "trainer.num_sanity_val_steps=0")
        starts = [genlight("fit", f"run.root={folder}", f"run.name=start{i}", *short)[1] for i in range(3)]
    overhead = run("tools/benchmarks/overhead.py", "--steps", "150", "--rounds", "5")
    ratio = json.loads(overhead[overhead.index("{\n") :])["ratio"]
    gain, distance = min(row["gain"] for row in rows), max(row["fd / floor"] for row in rows)
    seconds = fmean(row["fit s"] + row["validate s"] for row in rows)
    bars = [
        bar_at_least("demo-fd-gain", "FD untrained / FD trained, the smallest over seeds", gain, 20),
        bar_at_most("demo-fd-floor", "FD / real-vs-real floor, the largest over seeds", distance, 1.5),
        Bar("demo-deterministic", "the same command twice: equal weights", str(identical), "True", identical),
        bar_at_most("demo-seconds", "fit + validate, mean wall seconds", seconds, 300),
        bar_at_most("overhead", "CPU time of Trainer / bare loop, median of 5 rounds of 150 steps", ratio, 1.05),
        bar_at_most("startup", "CPU seconds of a fit of one step, whole process, best of 3", min(starts), 10),
    ]
    record("digits", bars, rows, seeds, started)


if __name__ == "__main__":
    main()
