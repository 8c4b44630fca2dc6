"""Proof of DELE on NAS-Bench-201: docs/results/dele.json. Needs the tables and CIFAR-10, below GENLIGHT_DATA.

For each seed `fit experiment=dele/nasbench201` pretrains 14 experts on cheap scores of the pool, and `validate`
compares every predictor after 24, 46, 93 and 233 true accuracies, on 4,770 cells held out, and searches all 9,445
cells. Besides: the same on ImageNet16-120, LSTM experts, two of these alone, the accuracy after 12 epochs as another
cheap score, TransNAS-Bench-101 micro and NAS-Bench-301 (these two without bars), the zero-cost indicators themselves,
and experts at once against one by one.

    make proof NAME=dele
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _commands import genlight, record, report, run

from genlight.reports.intervals import mean_interval
from genlight.reports.proof import Bar, bar_at_least, bar_at_most

LABELS = (24, 46, 93, 233)
FEW = (24, 46)
SCORES = "grad_norm,snip,grasp,flops_m,fisher,jacov,plain,synflow,nwot,params_m,hw_edgegpu_latency,zen,epe_nas,l2_norm"
ALL = "[dele,static_gate,vanilla,expert_gp,expert_ridge,scores_gp,scores_ridge,scores_forest,both_gp,tokens_gp]"
MAIN, IMAGENET, EARLY, LSTM = "CIFAR-10", "ImageNet16-120", "with 12 epochs", "LSTM experts"
ALONE = ("snip", "fisher")  # each as the only score of an LSTM expert
# indicators of genlight that have a bar
PROXIES = ("synflow", "nwot", "snip", "l2_norm")
# choices of labelled cells of each seed: found of the best 1 % differs more by them than by the training
LABEL_SEEDS = 3
# searches of each seed, and evaluations after which their regret is shown
SEARCHES, BUDGET, SHOWN = 2, 50, (20, 25, 30, 40, 50)


@dataclass(frozen=True)
class Study:
    """One table with one kind of experts.

    Attributes:
        words: of both commands.
        compare: of `validate` alone.
        seeds: how many of the seeds.
    """

    words: tuple[str, ...]
    compare: tuple[str, ...]
    seeds: int = 1


CELLS = "experiment=dele/nasbench201"
SHORT = ("method.searches=[]", "method.labels=[24,93]")
RECURRENT = (CELLS, "module.network.encoder=lstm", "module.network.width=32", "module.network.embedding=16")
STUDIES = {
    # the longest first
    LSTM: Study(
        RECURRENT,
        ("method.searches=[]", "method.predictors=[dele,vanilla,expert_gp]", "method.label_seeds=1"),
        seeds=2,
    ),
    MAIN: Study((CELLS,), (f"method.search_seeds={SEARCHES}",), seeds=3),
    EARLY: Study(
        (CELLS, f"data.low_fidelity=[{SCORES},val_acc_12]"),
        ("method.searches=[]", "method.predictors=[dele,expert_gp]"),
        seeds=3,
    ),
    IMAGENET: Study(
        (CELLS, "data.dataset=imagenet16_120"),
        ("method.predictors=[dele,vanilla,expert_gp]", f"method.search_seeds={SEARCHES}"),
        seeds=3,
    ),
    **{
        f"LSTM, {name} alone": Study(
            (*RECURRENT, f"data.low_fidelity=[{name}]"),
            ("method.searches=[]", "method.predictors=[dele,vanilla]", "method.labels=[24,46]"),
            seeds=2,
        )
        for name in ALONE
    },
    "TransNAS-Bench-101, class_scene": Study(("experiment=dele/transnasbench101",), SHORT),
    "NAS-Bench-301": Study(("experiment=dele/nasbench301",), SHORT),
}


def study(folder: Path, name: str, seed: int, words: tuple[str, ...]) -> dict[str, Any]:
    """Pretrain, compare and search once."""
    this = STUDIES[name]
    place = f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    shared = [*this.words, *words, f"run.root={folder}", f"run.name={place}", f"data.label_seed={LABEL_SEEDS * seed}"]
    times = {}
    if not (folder / place / "fit" / "artifact").is_dir():
        fit = [word for word in shared if not word.startswith(("method.", "search."))]
        times["fit"] = genlight(
            "fit", *fit, f"seed={seed}", "trainer.max_steps=${data.pretrain_steps}", "run.overwrite=true"
        )
    compare = [f"method.predictors={ALL}", f"method.label_seeds={LABEL_SEEDS}", f"search.budget={BUDGET}"]
    compare += [f"method.labels=[{','.join(map(str, LABELS))}]", f"search.seed={SEARCHES * seed}", *this.compare]
    chosen = {word.split("=")[0]: word for word in [*compare, *shared]}  # the last of each key
    times["validate"] = genlight("validate", *chosen.values(), f"ckpt_path={folder}/{place}/fit", "run.overwrite=true")
    made = folder / place / "validate"
    content = json.loads((made / "artifact" / "comparison.json").read_text())
    return {"study": name, "seed": seed, "times": times, "rows": report(made)["table"], "regrets": content["regrets"]}


class Means:
    """Means over the seeds of a study."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        self.results = results

    def values(self, name: str, labels: int, predictor: str, quantity: str) -> list[float]:
        """One for each seed where it was measured."""
        rows = [row for r in self.results if r["study"] == name for row in r["rows"]]
        found = [row[quantity] for row in rows if (row["labels"], row["predictor"]) == (labels, predictor)]
        return [value for value in found if value is not None]

    def of(self, name: str, labels: int, predictor: str, quantity: str = "kendall_tau") -> float:
        """The mean; NaN where nothing was measured."""
        values = self.values(name, labels, predictor, quantity)
        return statistics.fmean(values) if values else float("nan")

    def lead(self, name: str, labels: tuple[int, ...], first: str, second: str) -> float:
        """How far one predictor's tau lies above another's, the least over numbers of labels."""
        return min(self.of(name, number, first) - self.of(name, number, second) for number in labels)

    def regret(self, search: str, evaluations: int, name: str = MAIN) -> float:
        """After so many evaluations, over seeds of experts and searches."""
        found = [seed for r in self.results if r["study"] == name for seed in r["regrets"].get(search, ())]
        return statistics.fmean(seed[min(evaluations, len(seed)) - 1] for seed in found)


