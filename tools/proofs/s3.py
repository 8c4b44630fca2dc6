"""Proof of S³ on handwritten digits: docs/results/s3.json.

One class-conditional transformer is trained by `fit experiment=s3/digits`; for each seed the same experiment's validate
searches, tunes and reports for 4, 5 and 6 evaluations, in a process of its own that also times the network. Beside it,
at equal true evaluations and without tuning: no predictor; with the first seed times alone, decisions alone, random
search, CMA-ES; and how well predictors order schedules that evolution proposes next. Ratios of speed come from
tools/benchmarks/samplers.py.

Every distance is measured on noise that neither the search nor the choice has seen. The baseline is the hand-made
sampler that is best in hindsight, on that same noise.

    make proof NAME=s3
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from _commands import record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

NFE = (4, 5, 6)
GUIDED, UNGUIDED = "S3 without tuning", "without predictor"
HINDSIGHT, SEARCHED, TUNED = "best hand-made, in hindsight", "searched schedule", "tuned table"
# ablations: true evaluations beside the best hand-made schedules, and samples of each
EVALUATIONS, STARTS, FIDELITY = 100, 20, 128


def timed_command(file: Path, words: list[str]) -> int:
    """The command line with its searches and network calls timed; shares go to a JSON file."""
    import torch

    from genlight.cli import main
    from genlight.modules import searched_sampling
    from genlight.search.engine import Search

    torch.set_num_threads(1)
    seconds = {"search": 0.0, "network": 0.0}
    search, network = Search.run, searched_sampling.guided_prediction

    def timed_network(*values: Any) -> Any:
        begun = time.perf_counter()
        result = network(*values)
        seconds["network"] += time.perf_counter() - begun
        return result

    def timed_search(self: Any, *values: Any) -> Any:
        searched_sampling.guided_prediction = timed_network
        begun = time.perf_counter()
        try:
            return search(self, *values)
        finally:
            seconds["search"] += time.perf_counter() - begun
            searched_sampling.guided_prediction = network
            file.write_text(json.dumps(seconds))

    Search.run = timed_search  # type: ignore[method-assign]
    return main(words)


def ablations(folder: Path, seed: int, nfe: int, every: bool) -> list[dict[str, Any]]:
    """One row for each variant, or with and without predictor only: distance on the report noise; Kendall's taus."""
    import torch

    from genlight import io
    from genlight.diffusion.solver.teacher import TeacherBank
    from genlight.loops.solver_banks import sampling_of
    from genlight.modules.diffusion import DiffusionModule
    from genlight.search.spaces.solver_objective import TeacherObjective

    torch.set_num_threads(1)
    module = DiffusionModule(pretrained=str(folder / "model" / "fit" / "artifact"), class_conditional=None)
    module.configure_model()
    module.guidance_scale = 1.0
    searched = folder / f"s{seed}" / "validate" / "search"
    objectives = []
    for draw in ("search", "report"):
        file = searched / f"teacher-{draw}.safetensors"
        bank = TeacherBank.load(file, io.load_tensors(file)[1]["fingerprint"])
        objectives.append(TeacherObjective(sampling_of(module), bank))
    return _ablations_of(module, nfe, seed, objectives[0], objectives[1], every)


