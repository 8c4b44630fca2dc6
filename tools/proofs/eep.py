"""Proof of EEP on three small tasks with a tiny mixture of experts: docs/results/eep.json. Needs no data.

A Mixtral of half a million parameters with eight experts a layer is trained by `fit experiment=eep/tiny_moe`. For each
search seed `validate experiment=eep/digits` leaves it two of them for one of its tasks, handwritten digits, beside
every baseline, by the log-likelihood of the right choice and by its probability; for the first seed once more as
published, once without keeping hidden states, and with four experts, of which two or one answer each token.

Every number is measured on questions that neither a search nor a choice has seen.

    make proof NAME=eep
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from _commands import genlight, record, report, run

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

TASK = "digits"
EXPERTS, KEPT = 8, 2
FULL, PRUNED, MERGED, RANDOM = "full", "EEP prune", "EEP merge", "random"
SEARCHED = (FULL, PRUNED, MERGED, RANDOM)
MERGING = ("m_smoe", "hc_smoe")
PAPER = ("search=eep_paper", "method.objective=val/accuracy")
VARIANTS: dict[str, tuple[str, ...]] = {
    "eep": (),
    "by probability": ("method.objective=val/choice_probability",),
    "as published": PAPER,
    "no states kept": ("method.cache_bytes=0",),
    "four experts": ("method.num_experts=4",),
    "four experts, one a token": ("method.num_experts=4", "method.num_experts_per_tok=1"),
}


def timed_search(file: Path, words: list[str]) -> int:
    """A command of genlight with the seconds that candidates took in its search, which go to a JSON file."""
    import torch

    from genlight.cli import main as command
    from genlight.loops.expert_work import ExpertObjective
    from genlight.loops.search import SearchRunner
    from genlight.search.spaces.expert_maps import ExpertMapSpace

    torch.set_num_threads(1)
    seconds = {"search": 0.0, "apply": 0.0, "evaluate": 0.0}
    inside = [False]

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            inside[0] |= name == "search"
            begun = time.perf_counter()
            try:
                return method(*values, **options)
            finally:
                seconds[name] += (time.perf_counter() - begun) * inside[0]
                inside[0] &= name != "search"

        return call

    for name, (owner, method) in {
        "search": (SearchRunner, "run"),
        "apply": (ExpertMapSpace, "apply"),
        "evaluate": (ExpertObjective, "evaluate"),
    }.items():
        setattr(owner, method, watched(name, getattr(owner, method)))
    code = command(words)
    file.write_text(json.dumps(seconds))
    return code


def search(folder: Path, variant: str, seed: int, words: tuple[str, ...]) -> dict[str, Any]:
    """One search."""
    name = f"{variant.replace(',', '').replace(' ', '-')}-{seed}"
    command = ["validate", "experiment=eep/digits", *VARIANTS[variant], *words, f"search.seed={seed}"]
    command += ["search.shared=false", f"run.root={folder}", f"run.name={name}", "run.overwrite=true"]
    times, begun = folder / f"{name}.json", time.monotonic()
    run(__file__, "--timed-search", times, *command)
    seconds = time.monotonic() - begun
    return {"variant": variant, "seed": seed, "seconds": seconds, **searched(folder / name / "validate", times)}


def searched(place: Path, times: Path) -> dict[str, Any]:
    """What a search has left in its run folder, and the times of its calls."""
    found = report(place)
    history = next((place / "search").glob("experts*/history.jsonl")).read_text()
    return {
        "rows": {row["kind"]: row for row in found["table"]},
        "metrics": found["metrics"],
        "times": json.loads(times.read_text()),
        "history": history,
        "keys": [json.loads(line)["key"] for line in history.splitlines()[1:]],
        "artifact": place / "artifact",
    }


def chosen(result: dict[str, Any]) -> dict[str, Any]:
    """The row whose model was saved."""
    return next(row for row in result["rows"].values() if row["chosen"])


def reloaded(folder: Path, result: dict[str, Any]) -> float:
    """Relative difference of the saved model's log-likelihood, measured again, to the table."""
    words = ["validate", "data=tiny_tasks", "data.num_samples=1200", "module=causal_lm", "metrics=none"]
    words += [f"module.pretrained={result['artifact']}", f"run.root={folder}", "run.name=again"]
    genlight(*words, "run.overwrite=true")
    again = report(folder / "again" / "validate")["metrics"][f"val/{TASK}/log_likelihood"]
    return abs(again / chosen(result)[f"{TASK}/log_likelihood"] - 1)


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights of a saved model."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def saved(folder: Path) -> dict[str, Any]:
    """Parameters of a saved model and its experts, and tokens a second, as plain transformers load it."""
    return json.loads(run(__file__, "--saved", folder).splitlines()[-1])  # type: ignore[no-any-return]


