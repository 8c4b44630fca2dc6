"""What it saves to predict a whole generation in one call, and how long a search for several budgets takes, in one run.

Three measurements on random model schedules of a zoo of five, on one thread:

- scoring: the children of a generation encoded and predicted in one call, against one call for each of them, in
  alternating rounds, so that a change of the machine's speed meets both;
- fit: the ranking predictor on as many measured candidates as are collected;
- search: the first round of `BudgetedSearch`, from the collection to what it proposes for each of the budgets.

Printed is one line of JSON: versions; "scoring": candidates, seconds of both sides (medians), ratio together/one by one
(median over the rounds of the ratio within a round), largest difference of the predictions; "fit": candidates, seconds;
"search": budgets, generations, children, seconds in all and in microseconds for each child.

    python tools/benchmarks/model_search.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.noise_schedules import VPSchedule
from genlight.predictors.ranking import RankingPredictor
from genlight.search.budgets import BudgetedSearch
from genlight.search.evolution import Evolution
from genlight.search.guided import Fitted
from genlight.search.records import History, Problem, Record, Trial
from genlight.search.spaces.model_schedule import ModelScheduleSpace

# MACs of residual networks of width 16 to 192, of the largest
COSTS = {"w16": 0.015, "w32": 0.043, "w64": 0.135, "w128": 0.468, "w192": 1.0}
BUDGETS = (1.0, 2.0, 4.0, 8.0)


def score(candidate: ModelSchedule) -> float:
    """Made up: more evaluations are better, and larger members in the middle."""
    count = candidate.nfe
    needed = sum(abs(i / count - 0.6) * COSTS[name] for i, name in enumerate(candidate.members)) / count
    return 5 / count + needed - sum(COSTS[name] for name in candidate.members) / (count + 5)


def collected(space: ModelScheduleSpace, count: int) -> list[Record[ModelSchedule]]:
    """Random candidates as a search would have measured them."""
    rng, records = np.random.default_rng(0), dict[str, Record[ModelSchedule]]()
    while len(records) < count:
        candidate = space.with_budget(BUDGETS[len(records) % len(BUDGETS)]).sample(rng)
        key, index = space.key(candidate), len(records)
        trial = Trial(index, 0, key, candidate, 1, "random", space.cost(candidate), (0, index))
        records.setdefault(key, Record(trial, score(candidate), {}, None))
    return list(records.values())


def measure_scoring(space: ModelScheduleSpace, fitted: Fitted, children: int, rounds: int) -> dict[str, Any]:
    """ "scoring"."""
    rng = np.random.default_rng(1)
    candidates = [space.with_budget(BUDGETS[-1]).sample(rng) for _ in range(children)]
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        together = fitted.predict([space.encode(each) for each in candidates])[0]
        middle = time.perf_counter()
        single = torch.cat([fitted.predict([space.encode(each)])[0] for each in candidates])
        seconds.append((middle - started, time.perf_counter() - middle))
    own, other = zip(*seconds[1:], strict=True)
    return {
        "candidates": children,
        "together_s": round(statistics.median(own), 5),
        "one_by_one_s": round(statistics.median(other), 5),
        "ratio": round(statistics.median(a / b for a, b in seconds[1:]), 4),
        "largest_difference": float(f"{(together - single).abs().max():.1e}"),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    space = ModelScheduleSpace(VPSchedule(), COSTS)
    records = collected(space, arguments.collect)
    features, targets = [space.encode(record.candidate) for record in records], [r.rank[0] for r in records]
    predictor = RankingPredictor()
    started = time.perf_counter()
    fitted = predictor.fit(features, targets, 0)
    fit_s = time.perf_counter() - started
    scoring = measure_scoring(space, fitted, arguments.children, arguments.rounds)
    evolution = Evolution(population=arguments.children, children=arguments.children)
    strategy = BudgetedSearch(
        BUDGETS, collect=len(records), evolution=evolution, generations=arguments.generations, predictor=predictor
    )
    started = time.perf_counter()
    proposals = strategy.ask(Problem(space), History(records))
    search_s = time.perf_counter() - started
    assert len(proposals) == strategy.per_budget * len(BUDGETS), "the search must propose as many as it should"
    bred = len(BUDGETS) * arguments.generations * arguments.children
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "scoring": scoring,
        "fit": {"candidates": len(records), "seconds": round(fit_s, 2)},
        "search": {
            "budgets": len(BUDGETS),
            "generations": arguments.generations,
            "children": arguments.children,
            "seconds": round(search_s, 2),
            "us_per_child": round(1e6 * (search_s - fit_s) / bred, 1),
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--collect", type=int, default=500)
    parser.add_argument("--children", type=int, default=40)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options)))
