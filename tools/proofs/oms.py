"""Proof of OMS-DPM on handwritten digits with five denoisers: docs/results/oms.json.

Five networks of different width are trained by `fit experiment=oms/digits_member`; for each seed `validate
experiment=oms/digits` searches model schedules for four budgets, with work in place of time, beside every rule; once
more by evolution without a predictor, at equal true evaluations. Predictors are judged on schedules they have not seen.

Every distance is measured on noise and images that neither a search nor a choice has seen.

    make proof NAME=oms
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median
from typing import Any

from _commands import genlight, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

WIDTHS = (16, 32, 64, 128, 192)
BUDGETS = (1.0, 2.0, 4.0, 8.0)
METRIC = "fd_digits"
EVALUATIONS = 180
VARIANTS = {"predictor": [], "published": ["search.strategy.rounds=1"], "direct": ["search=oms_direct"]}
RULES = ("single", "small_first", "large_first", "sandwich", "analytic", "random")


def member(folder: Path, width: int) -> float:
    """One network."""
    words = ("fit", "experiment=oms/digits_member", f"module.network.attention_head_dim={width}")
    return genlight(*words, f"run.root={folder}", f"run.name=oms/digits_w{width}")


def searched(folder: Path, variant: str, seed: int) -> dict[str, Any]:
    """One search over all budgets."""
    name = f"{variant}-{seed}"
    words = ["validate", "experiment=oms/digits", *VARIANTS[variant], f"run.root={folder}", f"run.name={name}"]
    words += ["method.singles=120", "method.per_rule=6", "search.finalists=4"]
    words += [
        f"seed={seed}",
        f"search.seed={seed}",
        f"search.budget={EVALUATIONS}",
        "method.unit=macs",
        "metrics.metrics=[fd]",
        "search.shared=false",
    ]
    seconds = genlight(*words, "data.num_samples=2000", "data.eval_batch_size=1000", "metrics.extractor.dtype=float32")
    return {"variant": variant, "seed": seed, "seconds": seconds, "rows": report(folder / name / "validate")["table"]}


def taus(folder: Path, seed: int) -> dict[str, float]:
    """Kendall's τ on two fifths of rules and random schedules of a predictor fitted on the others; of controls."""
    return json.loads(run(__file__, "--taus", folder / f"predictor-{seed}" / "validate").splitlines()[-1])  # type: ignore[no-any-return]


def _taus(folder: Path) -> dict[str, float]:
    import torch

    from genlight.modules.diffusion import DiffusionModule
    from genlight.predictors.losses import kendall_tau
    from genlight.predictors.ranking import RankingPredictor
    from genlight.reports.latency import read_costs
    from genlight.search.codec import CandidateCodec
    from genlight.search.spaces.model_schedule import ModelScheduleSpace

    torch.set_num_threads(1)
    costs = read_costs(folder / "search" / "latency.json").costs
    module = DiffusionModule(pretrained=str(folder / "artifact"), class_conditional=None)
    space = ModelScheduleSpace(module.prediction.schedule, costs, BUDGETS[-1])
    codec = CandidateCodec(space.candidate_type)
    lines = [json.loads(line) for line in (folder / "search" / "schedules" / "history.jsonl").read_text().splitlines()]
    # what the predictor of the first round learned from: rules and random schedules
    made = [line for line in lines if line.get("source") in ("initial", "random")]
    records = [line for line in made if line.get("score") is not None]
    candidates = [codec.from_plain(line["candidate"]) for line in records]
    scores = [float(line["score"]) for line in records]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) * 3 // 5
    seen, unseen = order[:cut], order[cut:]
    features = [space.encode(each) for each in candidates]
    true = torch.tensor([scores[i] for i in unseen])

    def tau(targets: list[float]) -> float:
        fitted = RankingPredictor().fit([features[i] for i in seen], targets, 0)
        return float(kendall_tau(torch.as_tensor(fitted.predict([features[i] for i in unseen])[0]), true))

    mine = [scores[i] for i in seen]
    mixed = [mine[i] for i in torch.randperm(len(mine), generator=torch.Generator().manual_seed(1)).tolist()]
    price = [space.cost(candidate)["cost"] for candidate in candidates]
    cheap = -torch.tensor([price[i] for i in unseen])
    found = {"tau": tau(mine), "tau of -cost": float(kendall_tau(cheap, true)), "tau, shuffled": tau(mixed)}
    drawn = [i for i, line in enumerate(records) if line["source"] == "random"]
    below = {budget: [scores[i] for i in drawn if price[i] <= budget] for budget in BUDGETS}
    means = {f"mean of random at {budget:g}": fmean(found) for budget, found in below.items()}
    return {**found, **means, "seen": float(cut), "unseen": float(len(unseen))}


def score(result: dict[str, Any], budget: float, *rules: str) -> float:
    """On the report draw: the chosen schedule of a budget, or of these rules the best on the select draw."""
    rows = [row for row in result["rows"] if row["budget"] == budget]
    rows = [row for row in rows if row["rule"] in rules] if rules else [row for row in rows if row["chosen"]]
    best = min(rows, key=lambda row: row["select"], default={METRIC: math.nan})
    return float(best[METRIC])


