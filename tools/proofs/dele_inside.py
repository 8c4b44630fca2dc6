"""True evaluations that DELE saves as the predictor of a search: docs/results/dele_inside.json.

Two cheap problems whose ideal network has a closed form, a mixture of six modes in sixteen dimensions:

- s3: solver schedules of 5 evaluations, the plan of method=s3; plain is the Gaussian process on features;
- oms: model schedules of four members, which are the ideal network with errors of different size, for three budgets;
  plain is the ranking network, "gp" the Gaussian process on features. Every search is done with shares of the
  evaluations; the smallest from which on the quality is reached counts, for plain as for the others.

Quality is the RMS distance to a many-step teacher on noise that the search has not seen, of the candidate that is best
on the noise of the search (oms: the geometric mean over the budgets). Evaluations are those beside the initial ones.
A search that never has plain's final quality counts with 1.5 times the evaluations, which is too little.

    make proof NAME=dele_inside
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from statistics import geometric_mean
from typing import Any

import torch
from _commands import record, run
from torch import Tensor

from genlight.diffusion.error_curves import error_curve
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import compile_schedule
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.teacher import NetworkSampling
from genlight.diffusion.solver.trajectory import TeacherTrajectories
from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.predictors.ranking import RankingPredictor
from genlight.reports.proof import bar_at_most
from genlight.search.budgets import BudgetedSearch
from genlight.search.dele import DelePredictor
from genlight.search.engine import Budget, Search, open_archive
from genlight.search.evaluation import in_one_batch, one_by_one
from genlight.search.evolution import Evolution
from genlight.search.protocols import Evaluation
from genlight.search.records import Problem, Record
from genlight.search.spaces.model_schedule import ModelScheduleSpace
from genlight.search.spaces.solver_objective import TeacherObjective, make_teacher_bank, teacher_schedule
from genlight.search.spaces.solver_plan import CORE_SOLVERS, PLAIN_SPACINGS, S3Settings, baselines
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

SCHEDULE = VPSchedule()
PREDICTION = Prediction("epsilon", SCHEDULE)
NFE, DIMENSIONS, FIDELITY, HELD_OUT = 5, 16, 128, 512
PROMOTED = 30
# cost of a call, and RMS error of ε̂ where λ is far below and far above 0
MEMBERS = {"w16": (0.02, 0.12, 0.5), "w32": (0.1, 0.06, 0.3), "w64": (0.35, 0.03, 0.12), "w128": (1.0, 0.015, 0.04)}
BUDGETS = (1.0, 2.0, 4.0)
SHARES = (0.25, 0.4, 0.5, 0.6, 0.75, 1.0, 1.25, 1.5)
# what counts for a search that never has the quality
NEVER = SHARES[-1]


@dataclass
class Timed:
    """A strategy whose asking is timed."""

    strategy: Any
    seconds: float = field(default=0.0, repr=False)

    def ask(self, problem: Any, history: Any) -> Any:
        """What the strategy asks for."""
        begun = time.perf_counter()
        try:
            return self.strategy.ask(problem, history)
        finally:
            self.seconds += time.perf_counter() - begun


def mixture() -> tuple[Tensor, Tensor]:
    """Means [6, 16] and deviations [6] of the modes."""
    generator = torch.Generator().manual_seed(7)
    means = 0.5 * torch.randn(6, DIMENSIONS, generator=generator, dtype=torch.float64)
    return means, torch.linspace(0.42, 0.78, 6, dtype=torch.float64)


def draws(seed: int, count: int) -> Tensor:
    """From the mixture, float64 [count, 16]."""
    generator = torch.Generator().manual_seed(seed)
    means, spreads = mixture()
    mode = torch.randint(len(means), (count,), generator=generator)
    noise = torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64)
    return means[mode] + spreads[mode, None] * noise


def ideal(x: Tensor, timestep: Tensor) -> Tensor:
    """ε̂ of the mixture for states [rows, 16] and their times [rows]."""
    means, spreads = mixture()
    time = timestep.double()[:, None].clamp(SCHEDULE.t_min, SCHEDULE.t_max)
    alpha, sigma = SCHEDULE.alpha(time), SCHEDULE.sigma(time)
    variances = (alpha * spreads).square() + sigma**2  # [rows, 6]
    distances = x.double().unsqueeze(1) - alpha.unsqueeze(2) * means  # [rows, 6, 16]
    logits = -0.5 * distances.square().sum(2) / variances - 0.5 * DIMENSIONS * variances.log()
    shares = (logits.softmax(1) / variances).unsqueeze(2)
    return sigma * (shares * distances).sum(1)


def member(name: str, number: int) -> Any:
    """The ideal network with a smooth error that grows with λ."""
    _, low, high = MEMBERS[name]
    generator = torch.Generator().manual_seed(100 + number)
    mixing = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64)

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        time = timestep.double()[:, None].clamp(SCHEDULE.t_min, SCHEDULE.t_max)
        size = low + (high - low) * torch.sigmoid(SCHEDULE.half_log_snr(time))
        return ideal(x, timestep) + 2**0.5 * size * torch.sin(x.double() @ mixing)

    return model


def noise(seed: int, count: int) -> Tensor:
    """Standard normal, float64 [count, 16]."""
    return torch.randn(count, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def searched(problem: Problem[Any], strategy: Any, initial: Sequence[Any], evaluations: int, evaluate: Any) -> Any:
    """Records of one search, and the seconds of its strategy."""
    timed = Timed(strategy)
    with tempfile.TemporaryDirectory() as folder:
        archive = open_archive(folder, problem, timed, initial, fingerprint={"objective": "teacher"})
        result = Search(problem, timed, archive, evaluate, initial, workers=32).run(Budget(evaluations))
    return result.records, timed.seconds


def solver_search(seed: int, budget: int) -> dict[str, Any]:
    """Plain and DELE on solver schedules."""
    sampling = NetworkSampling(ideal, PREDICTION)
    search, held_out = (
        TeacherObjective(sampling, make_teacher_bank(sampling, noise(number, count)), max_rows=8192)
        for number, count in ((1000 + seed, FIDELITY), (2000 + seed, HELD_OUT))
    )
    space = SolverScheduleSpace(SCHEDULE, NFE)
    made = [s for _, s in baselines(SCHEDULE, NFE, solvers=CORE_SOLVERS, spacings=PLAIN_SPACINGS)]
    trajectories = TeacherTrajectories.of(sampling, search.bank, compile_schedule(teacher_schedule(SCHEDULE), SCHEDULE))
    with_dele = replace(space, trajectories=trajectories)
    curves, seconds = [], []
    for searched_space, settings in ((space, S3Settings()), (with_dele, S3Settings(predictor=DelePredictor()))):
        plan = replace(settings, screening_fidelity=32, promoted=PROMOTED).plan(searched_space, budget, made)
        problem = Problem(searched_space, seed, FIDELITY)
        found = searched(problem, plan.strategy, plan.initial, plan.budget.evaluations, in_one_batch(search))
        full = [record for record in found[0] if record.fidelity == FIDELITY]
        curves.append(incumbents(full, held_out)[PROMOTED:])
        seconds.append(found[1])
    target = curves[0][-1]
    reached = next((number + 1 for number, value in enumerate(curves[1]) if value <= target), None)
    # a plain search may have had its final quality before its end
    needed = next(number + 1 for number, value in enumerate(curves[0]) if value <= target)
    return row(budget, needed, reached, target, curves[1][-1], seconds)


def incumbents(records: Sequence[Record[Any]], held_out: TeacherObjective) -> list[float]:
    """After each record, the held-out score of the best by the search's own scores."""
    found, best, value = [], float("inf"), float("inf")
    for each in records:
        if each.rank[0] < best:
            best, value = each.rank[0], held_out.evaluate(each.candidate, HELD_OUT).score
        found.append(value)
    return found