def _ablations_of(module: Any, nfe: int, seed: int, search: Any, report: Any, every: bool) -> list[dict[str, Any]]:
    from genlight.search.cma import CMAES
    from genlight.search.engine import Search, open_archive
    from genlight.search.evaluation import in_one_batch
    from genlight.search.plan import PlainPlan
    from genlight.search.polish import Polish
    from genlight.search.random_search import RandomSearch
    from genlight.search.records import Problem
    from genlight.search.spaces.solver_plan import S3Settings, baselines
    from genlight.search.spaces.solver_schedule import ALL_GENES, SolverScheduleSpace

    schedule = module.prediction.schedule
    space = SolverScheduleSpace(schedule, nfe, start_slack=3.0)
    made = [candidate for _, candidate in baselines(schedule, nfe)]
    scores = [math.inf if math.isnan(e.score) else e.score for e in search.evaluate_many(made, 64)]
    starts = [made[index] for index in sorted(range(len(made)), key=scores.__getitem__)[:STARTS]]
    decisions = tuple(gene for gene in ALL_GENES if gene != "times")
    variants = {
        GUIDED: (space, S3Settings()),
        UNGUIDED: (space, S3Settings(guided_fraction=0.0)),
        "times only": (SolverScheduleSpace(schedule, nfe, genes=("times",), start_slack=3.0), S3Settings()),
        "decisions only": (SolverScheduleSpace(schedule, nfe, genes=decisions), S3Settings()),
        "random search": (space, PlainPlan(RandomSearch(30))),
        "CMA-ES around the best": (space, PlainPlan(Polish(1, EVALUATIONS, CMAES(0.1)))),
    }
    rows = []
    for name, (own, planner) in variants.items():
        if name not in (GUIDED, UNGUIDED) and not every:
            continue
        plan = planner.plan(own, EVALUATIONS, starts)
        problem = Problem(own, seed, FIDELITY)
        with tempfile.TemporaryDirectory() as archive_folder:
            archive = open_archive(archive_folder, problem, plan.strategy, plan.initial, fingerprint={})
            evaluate = in_one_batch(search)
            result = Search(problem, plan.strategy, archive, evaluate, plan.initial, workers=10).run(plan.budget)
        rmse = report.errors([result.best.candidate]).mean().sqrt().item()
        row = {"seed": seed, "nfe": nfe, "sampler": name, "rmse": rmse}
        if name == UNGUIDED:
            row |= taus(own, [record for record in result.records if record.score is not None], seed)
        rows.append(row)
    return rows


def taus(space: Any, records: list[Any], seed: int) -> dict[str, float]:
    """Kendall's τ of predictors: on a random half that they have not seen, and on what evolution proposed next."""
    import torch

    from genlight.predictors.gaussian_process import GaussianProcessPredictor
    from genlight.predictors.losses import kendall_tau
    from genlight.predictors.ranking import RankingPredictor

    features = [torch.as_tensor(space.encode(record.candidate)) for record in records]
    targets = [float(record.score) for record in records]
    mixed = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    found = {}
    for kind, order in (("", mixed), (" next", list(range(len(records))))):
        seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
        for label, predictor in (("GP", GaussianProcessPredictor()), ("LSTM", RankingPredictor())):
            fitted = predictor.fit([features[i] for i in seen], [targets[i] for i in seen], seed)
            mean = torch.as_tensor(fitted.predict([features[i] for i in unseen])[0])
            found[f"tau {label}{kind}"] = float(kendall_tau(mean, torch.tensor([targets[i] for i in unseen])))
    return found


def searched(folder: Path, seed: int, rivals: bool) -> dict[str, Any]:
    """The real command; its report and how its searches spent their time."""
    words = ["validate", "experiment=s3/digits", f"seed={seed}", f"run.root={folder}", f"run.name=s{seed}"]
    words += [f"ckpt_path={folder}/model/fit", f"method.rivals={str(rivals).lower()}", "search.shared=false"]
    # the claims are distances to the teacher; of the other metrics one is enough here
    words += ["metrics.metrics=[fd]", "metrics.extractor.dtype=float32"]
    shares = folder / f"shares{seed}.json"
    run(__file__, "--timed", shares, *words)
    return {"report": report(folder / f"s{seed}" / "validate"), "seconds": json.loads(shares.read_text())}