def bars_of(means: Means, proxies: dict[str, Any], speed: dict[str, float]) -> list[Bar]:
    """The claims, on means over seeds."""
    least = {24: 0.15, 46: 0.06, 93: 0.03, 233: 0.03}
    lead = {n: means.lead(MAIN, (n,), "dele", "vanilla") for n in LABELS}
    lstm = means.lead(LSTM, LABELS, "dele", "vanilla")
    static, process = means.lead(MAIN, LABELS, "dele", "static_gate"), means.lead(MAIN, FEW, "expert_gp", "dele")
    early = {
        name: min(means.of(EARLY, n, name) - means.of(MAIN, n, name) for n in LABELS) for name in ("dele", "expert_gp")
    }
    top = [means.of(MAIN, n, "expert_gp", "p_at_1") / max(means.of(MAIN, n, "dele", "p_at_1"), 1e-9) for n in FEW]
    raw = min(means.lead(MAIN, LABELS, "expert_gp", other) for other in ("scores_forest", "scores_gp"))
    regret = {name: means.regret(name, 30) for name in ("random", "expert_gp", "dele")}
    other = {n: means.lead(IMAGENET, (n,), "dele", "vanilla") for n in LABELS}
    elsewhere = {name: means.regret(name, 30, IMAGENET) for name in ("random", "expert_gp", "dele")}
    alone = max(-means.lead(f"LSTM, {name} alone", (n,), "dele", "vanilla") for name in ALONE for n in FEW)
    found = [bar_at_least(f"a-n{n}", f"tau of DELE - labels alone, {n} labels", lead[n], least[n]) for n in LABELS]
    found += [
        bar_at_least(f"a-n{n}-imagenet", f"the same on ImageNet16-120, {n} labels", other[n], least[n]) for n in LABELS
    ]
    found += [
        bar_at_least("a-lstm", "the same with LSTM experts, least over labels", lstm, 0.02),
        bar_at_least(
            "a-single", "tau of labels alone - an LSTM expert of snip or fisher, most of 24, 46 labels", alone, 0.0
        ),
        bar_at_least("a-static", "tau of the dynamic gate - of the static one, least over labels", static, -0.01),
        bar_at_least("a-gp", "tau of a GP on experts - DELE, 24 and 46 labels, least", process, 0.03),
        bar_at_least("a-gp-top", "found of the best 1 %, GP on experts / DELE, 24 and 46 labels, least", min(top), 2.0),
        bar_at_least("a-gp-scores", "tau of a GP on experts - of forest and GP on the scores, least", raw, 0.0),
        bar_at_least("a-early", "tau of DELE with 12 epochs - without, least over labels", early["dele"], 0.005),
        bar_at_least("a-early-gp", "the same of a GP on experts", early["expert_gp"], 0.01),
        bar_at_most(
            "b-regret", "regret at 30, GP on experts / random", regret["expert_gp"] / max(regret["random"], 1e-9), 0.5
        ),
        bar_at_most("b-regret-dele", "regret at 30, GP on experts - DELE", regret["expert_gp"] - regret["dele"], 0.0),
        bar_at_most(
            "b-regret-imagenet",
            "regret at 30 on ImageNet16-120, GP on experts / random",
            elsewhere["expert_gp"] / max(elsewhere["random"], 1e-9),
            0.5,
        ),
        bar_at_most(
            "b-regret-dele-imagenet",
            "regret at 30 on ImageNet16-120, GP on experts - DELE",
            elsewhere["expert_gp"] - elsewhere["dele"],
            0.0,
        ),
        bar_at_least(
            "batched",
            "pretraining 14 experts one by one / at once, processor time",
            speed["one_by_one"] / speed["at_once"],
            4.0,
        ),
        bar_at_least("batched-pairs", "that with both sides of pairs encoded", speed["pairs"] / speed["at_once"], 4.0),
    ]
    for name, of in proxies["bars"].items():
        key, exact = f"c-proxies-{name.replace('_', '-')}", name not in proxies["spearman"]
        if exact:
            value = proxies["relative_difference"][name]
            found.append(bar_at_most(key, f"{name} of cells: relative difference to the table", value, of["bar"]))
        else:
            value = proxies["spearman"][name]
            found.append(
                bar_at_least(key, f"{name} of {proxies['cells']} cells: Spearman to the table", value, of["bar"])
            )
    return found