def row(budget: int, needed: int, reached: int | None, plain: float, own: float, seconds: Any) -> dict[str, Any]:
    """One seed's numbers."""
    return {
        "evaluations": budget,
        "plain_reached_at": needed,
        "dele_reached_at": reached,
        "ratio": round((reached or round(NEVER * budget)) / needed, 3),
        "plain": float(f"{plain:.4g}"),
        "dele": float(f"{own:.4g}"),
        "plain_ask_s": round(seconds[0], 2),
        "dele_ask_s": round(seconds[1], 2),
    }


class ZooObjective:
    """RMS distance of a model schedule to the ideal network's teacher."""

    def __init__(self, space: ModelScheduleSpace, models: Mapping[str, Any], start: Tensor) -> None:
        self.space, self.models = space, models
        self.bank = make_teacher_bank(NetworkSampling(ideal, PREDICTION), start)

    def evaluate(self, candidate: Any, fidelity: int) -> Evaluation:
        """On all noises."""
        sampler = self.space.sampler(candidate)
        turns = iter(candidate.members)
        result = sample(
            lambda x, timestep: self.models[next(turns)](x, timestep), self.bank.noise, sampler.table, PREDICTION
        )
        return Evaluation(float((result - self.bank.target).square().mean().sqrt()))


def model_search(seed: int, budget: int) -> dict[str, Any]:
    """The ranking network, the Gaussian process and DELE on model schedules."""
    models = {name: member(name, number) for number, name in enumerate(MEMBERS)}
    images = draws(seed, 256)
    grid = torch.linspace(-4.5, 4.5, 12).tolist()
    curves = {name: error_curve(model, images, PREDICTION, grid) for name, model in models.items()}
    # the ideal network's own error is that of no information: members differ by what they add
    space = ModelScheduleSpace(
        SCHEDULE, {name: values[0] for name, values in MEMBERS.items()}, BUDGETS[-1], max_evaluations=20, curves=curves
    )
    search = ZooObjective(space, models, noise(1000 + seed, FIDELITY))
    held_out = ZooObjective(space, models, noise(2000 + seed, HELD_OUT))

    def once(predictor: Any, evaluations: int) -> tuple[float, float]:
        rounds, per_budget = 2, max(1, round(evaluations * 0.1))
        strategy = BudgetedSearch(
            BUDGETS,
            collect=evaluations - rounds * per_budget * len(BUDGETS),
            rounds=rounds,
            per_budget=per_budget,
            evolution=Evolution(population=30, children=30),
            generations=30,
            predictor=predictor,
        )
        records, seconds = searched(Problem(space, seed), strategy, (), evaluations, one_by_one(search))
        scores = []
        for limit in BUDGETS:
            best = min((r for r in records if r.cost["cost"] <= limit), key=lambda r: r.rank)
            scores.append(held_out.evaluate(best.candidate, 1).score)
        return geometric_mean(scores), seconds

    kinds = {"plain": RankingPredictor, "gp": GaussianProcessPredictor, "dele": DelePredictor}
    found = {name: {share: once(kind(), round(share * budget)) for share in SHARES} for name, kind in kinds.items()}
    values = {name: {share: value for share, (value, _) in runs.items()} for name, runs in found.items()}
    reached = {name: reached_at(of, values["plain"][1.0]) for name, of in values.items()}
    assert reached["plain"] is not None
    whole = [round(reached[name] * budget) if reached[name] else None for name in ("plain", "dele", "gp")]
    own = {name: values[name][1.0] for name in kinds}
    made = row(budget, whole[0], whole[1], own["plain"], own["dele"], [found[n][1.0][1] for n in ("plain", "dele")])
    shares = {name: {str(share): float(f"{value:.4g}") for share, value in of.items()} for name, of in values.items()}
    return {**made, "gp_reached_at": whole[2], "gp": float(f"{own['gp']:.4g}"), "by_share": shares}