def compared(
    processes: ProcessPoolExecutor, folder: Path, seed: int, nfe: int, every: bool, search: Future[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The ablations on the banks of a finished search."""
    search.result()
    return processes.submit(ablations, folder, seed, nfe, every).result()


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(fmean(math.log(value) for value in values))


def bars_of(results: dict[int, dict[str, Any]], speed: dict[str, Any]) -> list[Bar]:
    """Every claim, from the numbers of all seeds."""
    rmse = {
        (seed, row["nfe"], row["sampler"]): row["rmse"] for seed, r in results.items() for row in r["report"]["table"]
    }
    ablated = {(row["seed"], row["nfe"], row["sampler"]): row for r in results.values() for row in r["ablations"]}
    places = [(seed, nfe) for seed in results for nfe in NFE]

    def gain(name: str) -> float:
        return geometric([rmse[*place, HINDSIGHT] / rmse[*place, name] for place in places])

    fewer = geometric([rmse[seed, 5, SEARCHED] / rmse[seed, 6, HINDSIGHT] for seed in results])
    without = [row for row in ablated.values() if row["sampler"] == UNGUIDED]
    guided = geometric(
        [ablated[*p, "without predictor"]["rmse"] / ablated[*p, "S3 without tuning"]["rmse"] for p in places]
    )
    shares = [r["seconds"]["network"] / r["seconds"]["search"] for r in results.values()]
    step = max(row["ratio"] for row in speed["step"])
    together = max(row["ratio"] for row in speed["together"])
    what = "geometric mean over NFE 4, 5, 6 and seeds"
    return [
        bar_at_least("rmse", f"RMSE of the best hand-made sampler / searched schedule, {what}", gain(SEARCHED), 1.5),
        bar_at_least("rmse-tuned", f"RMSE of the best hand-made sampler / tuned table, {what}", gain(TUNED), 2.2),
        bar_at_most("fewer-steps", "RMSE of the searched schedule at 5 / best hand-made at 6, mean of seeds", fewer, 1),
        bar_at_least("tau", "Kendall's τ on schedules held out, mean", fmean(r["tau GP"] for r in without), 0.4),
        bar_at_least("guided", f"RMSE without / with predictor at equal evaluations, {what}", guided, 1),
        bar_at_most("step-time", "step() / DPMSolverMultistepScheduler.step(), the largest of all shapes", step, 1),
        bar_at_least(
            "search-efficiency", "share of a search spent in the network, the least of seeds", min(shares), 0.9
        ),
        bar_at_most("batched", "several schedules in one batch / one by one, the largest", together, 1),
    ]


def table_of(results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """RMSE by sampler: mean over seeds for each number of evaluations, gain over the best hand-made one."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for seed, result in results.items():
        for row in [*result["report"]["table"], *result["ablations"]]:
            name = row["sampler"].split(" (")[0]
            by_seed = found.setdefault(name, {}).setdefault(row["nfe"], {})
            # of one rival with several solvers the best counts
            by_seed[seed] = min(row["rmse"], by_seed.get(seed, math.inf))
    rows = []
    for name, by_nfe in found.items():
        row: dict[str, Any] = {"sampler": name} | {
            f"rmse at {nfe}": fmean(values.values()) for nfe, values in sorted(by_nfe.items())
        }
        # against the same seeds
        both = [
            (fmean(found[HINDSIGHT][nfe][seed] for seed in values), fmean(values.values()))
            for nfe, values in by_nfe.items()
        ]
        rows.append(row | {"gain": geometric([base / own for base, own in both])})
    taus = [row for result in results.values() for row in result["ablations"] if "tau GP" in row]
    for label in ("GP", "LSTM", "GP next", "LSTM next"):
        by_nfe = {n: fmean(r[f"tau {label}"] for r in taus if r["nfe"] == n) for n in NFE}
        rows.append({"sampler": f"Kendall's τ, {label}"} | {f"rmse at {nfe}": value for nfe, value in by_nfe.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    arguments = parser.parse_args()
    started = time.monotonic()
    # threads wait for commands; ablations run in two processes that live on, since importing takes a sixth of one
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes,
        ThreadPoolExecutor(2) as pool,
    ):
        folder = arguments.folder or Path(name)
        fit = pool.submit(run, "-m", "genlight", "fit", "experiment=s3/digits", f"run.root={folder}", "run.name=model")
        benchmark = pool.submit(run, "tools/benchmarks/samplers.py", "--rounds", "4")
        fit.result()
        first = arguments.seeds[0]
        searches = {seed: pool.submit(searched, folder, seed, seed == first) for seed in arguments.seeds}
        others = {
            seed: [pool.submit(compared, processes, folder, seed, nfe, seed == first, search) for nfe in NFE]
            for seed, search in searches.items()
        }
        results = {
            seed: {**search.result(), "ablations": [row for part in others[seed] for row in part.result()]}
            for seed, search in searches.items()
        }
        speed = json.loads(benchmark.result())
    record("s3", bars_of(results, speed), table_of(results), arguments.seeds, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        sys.exit(timed_command(Path(sys.argv[2]), sys.argv[3:]))
    main()