def table_of(means: Means) -> list[dict[str, Any]]:
    """Means over seeds of every predictor, tau with the ends of its 95 % interval, then the regrets."""
    keys = dict.fromkeys((r["study"], row["labels"], row["predictor"]) for r in means.results for row in r["rows"])
    quantities = ("kendall_tau", "spearman", "p_at_1", "p_at_5")
    order = list(STUDIES)
    rows = []
    for name, labels, predictor in sorted(keys, key=lambda key: (order.index(key[0]), key[1])):
        if labels == 0 and name not in (MAIN, IMAGENET):
            continue
        values = {quantity: means.values(name, labels, predictor, quantity) for quantity in quantities}
        shown = {quantity: round(statistics.fmean(of), 4) if of else None for quantity, of in values.items()}
        taus = values["kendall_tau"]
        _, low, high = mean_interval(taus) if taus else (math.nan,) * 3
        ends = {end: round(of, 4) if math.isfinite(of) else None for end, of in (("low", low), ("high", high))}
        row = {"study": name, "labels": labels, "predictor": predictor, **shown, **ends}
        rows.append({**row, "regret": None, "seeds": len(taus)})
    for name in (MAIN, IMAGENET):
        for search in ("random", "dele", "expert_gp"):
            seeds = sum(len(r["regrets"].get(search, ())) for r in means.results if r["study"] == name)
            for evaluations in SHOWN:
                row = {"study": f"regret of searches, {name}", "labels": evaluations, "predictor": search}
                regret = round(means.regret(search, evaluations, name), 3)
                rows.append({**row, **dict.fromkeys((*quantities, "low", "high")), "regret": regret, "seeds": seeds})
    return rows