def _saved(folder: Path) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    parts = {name: weight.numel() for name, weight in model.named_parameters()}
    experts = sum(count for name, count in parts.items() if ".experts." in name or "gate.weight" in name)
    ids = torch.randint(0, 100, (64, 65), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        for _ in range(8):
            begun = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            seconds.append(time.perf_counter() - begun)
    print(json.dumps({"parameters": sum(parts.values()), "experts": experts, "speed": ids.numel() / min(seconds[2:])}))


def _memory() -> None:
    """Prints the peak of memory of merging candidates / (the model + its experts of one layer): 0.4 GB, random weights.

    Few tokens run, so that the weights are what counts.
    """
    import resource

    import torch
    import transformers

    from genlight.experts.editor import ExpertEditor
    from genlight.experts.maps import LayerMaps

    torch.set_num_threads(1)
    sizes = {"vocab_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS}

    @torch.no_grad()
    def candidates(width: int, layers: int, count: int) -> int:
        """Runs merged candidates one after the other; bytes of the model and of one layer's experts."""
        config = transformers.MixtralConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, **sizes
        )
        model = transformers.MixtralForCausalLM(config).eval()
        editor, random = ExpertEditor(model), torch.Generator().manual_seed(0)
        for _ in range(count):
            maps = [torch.rand(2, EXPERTS // 2, EXPERTS, generator=random).unbind() for _ in editor.layers]
            editor.apply({name: LayerMaps(*both) for name, both in zip(editor.layers, maps, strict=True)})
            model(input_ids=torch.arange(16)[None], use_cache=False)
        one = next(iter(editor.layers.values())).weights().values()
        return sum(weight.nbytes for weight in (*model.parameters(), *one))

    candidates(32, 1, 1)  # libraries take their memory
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    held = candidates(512, 8, 4)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / held)


def bars_of(
    results: list[dict[str, Any]], measured: dict[str, float], before: dict[str, Any], after: dict[str, Any]
) -> list[Bar]:
    """The claims; over search seeds.

    Args:
        results: of `search`.
        measured: by id of the bar, what no search holds.
        before, after: from `saved`, of the whole model and of the smaller one.
    """
    mine = [r for r in results if r["variant"] == "eep"]
    plain = next(r for r in results if r["variant"] == "no states kept")
    same = next(r for r in mine if r["seed"] == plain["seed"])

    def baselines(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {kind: row for kind, row in result["rows"].items() if kind not in SEARCHED}

    def error(row: dict[str, Any]) -> float:
        return 1.0 - float(row[f"{TASK}/accuracy"])

    def nats(row: dict[str, Any]) -> float:
        return -float(row[f"{TASK}/choice_log_likelihood"])

    lead, errors, on_search = [], [], []
    for r in mine:
        sets = max(row["search"] for kind, row in baselines(r).items() if kind not in MERGING)
        every = max(row["search"] for row in baselines(r).values())
        best = r["metrics"]["search_best_prune"], r["metrics"]["search_best_merge"]
        lead += [best[0] - sets, max(best) - every]
        errors.append(error(r["rows"][PRUNED]) / max(min(map(error, baselines(r).values())), 1e-9))
        on_search.append(best[1] / best[0])
    merged = fmean(nats(r["rows"][MERGED]) / nats(r["rows"][PRUNED]) for r in mine)
    best_of_both = fmean(nats(chosen(r)) / nats(r["rows"][PRUNED]) for r in mine)
    above = [r["rows"][PRUNED][f"{TASK}/accuracy"] - r["rows"][RANDOM]["accuracy"] for r in mine]
    below = [r["rows"][FULL][f"{TASK}/accuracy"] - r["rows"][PRUNED][f"{TASK}/accuracy"] for r in mine]
    share = abs(after["experts"] / before["experts"] - KEPT / EXPERTS)
    predicted = chosen(mine[0])["parameters"] / mine[0]["rows"][FULL]["parameters"]
    duplicates = sum(len(r["keys"]) - len(set(r["keys"])) for r in results)
    applied = max(r["times"]["apply"] / r["times"]["evaluate"] for r in mine)
    speed = plain["times"]["evaluate"] / same["times"]["evaluate"]
    return [
        bar_at_least("elitist", "search score above that of every baseline, the least over seeds, nats", min(lead), 0),
        bar_at_most("err", "error of the pruned model / of the best baseline, mean", fmean(errors), 0.90),
        bar_at_least("accuracy-random", "accuracy of the pruned model above random choices, least", min(above), 0.10),
        bar_at_most("accuracy-full", "accuracy of all experts above the pruned model's, most", max(below), 0.05),
        bar_at_most("merge", "negative log-likelihood of the best merged / of the best pruned, mean", merged, 1.0),
        bar_at_most("merge-search", "the same on the search draw, most", max(on_search), 1.0),
        bar_at_most("chosen", "the same of what is chosen among them / of the best pruned, mean", best_of_both, 1.0),
        bar_at_most("size", f"share of expert parameters in the saved model - {KEPT}/{EXPERTS}", share, 0.0),
        bar_at_most("reload", "saved model measured again: relative difference", measured["reload"], 1e-5),
        bar_at_most("dedupe", "candidates that were measured twice", duplicates, 0),
        bar_at_most("apply", "applying a candidate / measuring it, time", applied, 0.03),
        bar_at_least("cache", "candidates per second with kept states / without", speed, 1.3),
        bar_at_least(
            "cache-same", "archives with and without are equal", float(plain["history"] == same["history"]), 1
        ),
        bar_at_most("bytes", "bytes of the saved weights / predicted", measured["bytes"] / predicted, 1.02),
        bar_at_most(
            "memory",
            "peak of memory of merging candidates / (model of 0.4 GB + experts of one layer)",
            measured["memory"],
            1.15,
        ),
    ]


def table_of(results: list[dict[str, Any]], before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Every model of every search; baselines of the first seed."""
    rows = []
    for result in results:
        first = result is results[0] or result["variant"].startswith("four experts")
        for kind, row in result["rows"].items():
            if result["variant"] == "no states kept" or not (first or kind in (PRUNED, MERGED, RANDOM)):
                continue
            shown = {key: row.get(key) for key in ("model", "experts", "search", "select")}
            shown |= {key: row.get(key) for key in row if "/" in key} | {"accuracy": row.get("accuracy")}
            is_saved = bool(row.get("chosen")) and result is results[0]
            saved_speed = before["speed"] if kind == FULL else after["speed"] if is_saved else None
            rows.append(
                {
                    "search of": result["variant"],
                    "seed": result["seed"],
                    **shown,
                    "tokens per second, saved": None if saved_speed is None else round(saved_speed),
                    "seconds": round(result["seconds"]) if kind == PRUNED else None,
                }
            )
    return [{key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep the training here; one that is there is used")
    parser.add_argument("--dry", action="store_true", help="print the bars and record nothing")
    parser.add_argument("words", nargs="*", help="further words of every search")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = arguments.folder or Path(name)
        base = folder / "eep" / "tiny_moe" / "fit" / "artifact"
        if not base.is_dir():
            genlight("fit", "experiment=eep/tiny_moe", f"run.root={folder}")
        seed = arguments.seeds[0]
        # the two that are timed against each other run side by side
        wanted = [("eep", seed), ("no states kept", seed), *(("eep", other) for other in arguments.seeds[1:])]
        wanted += [("by probability", each) for each in arguments.seeds]
        wanted += [(variant, seed) for variant in list(VARIANTS)[2:] if variant != "no states kept"]
        results = list(pool.map(lambda each: search(folder, *each, tuple(arguments.words)), wanted))
        results.sort(key=lambda result: (list(VARIANTS).index(result["variant"]), result["seed"]))
        before, after = saved(base), saved(results[0]["artifact"])
        measured = {
            "bytes": weight_bytes(results[0]["artifact"]) / weight_bytes(base),
            "reload": reloaded(folder, results[0]),
            "memory": float(run(__file__, "--memory").splitlines()[-1]),
        }
        bars = bars_of(results, measured, before, after)
        table = table_of(results, before, after)
    if not arguments.dry:
        record("eep", bars, table, arguments.seeds, started)
        return
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed-search"]:
        sys.exit(timed_search(Path(sys.argv[2]), sys.argv[3:]))
    if sys.argv[1:2] == ["--saved"]:
        _saved(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--memory"]:
        _memory()
    else:
        main()
