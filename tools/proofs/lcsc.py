"""Proof of LCSC on MNIST at 8×8 pixels: docs/results/lcsc.json. Needs the data, below GENLIGHT_DATA.

A one-step student is distilled by `fit experiment=lcsc/mnist8_cd`, in full and for a quarter of the steps, with its
checkpoints collected. For each search seed `validate` combines them by CMA-ES on geometric bins and by the paper's
genetic search; once more with averages only. Besides: what mixing costs, and what collecting costs.

Every number is measured on noise and real images that neither a search nor a choice has seen.

    make proof NAME=lcsc
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from genlight.reports.proof import Bar, bar_at_least, bar_at_most, write_proof, write_results_page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
STEPS, QUARTER = 8000, 2000
METRIC = "fd_mnist8"
EXPERIMENT = "experiment=lcsc/mnist8_cd"
RAW = "method.basis={_target_: genlight.checkpoints.bases.Raw}"
BUDGET = 250
VARIANTS = {
    "CMA-ES": [],
    "genetic": ["search=genetic", RAW],
    "convex": ["method.signed=false"],
}


def run(*words: str | Path) -> str:
    """A Python process on one core; what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def genlight(*words: str) -> float:
    """One command; its wall seconds."""
    started = time.monotonic()
    run("-m", "genlight", *words)
    return time.monotonic() - started


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def fit(folder: Path, steps: int) -> float:
    """A training, collected; the quarter is the beginning of the whole, since the learning rate is constant."""
    if (folder / f"cd{steps}" / "fit" / "artifact").is_dir():
        return 0.0
    return genlight("fit", EXPERIMENT, f"run.root={folder}", f"run.name=cd{steps}", f"trainer.max_steps={steps}")


def search(folder: Path, steps: int, variant: str, seed: int) -> dict[str, Any]:
    """One search on the checkpoints of a training."""
    name = f"{variant}-{steps}-{seed}"
    words = ["validate", EXPERIMENT, *VARIANTS[variant], f"run.root={folder}", f"run.name={name}"]
    random = variant == "CMA-ES" and steps == STEPS
    words += [f"search.budget={BUDGET}", f"method.random_search={str(random).lower()}"]
    seconds = genlight(*words, f"ckpt_path={folder}/cd{steps}/fit", f"search.seed={seed}")
    found = report(folder / name / "validate")
    return {
        "steps": steps,
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        "rows": found["table"],
        "folder": name,
    }


def score(result: dict[str, Any], *kinds: str) -> float:
    """On the report draw: of these kinds the one that is best on the select draw."""
    rows = [row for row in result["rows"] if row["kind"] in kinds]
    return min(rows, key=lambda row: row["select"])[METRIC]


def reloaded(folder: Path, result: dict[str, Any]) -> float:
    """Relative difference of the artifact, loaded again, to the table."""
    artifact = folder / result["folder"] / "validate" / "artifact"
    words = [
        "validate",
        "data=mnist",
        "data.image_size=8",
        "metrics=mnist8",
        "module=consistency",
        "module.objective=null",
    ]
    words += [f"module.pretrained={artifact}", f"run.root={folder}", "run.name=reloaded", "data.eval_batch_size=1000"]
    genlight(*words, "data.num_samples=10000")
    again = report(folder / "reloaded" / "validate")["metrics"][f"val/{METRIC}"]
    return abs(again / score(result, "LCSC") - 1)


EMA = ("tracked ema",)
USUAL = ("tracked ema", "power ema", "lawa", "swa", "single", "ema", "last")