def bars_of(results: list[dict[str, Any]], ranks: list[dict[str, float]], speed: dict[str, Any]) -> list[Bar]:
    """The claims; medians over seeds of ratios."""
    mine = [result for result in results if result["variant"] == "predictor"]

    def ratio(budget: float, rules: tuple[str, ...], own: tuple[str, ...] = ()) -> float:
        return median(score(r, budget, *own) / score(r, budget, *rules) for r in mine)

    tau, cheap = fmean(r["tau"] for r in ranks), fmean(r["tau of -cost"] for r in ranks)
    what = "Fréchet distance of what is chosen / of the"
    bars = [
        bar_at_least("a", "Kendall's τ on unseen schedules", tau, 0.8),
        bar_at_least("a-cost", "Kendall's τ above that of the cost alone", tau - cheap, 0.25),
    ]
    for budget, limit in zip(BUDGETS, (0.8, 0.8, 0.9, 1.25), strict=True):
        name = {8.0: "g"}.get(budget, f"b-{budget:g}")
        bars.append(
            bar_at_most(name, f"{what} best single model, budget {budget:g}", ratio(budget, ("single",)), limit)
        )
    for budget in (1.0, 2.0):
        value = ratio(budget, ("random",))
        bars.append(bar_at_most(f"c-{budget:g}", f"{what} best random schedule, budget {budget:g}", value, 0.75))
    drawn = [
        min(row["search"] for row in r["rows"] if row["budget"] == budget) / rank[f"mean of random at {budget:g}"]
        for r, rank in zip(mine, ranks, strict=True)
        for budget in BUDGETS
    ]
    bars.append(bar_at_most("c-mean", "search score of the best / mean of random, the largest", max(drawn), 0.25))
    bars.append(bar_at_most("d-2", f"{what} best small-first stitch, budget 2", ratio(2.0, ("small_first",)), 0.85))
    worst = max(ratio(budget, ("small_first",)) for budget in BUDGETS)
    bars.append(bar_at_most("d", f"{what} best small-first stitch, the largest over budgets", worst, 1.0))
    for budget in (1.0, 2.0):
        value = ratio(budget, ("single",), ("analytic",))
        bars.append(
            bar_at_most(f"e-{budget:g}", f"analytic allocation / best single model, budget {budget:g}", value, 0.85)
        )
    chosen = [(row["select"], r, row["budget"]) for r in mine for row in r["rows"] if row["chosen"]]
    worst = max(
        s / min(w["select"] for w in r["rows"] if w["budget"] == b and w["rule"] in ("searched", "analytic", "single"))
        for s, r, b in chosen
    )
    bars.append(bar_at_most("f", "select score of what is chosen / the best of search, analytic, single", worst, 1.05))
    over = max(row["cost"] / row["budget"] for r in results for row in r["rows"])
    bars.append(bar_at_most("h", "cost of a returned schedule / its budget, the largest", over, 1 + 1e-9))
    took = "seconds of fitting the predictor and evolving for 4 budgets of 200 generations, 500 schedules collected"
    bars.append(bar_at_most("search-seconds", took, speed["search"]["seconds"], 60))
    bars.append(
        bar_at_most("vectorized", "predicting a generation at once / one by one, time", speed["scoring"]["ratio"], 1)
    )
    return bars


def table_of(results: list[dict[str, Any]], ranks: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Distance on the report draw by method: mean over seeds for each budget."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in results:
        for budget in BUDGETS:
            name = {
                "predictor": "predictor, two rounds",
                "published": "predictor, one round",
                "direct": "direct evolution",
            }
            found.setdefault(name[result["variant"]], {}).setdefault(budget, []).append(score(result, budget))
            if result["variant"] == "predictor":
                for rule in RULES:
                    found.setdefault(f"rule: {rule}", {}).setdefault(budget, []).append(score(result, budget, rule))
    rows = [{"method": n} | {f"{METRIC} at {b:g}": fmean(v) for b, v in by.items()} for n, by in found.items()]
    rows += [{"method": f"{k}, mean"} | {f"{METRIC} at 1": fmean(r[k] for r in ranks)} for k in ranks[0]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--folder", type=Path, help="keep networks and searches here")
    parser.add_argument("--taus", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.taus:
        print(json.dumps(_taus(arguments.taus)))
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        missing = [w for w in reversed(WIDTHS) if not (folder / f"oms/digits_w{w}" / "fit" / "artifact").is_dir()]
        benchmark = pool.submit(run, "tools/benchmarks/model_search.py")
        list(pool.map(lambda width: member(folder, width), missing))
        speed = json.loads(benchmark.result())
        # the rivals of the default with the first seed alone
        wanted = [("predictor", seed) for seed in arguments.seeds]
        wanted += [(variant, arguments.seeds[0]) for variant in VARIANTS if variant != "predictor"]
        results = list(pool.map(lambda each: searched(folder, *each), wanted))
        ranks = list(pool.map(lambda seed: taus(folder, seed), arguments.seeds))
    record("oms", bars_of(results, ranks, speed), table_of(results, ranks), arguments.seeds, started)


if __name__ == "__main__":
    main()
