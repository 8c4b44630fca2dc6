"""Proof of LCSC on MNIST at 8×8 pixels: docs/results/lcsc.json. Needs the data, below GENLIGHT_DATA.

A one-step student is distilled by `fit experiment=lcsc/mnist8_cd`, in full and for a quarter of the steps, with its
checkpoints collected. For each search seed `validate` combines them by CMA-ES on geometric bins and by the paper's
genetic search; once more with averages only. The diffusion model that is the teacher is combined too, for few
evaluations of its sampler. Besides: what mixing costs, and what collecting costs.

Every number is measured on noise and real images that neither a search nor a choice has seen. With --folder a call
goes on where another one ended; the wall seconds that are recorded are then those of the last one.

    make proof NAME=lcsc
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from _commands import genlight, record, report, run, watch

from genlight import io
from genlight.reports.proof import Bar, bar_at_least, bar_at_most

STEPS, QUARTER = 8000, 2000
METRIC = "fd_mnist8"
EXPERIMENT = "experiment=lcsc/mnist8_cd"
RAW = "method.basis={_target_: genlight.checkpoints.bases.Raw}"
BUDGET, FIDELITY = 600, 2000
# a search in one batch: a fifth quicker than in eight
BATCH = f"data.eval_batch_size={FIDELITY}"
# of the diffusion model, where 600 candidates were not enough for the search to settle
DIFFUSION_BUDGET = 1200
# of the whole training until here 50 checkpoints were collected
UNTIL_50 = 4000
VARIANTS = {
    "CMA-ES": [],
    "genetic": ["search=genetic", RAW],
    "convex": ["method.signed=false"],
    "50 checkpoints": ["search=genetic", RAW, f"method.until={UNTIL_50}"],
}
# the diffusion model that is also the teacher: evaluations of Heun's method with the combination, and of the averages
FEW, MORE = 7, 9
# checkpoints of a falling learning rate differ too little to be combined
CONSTANT = ("module.lr_scheduler=null", "module.optimizer.lr=1e-3")


def timed(file: Path, calls: dict[str, tuple[type, str]], words: list[str]) -> int:
    """A command of genlight with the wall seconds spent in some methods, which go to a JSON file with all seconds."""
    import torch

    from genlight.cli import main as command

    torch.set_num_threads(1)
    seconds = watch(calls)
    begun = time.perf_counter()
    code = command(words)
    whole = time.perf_counter() - begun
    if not code:
        io.atomic_write_json(file, {name: sum(each) for name, each in seconds.items()} | {"all": whole})
    return code


def timed_search(file: Path, words: list[str]) -> int:
    """Seconds that applying candidates takes, and measuring them."""
    from genlight.loops.evaluation import MetricObjective
    from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients

    calls = {"apply": (CheckpointCoefficients, "apply"), "measure": (MetricObjective, "evaluate_applied")}
    return timed(file, calls, words)


def timed_fit(file: Path, words: list[str]) -> int:
    """Seconds that collecting takes of the training's thread, and writing of its own."""
    from genlight.callbacks.checkpoint_collector import CheckpointCollector
    from genlight.checkpoints.writer import TrajectoryWriter

    calls = {"collect": (CheckpointCollector, "on_train_batch_end"), "write": (TrajectoryWriter, "append")}
    return timed(file, calls, words)


def fit(folder: Path, steps: int) -> dict[str, float]:
    """Seconds of a training, collected; the quarter is the beginning of the whole: the learning rate is constant."""
    file = folder / f"collect{steps}.json"
    if not file.is_file():
        words = ["fit", EXPERIMENT, f"run.root={folder}", f"run.name=cd{steps}", f"trainer.max_steps={steps}"]
        run(__file__, "--timed-fit", file, *words, "run.overwrite=true")
    found: dict[str, float] = json.loads(file.read_text())
    return found