def reached_at(values: Mapping[float, float], target: float) -> float | None:
    """The smallest share of the evaluations from which on the target is kept, up to all; None: not within any."""
    kept = None
    for share in sorted((share for share in values if share <= 1), reverse=True):
        if values[share] > target:
            break
        kept = share
    return kept or next((share for share in sorted(values) if share > 1 and values[share] <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--s3", type=int, default=200, help="evaluations beside the initial ones; 0 leaves it out")
    parser.add_argument("--oms", type=int, default=120, help="evaluations; 0 leaves it out")
    parser.add_argument("--only", nargs=2, metavar=("PROBLEM", "SEED"), help="one search, printed as JSON")
    parser.add_argument("--dry", action="store_true", help="print the bars and record nothing")
    arguments = parser.parse_args()
    searches = {"s3": (solver_search, arguments.s3), "oms": (model_search, arguments.oms)}
    if arguments.only:
        torch.set_num_threads(1)
        search, evaluations = searches[arguments.only[0]]
        print(json.dumps(search(int(arguments.only[1]), evaluations)))
        return
    started = time.monotonic()
    wanted = [(name, seed) for name, (_, evaluations) in searches.items() if evaluations for seed in arguments.seeds]
    budgets = ("--s3", str(arguments.s3), "--oms", str(arguments.oms))
    with ThreadPoolExecutor(2) as pool:  # the longest first
        made = [pool.submit(run, __file__, *budgets, "--only", name, str(seed)) for name, seed in reversed(wanted)]
        rows = [
            {"problem": name, "seed": seed, **json.loads(each.result().splitlines()[-1])}
            for (name, seed), each in zip(reversed(wanted), made)
        ]
    bars = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        ratio = geometric_mean([row["ratio"] for row in rows if row["problem"] == name])
        bars.append(
            bar_at_most(f"inside-{name}", f"evaluations of DELE / plain to plain's quality, {name}", ratio, 0.6)
        )
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value:.3g} ({bar.bar})")
    if not arguments.dry:
        record("dele_inside", bars, rows, arguments.seeds, started)


if __name__ == "__main__":
    main()
