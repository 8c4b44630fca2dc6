"""LCSC on MNIST at 28×28 pixels with a small UNet: docs/results/lcsc_mnist.json. Needs the data, below GENLIGHT_DATA.

The recipes lcsc/mnist_teacher and lcsc/mnist_cd, made small enough for a CPU and otherwise not tuned: the student of
one step, and the diffusion model itself at few and at more steps of DPM-Solver++. Every average stands beside it.

Every number is measured on noise and real images that neither a search nor a choice has seen.

    make proof NAME=lcsc_mnist
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _commands import genlight, record, report

from genlight.reports.proof import Bar, bar_at_most

METRIC = "fd_mnist"
TEACHER, STUDENT = "lcsc/mnist_teacher", "lcsc/mnist_cd"
SMALL = ("module.network.block_out_channels=[16,32,32]", "module.network.layers_per_block=1", "data.batch_size=64")
# checkpoints of a falling learning rate differ too little to be combined
CONSTANT = ("module.lr_scheduler=null",)
TEACHER_STEPS, STUDENT_STEPS = 2500, 1000
FEW, MORE = 6, 9
TRACKED = ("tracked ema",)
USUAL = ("tracked ema", "post-hoc ema", "power ema", "lawa", "swa", "single", "ema", "last", "line", "neon")


def steps(count: int) -> tuple[str, ...]:
    """The length of a training."""
    return f"trainer.max_steps={count}", f"trainer.val_check_interval={count}"


def searched(folder: Path, name: str, budget: int, seed: int, *words: str) -> dict[str, Any]:
    """One search on the checkpoints of a training, unless an earlier call finished it; seconds are of all of it."""
    run = folder / name / "validate"
    if not (run / "report.json").is_file():
        words = (*words, f"run.root={folder}", f"run.name={name}", f"search.budget={budget}", f"search.seed={seed}")
        words = (*words, "resume=true", "method.random_search=false", "method.singles=5", "metrics.metrics=[fd]")
        words = (*words, "search.shared=false")
        genlight("validate", *words, "metrics.extractor.dtype=float32", "data.eval_batch_size=500")
    found = report(run)
    return {"seed": seed, "seconds": found["real"]["total_seconds"], "rows": found["table"]}


def student(folder: Path, seed: int) -> dict[str, Any]:
    """The student of one step."""
    words = (f"experiment={STUDENT}", f"ckpt_path={folder}/{STUDENT}/fit", "search.fidelity=1000")
    words = (*words, "method.select=1000", "data.num_samples=3000")
    return searched(folder, f"student-{seed}", 150, seed, *words)


def diffusion(folder: Path, count: int, budget: int) -> dict[str, Any]:
    """The diffusion model at some steps of its sampler."""
    words = (f"experiment={TEACHER}", *SMALL, "method=lcsc", "search=lcsc", f"method.objective=val/{METRIC}")
    words = (
        *words,
        f"ckpt_path={folder}/{TEACHER}/fit",
        "search.fidelity=250",
        "method.select=500",
        "data.num_samples=1000",
    )
    return searched(folder, f"diffusion-{count}", budget, 0, *words, f"module.num_inference_steps={count}")


def score(result: dict[str, Any], *kinds: str) -> float:
    """On the report draw: of these kinds the one that is best on the select draw."""
    rows = [row for row in result["rows"] if row["kind"] in kinds]
    return float(min(rows, key=lambda row: row["select"])[METRIC])


def rows_of(what: str, result: dict[str, Any], all_kinds: bool) -> list[dict[str, Any]]:
    """Lines of the table."""
    return [
        {
            "sampler": what,
            "weights": row["weights"],
            "seed": result["seed"],
            **{key: row[key] for key in ("search", "select", METRIC)},
            "seconds": round(result["seconds"]) if row["kind"] == "LCSC" else None,
        }
        for row in result["rows"]
        if all_kinds or row["kind"] == "LCSC"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, help="keep trainings and searches here; those that are there are used")
    parser.add_argument("--student-only", action="store_true", help="leave the diffusion model out, half of the time")
    arguments = parser.parse_args()
    if not os.environ.get("GENLIGHT_DATA"):
        print("skipped: GENLIGHT_DATA names no folder with MNIST (mnist10k/mnist)")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        fits = {TEACHER: (*SMALL, *CONSTANT, *steps(TEACHER_STEPS), "callbacks=collector")}
        fits[STUDENT] = ("data.batch_size=64", *steps(STUDENT_STEPS))
        for experiment, words in fits.items():
            if not (folder / experiment / "fit" / "artifact").is_dir():
                genlight("fit", f"experiment={experiment}", *words, f"run.root={folder}", f"run.name={experiment}")
        students = list(pool.map(lambda seed: student(folder, seed), arguments.seeds))
        counts = () if arguments.student_only else ((FEW, 60), (MORE, 1))
        models = list(pool.map(lambda settings: diffusion(folder, *settings), counts))
    what = "Fréchet distance, largest over search seeds: LCSC / "
    bars: list[Bar] = [
        bar_at_most(
            "mnist", what + "best tracked EMA", max(score(s, "LCSC") / score(s, *TRACKED) for s in students), 1.0
        ),
        bar_at_most(
            "mnist-all",
            what + "best of all other weights",
            max(score(s, "LCSC") / score(s, *USUAL) for s in students),
            1.0,
        ),
    ]
    for few, more in [models] if models else []:
        said = f"diffusion, DPM-Solver++: LCSC at {FEW} steps / best tracked EMA at {MORE}"
        bars.append(bar_at_most("nfe", said, score(few, "LCSC") / score(more, *TRACKED), 1.1))
    table = [row for s in students for row in rows_of("1 step", s, s["seed"] == arguments.seeds[0])]
    for count, model in zip((FEW, MORE), models):
        table += rows_of(f"{count} steps", model, True)
    words = ["--student-only"] if arguments.student_only else []
    record("lcsc_mnist", bars, table, arguments.seeds, started, words)


if __name__ == "__main__":
    main()