def make_heun(folder: Path) -> None:
    """`heun`: the diffusion model with the sampler of Karras et al. 2022, algorithm 1, at both numbers of evaluations.

    Made before the two commands that read it, which run side by side.
    """
    from genlight.diffusion.export_scheduler import scheduler_of, write_scheduler
    from genlight.diffusion.noise_schedules import EDMSchedule
    from genlight.diffusion.prediction import Prediction
    from genlight.diffusion.solver.presets import named_schedule
    from genlight.diffusion.solver.serialization import SolverBank

    trained, made = folder / "lcsc" / "mnist8_teacher" / "fit" / "artifact", folder / "heun"
    if not made.is_dir():
        schedule = EDMSchedule(0.002, 80.0, 0.5)
        every = {nfe: named_schedule("heun", schedule, nfe, spacing="edm", end="clean") for nfe in (FEW, MORE)}
        shutil.copytree(trained, folder / "heun.part")
        write_scheduler(scheduler_of(SolverBank.of(Prediction("edm", schedule), every)), folder / "heun.part")
        (folder / "heun.part").rename(made)


def kept(folder: Path, name: str, work: Callable[..., dict[str, Any]], *values: Any) -> dict[str, Any]:
    """What a piece of work found, now or in an earlier call; one that was stopped begins anew."""
    file = folder / f"{name}.json"
    if not file.is_file():
        io.atomic_write_json(file, work(folder, name, *values))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def diffusion(folder: Path, name: str, nfe: int, budget: int, seed: int) -> dict[str, Any]:
    """The combination of the diffusion model's checkpoints for few evaluations of Heun; the averages beside it."""
    words = ["validate", "data=mnist", "data.image_size=8", "metrics=mnist8", "module=diffusion_pretrained"]
    words += ["method=lcsc", "search=lcsc", f"method.objective=val/{METRIC}", f"module.pretrained={folder}/heun"]
    words += [
        f"method.trajectory={folder}/lcsc/mnist8_teacher/fit/trajectory",
        f"run.root={folder}",
        f"run.name={name}",
        "run.overwrite=true",
    ]
    words += [BATCH, "data.num_samples=10000", f"module.num_inference_steps={nfe}"]
    genlight(
        *words,
        f"search.budget={budget}",
        f"search.seed={seed}",
        "method.random_search=false",
        "method.singles=5",
        "metrics.metrics=[fd]",
        "metrics.extractor.dtype=float32",
    )
    return {"rows": report(folder / name / "validate")["table"], "nfe": nfe, "seed": seed}


def two(folder: Path, name: str) -> dict[str, Any]:
    """The student's averages at two steps: no search."""
    words = ["validate", EXPERIMENT, f"ckpt_path={folder}/cd{STEPS}/fit", f"run.root={folder}", f"run.name={name}"]
    words += ["run.overwrite=true", "module.num_inference_steps=2", "search.budget=1", f"search.fidelity={FIDELITY}"]
    genlight(*words, "method.random_search=false", BATCH)
    return {"rows": report(folder / name / "validate")["table"]}


