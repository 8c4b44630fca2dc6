"""Proof of Distilled Decoding on MNIST (or scikit-learn's digits): docs/results/dd.json.

For tokens in raster order and for a VAR `fit experiment=dd/mnist` trains tokenizer and teacher where they are missing,
makes the pairs and distils a student; `validate` measures teacher, student and everything between. Before that
tools/benchmarks/dd_pairs.py has the machine for itself, and after it every row's latency. MNIST needs GENLIGHT_DATA;
digits are a rehearsal, whose bars are printed and not recorded. With --folder a proof that was cut off goes on.

    make proof NAME=dd
    python tools/proofs/dd.py --data digits          # minutes, nothing to download
    python tools/proofs/dd.py --data digits --tiny   # whether all of it runs
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import _turns
from _commands import ROOT, genlight, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

DRAWN, AGAIN, TEACHER = "teacher, drawn", "teacher, drawn again", "teacher"
ONE, TWO, CLASS, ALL = "student, 1 step", "student, 2 steps", "onestep*, by class", "onestep*"
# how many groups of tokens an image has, and after how many passes of the teacher a student's sample is shown
GROUPS = {"mnist": 49, "mnist_var": 4, "digits": 16, "digits_var": 3}
PASSES = {"mnist": [1, 2, 4, 8], "mnist_var": [1, 2, 3], "digits": [1, 2, 4, 8], "digits_var": [1, 2]}
# times of each row, its batches, and at least how many seconds of calls in a turn
ROUNDS, BATCHES, CALLS_SECONDS = 5, (1, 16, 256), 0.05
# that all latencies may take, and which rows one process times, in turn
LATENCY_SECONDS = 200.0
KINDS = {"alone": ("teacher", "student", "skip", "onestep"), "both": ("teacher involved", "refined")}
# a rehearsal, which shows that all of it runs
FEW_STEPS = ("trainer.max_steps=10", "trainer.val_check_interval=10", "trainer.num_sanity_val_steps=0")
# few steps that are felt: at once, and in the average; to a teacher without them all tokens are alike
FELT = ("module.lr_scheduler=null", "callbacks.ema.update_starting_at_step=1", "callbacks.ema.decay=0.5")
TINY = (*FEW_STEPS, *FELT, "data.num_pairs=200", "data.shard_size=100", "data.images.num_samples=40")
TINY_PAIRS = ("--images", "4", "--single", "1", "--rounds", "1", "--snap-tokens", "4096")


def distilled(folder: Path, recipe: str, seed: int, more: tuple[str, ...]) -> dict[str, Any]:
    """One student; its table by variant, the seconds of the commands, and how exact it is when refined to the end."""
    path = folder / f"{recipe}-{seed}"
    common = (f"experiment=dd/{recipe}", f"run.root={folder}", f"seed={seed}")
    fit = None
    if not (path / "fit" / "artifact").is_dir():
        fit = genlight("fit", *common, f"run.name={path.name}", *more)
    # another student trains meanwhile: latencies come later
    common = (*common, f"ckpt_path={path / 'fit'}", "run.overwrite=true", "method.latency_batches=[]")
    words = ("data.images.num_samples=3000", "metrics.metrics=[fd]", "metrics.extractor.dtype=float32")
    validate = _table(path, *common, *words, f"method.refine={PASSES[recipe]}", *more)
    rows = {row["variant"]: row for row in report(path / "validate")["table"]}
    # as many passes as there are groups: as dear as it is exact, so without the others, and on fewer samples
    words = ("data.images.num_samples=500", "metrics=none", f"method.refine=[{GROUPS[recipe]}]", "method.skip=[]")
    exact = folder / f"{path.name}-exact"
    _table(exact, *common, *words, "method.involved=[]", *more)
    refined = [row for row in report(exact / "validate")["table"] if row["kind"] == "refined"]
    learned = report(path / "fit")["metrics"].get("train/agreement")
    return {
        "recipe": recipe,
        "rows": rows,
        "exact": refined[0]["agreement"],
        "costs": {"fit s": fit, "validate s": validate, "train/agreement": learned},
    }


def _table(path: Path, *words: str) -> float | None:
    """The table of a student, in that run, where it is not there yet; its seconds."""
    if (path / "validate" / "report.json").is_file():
        return None
    return genlight("validate", f"run.name={path.name}", *words)


def rehearse(folder: Path, recipe: str) -> None:
    """A tokenizer and a teacher that have hardly learned, where the fit of a student looks for them."""
    for part, words in (("tokenizer", ()), ("teacher", FELT)):
        name = f"dd/{recipe}_{part}"
        if not (folder / name / "fit" / "artifact").is_dir():
            few = ("trainer.limit_val_batches=1", *FEW_STEPS, *words)
            genlight("fit", f"experiment={name}", f"run.root={folder}", *few)


def time_rows(folder: Path, recipe: str, seed: int, kinds: str) -> None:
    """A process of its own: answer with milliseconds of the rows of some kinds, one after the other in each turn."""
    import torch

    from genlight.diffusion.teacher_passes import Marginals
    from genlight.loops.dd_variants import Choices, variants_of
    from genlight.modules.distilled_decoding import DistilledDecodingModule

    fitted = json.loads((folder / f"{recipe}-{seed}" / "fit" / "artifact" / "config.json").read_text())
    teacher = folder / "dd" / f"{recipe}_teacher" / "fit" / "artifact"
    # time does not depend on the weights, nor on what tokens have been counted: the student is as it begins
    module = DistilledDecodingModule(str(teacher), timesteps=fitted["trained_timesteps"]).eval()
    shape, classes = module.sample_shape, int(module.teacher.num_classes or 1)
    codes = len(module.teacher.model.codebook)
    tokens, labels = torch.randint(codes, (100 * classes, shape[0])), torch.arange(100 * classes) % classes
    counted = Marginals(tokens, codes, labels), Marginals(tokens, codes)
    variants = variants_of(module, Choices(None, PASSES[recipe], None, 32, "2m"), *counted)
    noise, labels = torch.randn(max(BATCHES), *shape), torch.arange(max(BATCHES)) % classes
    calls: dict[str, Callable[[], Any]] = {
        f"{variant.name} ms_{size}": lambda decode=variant.decode, size=size: decode(noise[:size], labels[:size])
        for variant in variants
        if variant.kind in KINDS[kinds]
        for size in BATCHES
    }

    def settle() -> dict[str, Any]:
        for call in calls.values():
            call()
        return {}

    _turns.say()
    with torch.no_grad():
        _turns.serve(settle, lambda: {case: _milliseconds(call) for case, call in calls.items()})


def _milliseconds(call: Callable[[], Any]) -> float:
    """Median of calls until `CALLS_SECONDS` have gone by, of one at least."""
    found: list[float] = []
    until = time.perf_counter() + CALLS_SECONDS
    while not found or time.perf_counter() < until:
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return median(found)


def add_latencies(folder: Path, results: list[dict[str, Any]], seed: int) -> None:
    """Give every row its milliseconds, and every result how many times the teacher takes what its student does.

    Raises:
        RuntimeError: a process failed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sides = {}
    for result in results:
        for kinds in KINDS:
            words = [__file__, "--folder", str(folder), "--seed", str(seed), "--side", result["recipe"], kinds]
            log = folder / f"latency-{result['recipe']}-{kinds}.log"
            sides[result["recipe"], kinds] = _turns.Side(f"{result['recipe']}, {kinds}", words, log)
    _turns.take_turns(list(sides.values()), LATENCY_SECONDS, ROUNDS, lambda: None)
    for side in sides.values():
        if not side.rounds:
            raise RuntimeError(f"{side.name}: {side.error}")
    for result in results:
        for kinds in KINDS:
            for case, times in sides[result["recipe"], kinds].rounds.items():
                name, key = case.rsplit(" ", 1)
                result["rows"][name][key] = median(times.values())
        rounds = sides[result["recipe"], "alone"].rounds
        teacher, student = rounds[f"{DRAWN} ms_1"], rounds[f"{ONE} ms_1"]
        result["speed"] = median(teacher[turn] / student[turn] for turn in teacher)


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
    distance = of(TEACHER, "bigram_distance") / of(AGAIN, "bigram_distance")
    ratios = {CLASS: 0.65, ALL: 0.35, middle: 0.75}
    # drawn, as the teacher is used: by the flow it takes longer
    faster = "latency at batch 1: teacher, drawn / one step"
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
        bar_at_least(f"{prefix}e", faster, result["speed"], 1.5 if prefix else 15),
        bar_at_least(
            f"{prefix}f", "tokens equal to the teacher's after as many passes as groups", result["exact"], 0.995
        ),
    ]