def bars_of(results: list[dict[str, Any]], difference: float, mixing: dict[str, Any]) -> list[Bar]:
    """The claims; medians over search seeds."""

    def of(variant: str, steps: int) -> list[dict[str, Any]]:
        return [r for r in results if (r["variant"], r["steps"]) == (variant, steps)]

    def mid(variant: str, steps: int, *kinds: str) -> float:
        return median(score(r, *kinds) for r in of(variant, steps))

    ga, cma = {}, {}
    for steps in (QUARTER, STEPS):
        ga[steps], cma[steps] = mid("genetic", steps, "LCSC"), mid("CMA-ES", steps, "LCSC")
    ema = {steps: mid("CMA-ES", steps, *EMA) for steps in (QUARTER, STEPS)}
    usual, last = mid("CMA-ES", STEPS, *USUAL), mid("CMA-ES", STEPS, "last")
    convex = median(score(r, "LCSC") for r in of("convex", STEPS))
    kept = []
    for r in of("CMA-ES", STEPS):
        rows = {row["kind"]: row for row in r["rows"]}
        kept.append((rows["last"][METRIC] - rows["LCSC"][METRIC]) / (rows["last"]["search"] - rows["LCSC"]["search"]))
    random = mid("CMA-ES", STEPS, "random search")
    return [
        bar_at_most("B1", "genetic at 25 % of training / best tracked EMA there", ga[QUARTER] / ema[QUARTER], 0.90),
        bar_at_most("B2", "genetic at 25 % / best tracked EMA of the whole training", ga[QUARTER] / ema[STEPS], 1.0),
        bar_at_most(
            "B2-cma", "CMA-ES at 25 % / best tracked EMA of the whole training", cma[QUARTER] / ema[STEPS], 0.95
        ),
        bar_at_most("B3", "genetic / best of all averages, whole training", ga[STEPS] / usual, 0.90),
        bar_at_most("B3-cma", "CMA-ES / best of all averages, whole training", cma[STEPS] / usual, 0.80),
        bar_at_most("B4", "CMA-ES on bins / genetic, equal evaluations", cma[STEPS] / ga[STEPS], 1.0),
        bar_at_most(
            "B5", "averages only: share of the signed gain over the last", (last - convex) / (last - cma[STEPS]), 0.5
        ),
        bar_at_least("B6", "gain on the report draw / gain on the search draw", median(kept), 0.5),
        bar_at_most("B7", "genetic / random search, equal evaluations and start", ga[STEPS] / random, 0.95),
        bar_at_most("B9", "artifact loaded again: relative difference", difference, 1e-4),
        bar_at_least("mix-bandwidth", "mixing / bandwidth of a copy", mixing["raw"]["share_of_copy"], 0.5),
        bar_at_least("mix-naive", "averaging state dicts / mixing, time", mixing["raw"]["state_dicts_over_mix"], 5),
    ]


def table_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Distance on the report draw by weights, training and seed."""
    rows = []
    for result in results:
        for row in result["rows"]:
            if row["kind"] == "LCSC" or (result["variant"] == "CMA-ES" and result["seed"] == 0):
                rows.append(
                    {
                        "steps": result["steps"],
                        "weights": f"LCSC, {result['variant']}" if row["kind"] == "LCSC" else row["weights"],
                        "seed": result["seed"],
                        "search": row["search"],
                        "select": row["select"],
                        METRIC: row[METRIC],
                        "seconds": round(result["seconds"]) if row["kind"] == "LCSC" else None,
                    }
                )
    return rows


def mixing_speed() -> dict[str, Any]:
    """Ratios of tools/benchmarks/mixing.py."""
    return json.loads(run("tools/benchmarks/mixing.py", "--parameters", "1000000", "--rounds", "7").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep trainings and searches here; those that are there are used")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    if not os.environ.get("GENLIGHT_DATA"):
        print("skipped: GENLIGHT_DATA names no folder with MNIST (mnist10k/mnist)")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        if not (folder / "lcsc" / "mnist8_teacher" / "fit" / "artifact").is_dir():
            genlight("fit", "experiment=lcsc/mnist8_teacher", f"run.root={folder}", "run.name=lcsc/mnist8_teacher")
        list(pool.map(lambda steps: fit(folder, steps), (STEPS, QUARTER)))
        wanted = [
            (steps, variant, seed) for seed in seeds for steps in (STEPS, QUARTER) for variant in ("CMA-ES", "genetic")
        ]
        wanted.append((STEPS, "convex", seeds[0]))
        results = list(pool.map(lambda each: search(folder, *each), wanted))
        difference = reloaded(folder, results[0])
        mixing = mixing_speed()
    bars = bars_of(results, difference, mixing)
    write_proof(
        RESULTS / "lcsc.json",
        bars=bars,
        seeds=seeds,
        wall_seconds=time.monotonic() - started,
        table=table_of(results),
        command=["make", "proof", "NAME=lcsc"],
    )
    write_results_page(RESULTS)
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    main()