def search(folder: Path, name: str, steps: int, variant: str, seed: int, first: bool) -> dict[str, Any]:
    """One search on the checkpoints of a training; with the first seed it measures all itself, for its time."""
    words = ["validate", EXPERIMENT, *VARIANTS[variant], f"run.root={folder}", f"run.name={name}"]
    # as many evaluations again, so for one seed
    random = variant == "CMA-ES" and steps == STEPS and first
    budget = 20 if variant == "50 checkpoints" else BUDGET
    words += [
        f"search.budget={budget}",
        f"search.fidelity={FIDELITY}",
        f"method.random_search={str(random).lower()}",
        f"search.seed={seed}",
        f"search.shared={str(not first).lower()}",
        "run.overwrite=true",
        BATCH,
    ]
    shares, begun = folder / f"apply-{name}.json", time.monotonic()
    run(__file__, "--timed-search", shares, *words, f"ckpt_path={folder}/cd{steps}/fit")
    seconds = time.monotonic() - begun
    found = report(folder / name / "validate")
    return {
        "steps": steps,
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        "rows": found["table"],
        "folder": name,
        "shares": json.loads(shares.read_text()),
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
    words += [f"module.pretrained={artifact}", f"run.root={folder}", "run.name=reloaded", "run.overwrite=true", BATCH]
    genlight(*words, "data.num_samples=10000")
    again = report(folder / "reloaded" / "validate")["metrics"][f"val/{METRIC}"]
    held = json.loads((artifact / "coefficients.json").read_text())["name"]
    return abs(again / next(row[METRIC] for row in result["rows"] if row["weights"] == held) - 1)


EMA = ("tracked ema",)
USUAL = ("tracked ema", "post-hoc ema", "power ema", "lawa", "swa", "single", "ema", "last", "line", "neon")


def bars_of(
    results: list[dict[str, Any]],
    models: list[dict[str, Any]],
    twice: dict[str, Any],
    fits: dict[int, dict[str, float]],
    difference: float,
    mixing: dict[str, Any],
) -> list[Bar]:
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
    random = score(of("CMA-ES", STEPS)[0], "random search")
    at = {nfe: [model for model in models if model["nfe"] == nfe] for nfe in (FEW, MORE)}
    few, averaged = (median(score(model, *kinds) for model in at[FEW]) for kinds in (("LCSC",), EMA))
    whole = fits[STEPS]["all"]
    # the first search measures all, those after it take scores of averages
    cost = fits[QUARTER]["all"] + of("CMA-ES", QUARTER)[0]["seconds"]
    medians = f", median of {len(of('CMA-ES', STEPS))} searches of {BUDGET}"
    apply = max(r["shares"]["apply"] / r["shares"]["measure"] for r in of("50 checkpoints", STEPS))
    collected = (fits[STEPS]["collect"] + fits[STEPS]["write"]) / fits[STEPS]["all"]
    diffused = f"diffusion, median of {len(at[FEW])} searches of {DIFFUSION_BUDGET}: LCSC at {FEW} evaluations / best "
    return [
        bar_at_most(
            "b1", "genetic at 25 % of training / best tracked EMA there" + medians, ga[QUARTER] / ema[QUARTER], 0.90
        ),
        bar_at_most(
            "b2", "genetic at 25 % / best tracked EMA of the whole training" + medians, ga[QUARTER] / ema[STEPS], 1.0
        ),
        bar_at_most(
            "b2-cma",
            "CMA-ES at 25 % / best tracked EMA of the whole training" + medians,
            cma[QUARTER] / ema[STEPS],
            0.95,
        ),
        bar_at_most(
            "cost", "time of a quarter of the training and of one search (CMA-ES) / of the whole", cost / whole, 1.0
        ),
        bar_at_most("b3", "genetic / best of all other weights, whole training" + medians, ga[STEPS] / usual, 0.90),
        bar_at_most("b3-cma", "CMA-ES / best of all other weights, whole training" + medians, cma[STEPS] / usual, 0.80),
        bar_at_most("b4", "CMA-ES on bins / genetic" + medians, cma[STEPS] / ga[STEPS], 1.0),
        bar_at_most(
            "b5",
            "averages only, one search: share of the signed gain over the last",
            (last - convex) / (last - cma[STEPS]),
            0.5,
        ),
        bar_at_least("b6", "CMA-ES: gain on the report draw / on the search draw" + medians, median(kept), 0.5),
        bar_at_most("b7", "genetic" + medians + " / one random search of as many", ga[STEPS] / random, 0.95),
        bar_at_most("b8-same", diffused + "tracked EMA at as many", few / averaged, 0.6),
        bar_at_most("b8-more", f"{diffused}tracked EMA at {MORE}", few / score(at[MORE][0], *EMA), 1.1),
        bar_at_most(
            "two",
            "CMA-ES at one step / best of all other weights at two" + medians,
            cma[STEPS] / score(twice, *USUAL),
            1.0,
        ),
        bar_at_most("b9", "artifact loaded again: relative difference", difference, 1e-4),
        bar_at_most("apply", "applying a combination of 50 checkpoints / evaluating it, time", apply, 0.1),
        bar_at_most("collect", "collecting and writing / training, time", collected, 0.02),
        bar_at_least("mix-bandwidth", "mixing / bandwidth of a copy", mixing["raw"]["share_of_copy"], 0.5),
        bar_at_least("mix-naive", "averaging state dicts / mixing, time", mixing["raw"]["state_dicts_over_mix"], 5),
    ]


def table_of(
    results: list[dict[str, Any]], models: list[dict[str, Any]], twice: dict[str, Any]
) -> list[dict[str, Any]]:
    """Distance on the report draw by weights, training and seed; seconds where all was measured and nothing taken."""
    rows, first = [], results[0]["seed"]
    for result in results:
        for row in result["rows"]:
            if result["variant"] == "50 checkpoints":
                continue
            timed = row["kind"] == "LCSC" and result["seed"] == first
            if row["kind"] == "LCSC" or (result["variant"] == "CMA-ES" and result["seed"] == first):
                rows.append(
                    {
                        "steps": result["steps"],
                        "weights": f"LCSC, {result['variant']}" if row["kind"] == "LCSC" else row["weights"],
                        "seed": result["seed"],
                        "search": row["search"],
                        "select": row["select"],
                        METRIC: row[METRIC],
                        "seconds": round(result["seconds"]) if timed else None,
                    }
                )
    for what, seed, row in others(models, twice):
        scores = {key: row[key] for key in ("search", "select", METRIC)}
        rows.append({"steps": None, "weights": f"{what}: {row['weights']}", "seed": seed, **scores, "seconds": None})
    return rows


def others(models: list[dict[str, Any]], twice: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of the diffusion model and of two steps; those that no search made are the same for all seeds."""
    for model in models:
        for row in model["rows"]:
            if model["nfe"] == FEW if row["kind"] == "LCSC" else model["seed"] == models[0]["seed"]:
                yield f"diffusion, {model['nfe']} evaluations", model["seed"], row
    yield from (("two steps", 0, row) for row in twice["rows"] if row["kind"] != "LCSC")


def mixing_speed() -> dict[str, Any]:
    """Ratios of tools/benchmarks/mixing.py."""
    return json.loads(run("tools/benchmarks/mixing.py", "--parameters", "1000000", "--rounds", "7").splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep all here, and use what is there already")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    if not os.environ.get("GENLIGHT_DATA"):
        print("skipped: GENLIGHT_DATA names no folder with MNIST (mnist10k/mnist)")
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        speed = pool.submit(mixing_speed)
        if not (folder / "lcsc" / "mnist8_teacher" / "fit" / "artifact").is_dir():
            teacher = ("experiment=lcsc/mnist8_teacher", "callbacks=collector", *CONSTANT)
            genlight("fit", *teacher, f"run.root={folder}", "run.name=lcsc/mnist8_teacher", "run.overwrite=true")
        make_heun(folder)
        mixing = speed.result()
        first = seeds[0]
        fits = {steps: pool.submit(fit, folder, steps) for steps in (STEPS, QUARTER)}
        asked = [(FEW, DIFFUSION_BUDGET, seed) for seed in seeds] + [(MORE, 1, first)]
        models = [pool.submit(kept, folder, f"diffusion-{each[0]}-{each[2]}", diffusion, *each) for each in asked]
        wanted = [
            (steps, variant, seed) for steps in (QUARTER, STEPS) for seed in seeds for variant in ("CMA-ES", "genetic")
        ]
        wanted += [(STEPS, variant, first) for variant in ("convex", "50 checkpoints")]
        twice = pool.submit(after, fits[STEPS], folder, "two", two)
        results = list(
            pool.map(
                lambda each: after(
                    fits[each[0]], folder, f"{each[1]}-{each[0]}-{each[2]}", search, *each, each[2] == first
                ),
                wanted,
            )
        )
        difference = reloaded(folder, next(r for r in results if (r["steps"], r["variant"]) == (STEPS, "CMA-ES")))
        took = {steps: each.result() for steps, each in fits.items()}
        found = [model.result() for model in models]
    bars = bars_of(results, found, twice.result(), took, difference, mixing)
    record("lcsc", bars, table_of(results, found, twice.result()), seeds, started)


def after(fit: Future[Any], *work: Any) -> dict[str, Any]:
    """`kept`, once the training is there."""
    fit.result()
    return kept(*work)


if __name__ == "__main__":
    kinds = {"--timed-search": timed_search, "--timed-fit": timed_fit}
    if sys.argv[1:2] and sys.argv[1] in kinds:
        sys.exit(kinds[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:]))
    main()
