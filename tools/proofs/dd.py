"""Proof of Distilled Decoding on MNIST (or scikit-learn's digits): docs/results/dd.json.

`fit experiment=dd/mnist` trains tokenizer and teacher where they are missing, makes the pairs and distils a student;
`validate` measures teacher, student and everything between. A VAR on digits besides. MNIST needs GENLIGHT_DATA; digits
are a rehearsal, whose bars are printed and not recorded.

    make proof NAME=dd
    python tools/proofs/dd.py --data digits     # minutes, nothing to download
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

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

TEACHER, DRAWN, AGAIN = "teacher", "teacher, drawn", "teacher, drawn again"
# how many groups of tokens an image has, and after how many passes of the teacher a student's sample is shown
GROUPS = {"mnist": 49, "digits": 16, "digits_var": 3}
PASSES = {"mnist": [1, 2, 4, 8], "digits": [1, 2, 4, 8], "digits_var": [1, 2]}
ONE, TWO, CLASS, ALL = "student, 1 step", "student, 2 steps", "onestep*, by class", "onestep*"


def distilled(folder: Path, recipe: str, seed: int, more: tuple[str, ...]) -> dict[str, Any]:
    """One student; its table by variant, the seconds of the commands, and how exact it is when refined to the end."""
    path = folder / f"{recipe}-{seed}"
    common = (f"experiment=dd/{recipe}", f"run.root={folder}", f"seed={seed}")
    fit = None
    if not (path / "fit" / "artifact").is_dir():
        fit = genlight("fit", *common, f"run.name={path.name}", *more)
    common = (*common, f"ckpt_path={path / 'fit'}", "run.overwrite=true")
    words = ("data.images.num_samples=3000", "metrics.metrics=[fd]", "metrics.extractor.dtype=float32")
    validate = genlight("validate", *common, f"run.name={path.name}", *words, f"method.refine={PASSES[recipe]}", *more)
    rows = {row["variant"]: row for row in report(path / "validate")["table"]}
    # as many passes as there are groups: as dear as it is exact, so without the others, and on fewer samples
    words = ("data.images.num_samples=500", "metrics=none", f"method.refine=[{GROUPS[recipe]}]", "method.skip=[]")
    words = (*words, "method.involved=[]", "method.latency_batches=[]")
    genlight("validate", *common, f"run.name={path.name}-exact", *words, *more)
    refined = [r for r in report(folder / f"{path.name}-exact" / "validate")["table"] if r["kind"] == "refined"]
    return {"recipe": recipe, "fit s": fit, "validate s": validate, "rows": rows, "exact": refined[0]["agreement"]}


def bars_of(result: dict[str, Any], prefix: str) -> list[Bar]:
    """The claims; `prefix` tells the teachers apart."""
    rows = result["rows"]
    name = next(key for key in rows[TEACHER] if key.startswith("fd_"))

    def of(variant: str, column: str = name) -> float:
        return float(rows[variant][column])

    skip = sorted((row["calls"], row["variant"]) for row in rows.values() if row["kind"] == "skip")
    middle = skip[len(skip) // 2][1]
    # the teacher up to the student's second step
    involved = next(row["variant"] for row in rows.values() if row["kind"] == "teacher involved")
    independent, one, drawn = of(CLASS, "nll"), of(ONE, "nll"), of(DRAWN, "nll")
    closed = (independent - one) / (independent - drawn)
    gap = abs(of(TEACHER, "nll") - drawn)
    nll = [of(variant, "nll") for variant in (ONE, TWO, involved)]
    # drawn, as the teacher is used: by the flow it takes longer
    speed = of(DRAWN, "ms_1") / of(ONE, "ms_1")
    distance = of(TEACHER, "bigram_distance") / of(AGAIN, "bigram_distance")
    ratios = {CLASS: 0.65, ALL: 0.35, middle: 0.75}
    return [
        bar_at_most(f"{prefix}a-nll", "|NLL of the flow - NLL of drawing|, nats per token", gap, 0.03),
        bar_at_most(f"{prefix}a-pairs", "bigram distance of the flow / of a second drawing", distance, 1.2),
        *(
            bar_at_most(f"{prefix}b-{index}", f"{name}: one step / {other}", of(ONE) / of(other), limit)
            for index, (other, limit) in enumerate(ratios.items(), 1)
        ),
        bar_at_least(f"{prefix}c", "share of the NLL gap from independent tokens to the teacher, closed", closed, 0.5),
        Bar(
            f"{prefix}d-nll",
            f"NLL falls: one step, two, {involved}",
            " > ".join(f"{value:.3f}" for value in nll),
            "falling",
            nll[0] > nll[1] > nll[2],
        ),
        bar_at_most(f"{prefix}d-fd", f"{name}: {involved} / one step", of(involved) / of(ONE), 1.0),
        bar_at_least(f"{prefix}e", "latency at batch 1: teacher, drawn / one step", speed, 15 if not prefix else 1.5),
        bar_at_least(
            f"{prefix}f", "tokens equal to the teacher's after as many passes as groups", result["exact"], 0.995
        ),
    ]


def main() -> None:
    """Run all, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the runs here; trainings that are there are used")
    parser.add_argument(
        "--data", choices=("mnist", "digits"), default="mnist" if os.environ.get("GENLIGHT_DATA") else "digits"
    )
    parser.add_argument("--no-var", action="store_true", help="without the VAR on digits")
    parser.add_argument("--dry", action="store_true", help="print the bars and record nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="further words of every command")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder, words = arguments.folder or Path(name), tuple(arguments.words)
        recipes = (arguments.data, *(() if arguments.no_var else ("digits_var",)))
        waiting = [pool.submit(distilled, folder, recipe, arguments.seed, words) for recipe in recipes]
        results = [each.result() for each in waiting]
    bars = [bar for result in results for bar in bars_of(result, "var-" if "var" in result["recipe"] else "")]
    table = [{"teacher": result["recipe"], **row} for result in results for row in result["rows"].values()] + [
        {"teacher": result["recipe"], "fit s": result["fit s"], "validate s": result["validate s"]}
        for result in results
    ]
    if not arguments.dry and arguments.data == "mnist":
        record("dd", bars, table, [arguments.seed], started)
        return
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    main()