def pairs_bars(found: dict[str, Any]) -> list[Bar]:
    """What tools/benchmarks/dd_pairs.py says of speed, of the slower network, and of memory."""
    speed = min(found[network]["pairs_speed"] for network in ("raster", "scales"))
    snap = found["snap"]
    what = f"memory of snapping {snap['snap_tokens']} tokens to {snap['snap_codes']} codes / tokens × chunk × 4 bytes"
    return [
        bar_at_least("pairs-speed", "pairs: 200 steps of Euler, one token at a time and no cache / 2M-32", speed, 5),
        bar_at_most("snap-memory", what, snap["snap_bytes"] / snap["chunk_bytes"], 2),
    ]


def main() -> None:
    """Run all, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are there are used")
    parser.add_argument(
        "--data", choices=("mnist", "digits"), default="mnist" if os.environ.get("GENLIGHT_DATA") else "digits"
    )
    parser.add_argument("--no-var", action="store_true", help="without the VAR, and record nothing")
    parser.add_argument("--dry", action="store_true", help="print the bars and record nothing")
    parser.add_argument("--tiny", action="store_true", help="sizes to try the program, which prove nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="further words of every command; record nothing")
    arguments = parser.parse_args()
    if arguments.side:
        time_rows(arguments.folder, arguments.side[0], arguments.seed, arguments.side[1])
        return
    started = time.monotonic()
    sizes, few = (TINY_PAIRS, TINY) if arguments.tiny else (("--images", "64"), ())
    pairs = json.loads(run(ROOT / "tools" / "benchmarks" / "dd_pairs.py", *sizes))
    print(f"{time.strftime('%X')} pairs: {pairs}", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder, words = (arguments.folder or Path(name)).resolve(), (*few, *arguments.words)
        recipes = (arguments.data, *(() if arguments.no_var else (f"{arguments.data}_var",)))
        if arguments.tiny:
            list(pool.map(lambda recipe: rehearse(folder, recipe), recipes))
        waiting = [pool.submit(distilled, folder, recipe, arguments.seed, words) for recipe in recipes]
        results = [each.result() for each in waiting]
        add_latencies(folder, results, arguments.seed)
    bars = [bar for result in results for bar in bars_of(result, "var-" if "var" in result["recipe"] else "")]
    bars += pairs_bars(pairs)
    table = [{"teacher": result["recipe"], **row} for result in results for row in result["rows"].values()]
    table += [{"teacher": result["recipe"], **result["costs"]} for result in results]
    table += [{"teacher": f"random weights, {network}", **pairs[network]} for network in ("raster", "scales")]
    table.append({"teacher": None, **pairs["snap"]})
    part = arguments.tiny or arguments.no_var or arguments.words or arguments.data != "mnist"
    if not (arguments.dry or part):
        record("dd", bars, table, [arguments.seed], started)
        return
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    main()