def _batched() -> None:
    """Processor seconds of 18 steps that pretrain 14 experts on a pool of 4,675 cells: at once, one by one, and one by
    one with both sides of pairs encoded."""
    import torch

    from genlight.predictors.expert_training import ExpertTraining, pretrain
    from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
    from genlight.predictors.losses import sample_pairs
    from genlight.predictors.pool import Pool

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings, training, vocabulary, experts = ExpertSettings(), ExpertTraining(pretrain_steps=18), (5,) * 6, 14
    tokens, scores = torch.randint(5, (4675, 6)), torch.randn(4675, experts)

    def pool(columns: range) -> Pool:
        return Pool(tokens, vocabulary, scores[:, columns], tuple(str(column) for column in columns))

    def at_once() -> None:
        pretrain(settings, training, pool(range(experts)), 0)

    def one_by_one() -> None:
        for number in range(experts):
            pretrain(settings, training, pool(range(number, number + 1)), 0)

    def pairs() -> None:
        for number in range(experts):
            expert = ExpertEnsemble(settings, vocabulary, 1)
            optimizer = torch.optim.Adam(expert.parameters(), lr=training.lr, fused=True)
            for _ in range(training.pretrain_steps):
                rows = torch.randperm(len(tokens))[: training.batch_size]
                drawn = sample_pairs(scores[rows, number][None], settings.pairs_per_candidate * len(rows))
                first, second = (expert.expert_scores(tokens[rows][side[0]])[0] for side in (drawn.first, drawn.second))
                optimizer.zero_grad()
                torch.autograd.backward(torch.relu(settings.margin - drawn.signs[0] * (first - second)).mean())
                optimizer.step()

    seconds: dict[str, list[float]] = {"at_once": [], "one_by_one": [], "pairs": []}
    for _ in range(7):  # in turn, so that a busy machine slows all of them
        for work in (at_once, one_by_one, pairs):
            begun = time.thread_time()
            work()
            seconds[work.__name__].append(time.thread_time() - begun)
    print(json.dumps({name: statistics.median(values[1:]) for name, values in seconds.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=100, help="networks behind the zero-cost indicators")
    parser.add_argument("--folder", type=Path, help="keep the runs here; experts that are there are used")
    parser.add_argument("--dry", action="store_true", help="print the bars and record nothing")
    parser.add_argument("words", nargs="*", help="further words of every command")
    arguments = parser.parse_args()
    if not os.environ.get("GENLIGHT_DATA"):
        print("skipped: GENLIGHT_DATA names no folder with nasbench/ and cifar10/")
        return
    started = time.monotonic()
    speed = json.loads(run(__file__, "--batched").splitlines()[-1])  # alone: it is timed
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        wanted = [(each, seed) for each, this in STUDIES.items() for seed in arguments.seeds[: this.seeds]]
        cells = ("--cells", str(arguments.cells), "--names", *PROXIES)
        measured = pool.submit(run, "tools/benchmarks/zero_cost.py", *cells)  # the longest of all
        waiting = [pool.submit(study, folder, *each, tuple(arguments.words)) for each in wanted]
        results = [each.result() for each in waiting]
        proxies = json.loads(measured.result().splitlines()[-1])
    means = Means(results)
    bars = bars_of(means, proxies, speed)
    if not arguments.dry:
        record("dele", bars, table_of(means), arguments.seeds, started)
        return
    for result in results:
        seconds = {name: round(value) for name, value in result["times"].items()}
        print(f"{result['study']}, seed {result['seed']}: {seconds} s")
    print(f"indicators: {proxies['seconds']} s; all: {time.monotonic() - started:.0f} s")
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--batched"]:
        _batched()
    else:
        main()
