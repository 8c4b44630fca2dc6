"""Proof of OMS-DPM on handwritten digits with five denoisers: docs/results/oms.json.

Five networks of different width are trained by `fit experiment=oms/digits_member`; for each seed `validate
experiment=oms/digits` searches model schedules for four budgets, with work in place of time, beside every rule; then as
published, and by evolution without a predictor, at equal true evaluations. What a search of the seed has measured the
later ones take from a cache that is made for the proof alone: it counts, and costs no second time. Many more stitches
of two and three members are measured at two and four calls, for the first seed. Predictors are judged on schedules they
have not seen.

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
STITCHES = ("small_first", "large_first", "sandwich")
RULES = ("single", *STITCHES, "analytic", "random")
# per rule and budget beside the searches, and at these budgets by themselves; of three segments twice as many
PER_RULE, MANY, MANY_AT = 6, 40, (2.0, 4.0)
SINGLES = 120
NAMES = {
    "predictor": "predictor, two rounds",
    "published": "predictor, one round",
    "direct": "direct evolution",
    "random": "best random schedule that the predictor learned from",
    "small_first": f"rule: small_first, best of {PER_RULE}",
    "large_first": f"rule: large_first, best of {PER_RULE}",
    "sandwich": f"rule: sandwich, best of {2 * PER_RULE}",
}


def member(folder: Path, width: int) -> float:
    """One network."""
    words = ("fit", "experiment=oms/digits_member", f"module.network.attention_head_dim={width}")
    return genlight(*words, f"run.root={folder}", f"run.name=oms/digits_w{width}")


def searched(folder: Path, cache: Path, variant: str, seed: int) -> dict[str, Any]:
    """One search over all budgets; its seconds are without what it took from others."""
    words = [*VARIANTS[variant], f"method.singles={SINGLES}", f"method.per_rule={PER_RULE}", "search.finalists=4"]
    return measured(folder, cache, variant, seed, *words, f"search.budget={EVALUATIONS}")


def stitched(folder: Path, cache: Path, seed: int) -> dict[str, Any]:
    """Many stitches at some budgets, and one schedule more, since a search measures something."""
    words = [f"method.rules=[{','.join(STITCHES)}]", f"method.budgets=[{','.join(f'{b:g}' for b in MANY_AT)}]"]
    words += ["search=oms_direct", f"method.per_rule={MANY}", "search.budget=1", "search.finalists=1"]
    return measured(folder, cache, "stitches", seed, *words)


def measured(folder: Path, cache: Path, variant: str, seed: int, *words: str) -> dict[str, Any]:
    """One command."""
    name = f"{variant}-{seed}"
    own = ["validate", "experiment=oms/digits", f"run.root={folder}", f"run.name={name}", f"paths.cache={cache}"]
    own += [f"seed={seed}", f"search.seed={seed}", "method.unit=macs", "metrics.metrics=[fd]", "search.shared=true"]
    own += ["data.num_samples=2000", "data.eval_batch_size=1000", "metrics.extractor.dtype=float32"]
    seconds = genlight(*own, *words)
    return {"variant": variant, "seed": seed, "seconds": seconds, "rows": report(folder / name / "validate")["table"]}


def taus(folder: Path, seed: int) -> dict[str, float]:
    """Kendall's τ on two fifths of rules and random schedules of a predictor fitted on the others; of controls."""
    return json.loads(run(__file__, "--taus", folder / f"predictor-{seed}" / "validate").splitlines()[-1])  # type: ignore[no-any-return]


def _taus(folder: Path) -> dict[str, float]:
    import torch

    from genlight.loops.model_curves import read_curves
    from genlight.modules.diffusion import DiffusionModule
    from genlight.predictors.losses import kendall_tau
    from genlight.predictors.ranking import RankingPredictor
    from genlight.reports.member_costs import read_costs
    from genlight.search.codec import CandidateCodec
    from genlight.search.spaces.model_schedule import ModelScheduleSpace

    torch.set_num_threads(1)
    costs = read_costs(folder / "search" / "latency.json").costs
    # for the noise schedule, which all members share
    network = folder.parents[1] / f"oms/digits_w{WIDTHS[-1]}" / "fit" / "artifact"
    module = DiffusionModule(pretrained=str(network), class_conditional=None)
    curves, _ = read_curves(folder / "search" / "curves.json")
    space = ModelScheduleSpace(module.prediction.schedule, costs, BUDGETS[-1], curves=curves)
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
    learned = "best random schedule that the predictor learned from"
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
        bars.append(bar_at_most(f"c-{budget:g}", f"{what} {learned}, budget {budget:g}", value, 0.75))
    drawn = [
        min(row["search"] for row in r["rows"] if row["budget"] == budget) / rank[f"mean of random at {budget:g}"]
        for r, rank in zip(mine, ranks, strict=True)
        for budget in BUDGETS
    ]
    bars.append(bar_at_most("c-mean", "search score of the best / mean of random, the largest", max(drawn), 0.25))
    (many,) = (result for result in results if result["variant"] == "stitches")
    (beside,) = (result for result in mine if result["seed"] == many["seed"])
    of_many = {b: score(beside, b) / score(many, b, "small_first") for b in MANY_AT}
    stitch = f"best of {MANY} small-first stitches"
    bars.append(bar_at_most("d-2", f"{what} {stitch}, budget 2, one seed", of_many[2.0], 0.85))
    worst = max(*(ratio(budget, ("small_first",)) for budget in BUDGETS), *of_many.values())
    words = f"{what} {stitch} (budgets 2 and 4, one seed), of {PER_RULE} (all budgets), the largest"
    bars.append(bar_at_most("d", words, worst, 1.0))
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
    """Distance on the report draw by method: mean over seeds for each budget; seconds of each command."""
    found: dict[str, dict[float, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    for result in results:
        variant, rows = result["variant"], result["rows"]
        for budget in sorted({row["budget"] for row in rows}):
            own = {NAMES[variant]: ()} if variant in VARIANTS else {}
            if variant == "predictor":
                own |= {NAMES.get(rule, f"rule: {rule}"): (rule,) for rule in RULES}
            if variant == "stitches":
                counts = {"small_first": MANY, "large_first": MANY, "sandwich": 2 * MANY}
                own = {f"rule: {rule}, best of {count}": (rule,) for rule, count in counts.items()}
            for name, rules in own.items():
                found.setdefault(name, {}).setdefault(budget, []).append(score(result, budget, *rules))
        seconds.setdefault(NAMES.get(variant, variant), []).append(result["seconds"])
    table: list[dict[str, Any]] = [
        {"method": n} | {f"{METRIC} at {b:g}": fmean(v) for b, v in by.items()} for n, by in found.items()
    ]
    table += [{"method": f"{n}: command", "seconds": fmean(of)} for n, of in seconds.items()]
    table += [{"method": f"{k}, mean"} | {f"{METRIC} at 1": fmean(r[k] for r in ranks)} for k in ranks[0]]
    return table


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
        cache = Path(name) / "cache"  # never the user's: scores of other proofs are none of this one
        benchmark = pool.submit(run, "tools/benchmarks/model_search.py")
        trained = list(pool.map(lambda width: member(folder, width), missing))
        speed = json.loads(benchmark.result())
        # what the others take is there before they begin
        results = list(pool.map(lambda seed: searched(folder, cache, "predictor", seed), arguments.seeds))
        many = pool.submit(stitched, folder, cache, arguments.seeds[0])
        rest = [(variant, seed) for seed in arguments.seeds for variant in VARIANTS if variant != "predictor"]
        results += list(pool.map(lambda each: searched(folder, cache, *each), rest))
        results.append(many.result())
        ranks = list(pool.map(lambda seed: taus(folder, seed), arguments.seeds))
    table = table_of(results, ranks)
    table += [{"method": f"training of w{w}: command", "seconds": s} for w, s in zip(missing, trained, strict=True)]
    record("oms", bars_of(results, ranks, speed), table, arguments.seeds, started)


if __name__ == "__main__":
    main()
