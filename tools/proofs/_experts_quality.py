"""What EEP finds in a mixture of 80 M parameters that is trained first: the part "quality" of experts_gpu."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

from _commands import ROOT, report
from _experts_speed import EXPERTS, KEPT, Config
from _findings import Findings
from eep import FULL, MERGED, MERGING, PRUNED, RANDOM, SEARCHED, TASK, chosen, searched, weight_bytes

SEEDS = (0, 1)
TRAINED: Config = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "initializer_range": 0.04,
}  # fmt: skip


def command(found: Findings, log: Path, limit: float, *words: str | Path) -> float:
    """A Python process on one core, which is asked to leave after `limit` seconds; its wall seconds.

    Raises:
        RuntimeError: it failed, or was stopped; the end of what it wrote.
    """
    begun = time.monotonic()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT
        )
        found.processes.append(process)
        try:
            code = process.wait(max(1.0, limit))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                code = process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
    seconds = time.monotonic() - begun
    found.say(f"{log.stem}: {seconds:.0f} s, exit {code}")
    if code:
        raise RuntimeError(f"{log.stem}: exit {code} after {seconds:.0f} s: {log.read_text()[-1500:]}")
    return seconds


def fit_words(seconds: float, tiny: bool) -> list[str]:
    """The training, and how it is made larger."""
    config = TRAINED | ({"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1} if tiny else {})
    words = ["fit", "experiment=eep/tiny_moe", *(f"module.config.{key}={value}" for key, value in config.items())]
    words += ["module.dtype=bfloat16", "trainer.precision=bf16-true", "module.optimizer.lr=1.0e-3"]
    clock = max(1, round(seconds))
    words += ["trainer.max_steps=2000", f"trainer.max_time=00:00:{clock // 60:02d}:{clock % 60:02d}"]
    # the learning rate falls over the time, or over the steps where these end first
    words += [f"module.lr_scheduler.seconds={0.97 * clock:.1f}", "trainer.val_check_interval=2000"]
    return words


def search_words(found: Findings, base: Path, folder: Path, name: str, kept: int, seed: int, tiny: bool) -> list[str]:
    """A search."""
    words = ["validate", "experiment=eep/digits", f"module.pretrained={base}", "module.recipe=null"]
    words += [f"method.num_experts={kept}", f"search.seed={seed}", "search.shared=false", "data.eval_batch_size=600"]
    words += [f"search.seconds={0.2 * found.seconds:.0f}", f"run.root={folder}", f"run.name={name}"]
    if tiny:
        words += ["search.budget=6", "search.strategy.prune_evaluations=4", "search.fidelity=60", "method.select=40"]
        words += ["method.calibration=40", "data.num_samples=60", "method.random_draws=2", "search.finalists=2"]
    return [*words, "run.overwrite=true"]


def search(found: Findings, base: Path, folder: Path, kept: int, seed: int, tiny: bool) -> dict[str, Any]:
    """One search, and what it took."""
    name = f"eep-{kept}-{seed}"
    times = folder / f"{name}.json"
    words = search_words(found, base, folder, name, kept, seed, tiny)
    seconds = command(
        found, folder / f"{name}.log", found.left - 12, "tools/proofs/eep.py", "--timed-search", times, *words
    )
    return {"kept": kept, "seed": seed, "seconds": seconds, **searched(folder / name / "validate", times)}


def expert_parameters(folder: Path) -> int:
    """Parameters of the experts and routers in a saved folder, read off the files' headers."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if ".experts." in name or "gate.weight" in name:
                    total += math.prod(file.get_slice(name).get_shape())
    return total


def quality_values(results: Sequence[Mapping[str, Any]], kept: int) -> dict[str, float]:
    """What the bars compare, over the searches for so many experts."""
    mine = [result for result in results if result["kept"] == kept]
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def error(row: Mapping[str, Any]) -> float:
        return 1.0 - float(row[f"{TASK}/accuracy"])

    def nats(row: Mapping[str, Any]) -> float:
        return -float(row[f"{TASK}/choice_log_likelihood"])

    for result in mine:
        rows, metrics, times = result["rows"], result["metrics"], result["times"]
        others = {kind: row for kind, row in rows.items() if kind not in SEARCHED}
        best = metrics["search_best_prune"], metrics.get("search_best_merge")
        sets = max(row["search"] for kind, row in others.items() if kind not in MERGING)
        add("elitist", best[0] - sets)
        add("err", error(rows[PRUNED]) / max(min(map(error, others.values())), 1e-9))
        add("accuracy-random", rows[PRUNED][f"{TASK}/accuracy"] - rows[RANDOM]["accuracy"])
        add("accuracy-full", rows[FULL][f"{TASK}/accuracy"] - rows[PRUNED][f"{TASK}/accuracy"])
        add("chosen", nats(chosen(result)) / nats(rows[PRUNED]))
        if MERGED in rows:
            add("merge", nats(rows[MERGED]) / nats(rows[PRUNED]))
        if best[1] is not None:
            add("elitist", max(v for v in best if v is not None) - max(row["search"] for row in others.values()))
            add("merge-search", best[1] / best[0])
        add("dedupe", len(result["keys"]) - len(set(result["keys"])))
        add("apply", times["apply"] / times["evaluate"])
    reduce = {"elitist": min, "err": fmean, "accuracy-random": min, "merge": fmean, "chosen": fmean, "dedupe": sum}
    return {name: float(reduce.get(name, max)(values)) for name, values in found.items()}  # type: ignore[operator]


def quality_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every model of every search."""
    rows = []
    for result in results:
        for kind, row in result["rows"].items():
            shown = {key: row.get(key) for key in ("model", "experts", "chosen", "search", "select")}
            shown |= {key: row[key] for key in row if "/" in key} | {"accuracy": row.get("accuracy")}
            shown |= {key: row.get(key) for key in ("parameters", "tokens per second")}
            seconds = round(result["seconds"]) if kind == FULL else None
            rows.append({"kept": result["kept"], "seed": result["seed"], **shown, "seconds": seconds})
    return rows


def files_of(found: Findings, base: Path, folder: Path, first: Mapping[str, Any], tiny: bool) -> None:
    """What the saved smaller model is beside the whole one, and what it scores when it is read again."""
    artifact = first["artifact"]
    share = expert_parameters(artifact) / expert_parameters(base)
    predicted = chosen(first)["parameters"] / first["rows"][FULL]["parameters"]
    found.values["size"] = abs(share - KEPT / EXPERTS)
    found.values["bytes"] = weight_bytes(artifact) / weight_bytes(base) / predicted
    found.save()
    words = ["validate", "data=tiny_tasks", f"data.num_samples={60 if tiny else 1200}", "data.eval_batch_size=600"]
    words += ["module=causal_lm", "metrics=none", f"module.pretrained={artifact}", f"run.root={folder}"]
    words += ["run.name=again", "run.overwrite=true", "module.generate=false"]
    command(found, folder / "again.log", found.left - 12, "-m", "genlight", *words)
    again = report(folder / "again" / "validate")["metrics"][f"val/{TASK}/log_likelihood"]
    found.add({"reload": abs(again / chosen(first)[f"{TASK}/log_likelihood"] - 1)})


def fit(found: Findings, folder: Path, tiny: bool, *more: str) -> None:
    """The training."""
    words = [*fit_words(found.seconds / 3, tiny), *more, f"run.root={folder}", "run.name=moe", "run.overwrite=true"]
    found.say("python -m genlight " + " ".join(words))
    seconds = command(found, folder / "moe.log", 0.55 * found.seconds, "-m", "genlight", *words)
    found.add({"fit-seconds": seconds, **_trained(folder / "moe" / "fit")})


def quality(found: Findings, folder: Path, tiny: bool) -> None:
    """The part of a trained model."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "moe" / "fit" / "artifact"
    if not base.is_dir():
        with found.trying("fit"):
            fit(found, folder, tiny)
    if not base.is_dir() and found.elapsed < 0.2 * found.seconds:
        with found.trying("fit with experts in a loop"):
            fit(found, folder, tiny, "+module.config.experts_implementation=eager")
    if not base.is_dir():
        return
    results: list[dict[str, Any]] = []
    lock = threading.Lock()

    def one(kept: int, seed: int) -> None:
        name = f"{kept} experts, search seed {seed}"
        with found.trying(name):
            result = search(found, base, folder, kept, seed, tiny)
            with lock:
                results.append(result)
                results.sort(key=lambda each: (-each["kept"], each["seed"]))
                found.rows = quality_rows(results)
                for number in (KEPT, 2):
                    values = quality_values(results, number)
                    found.values |= {f"{number}-{key}": value for key, value in values.items()}
            found.save()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda each: one(*each), [*((KEPT, seed) for seed in SEEDS), (2, SEEDS[0])]))
    first = next((result for result in results if result["kept"] == KEPT), None)
    if first is not None:
        with found.trying("saved"):
            files_of(found, base, folder, first, tiny)


def _trained(run: Path) -> dict[str, float]:
    """How far the training came."""
    lines = (run / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("step")
    steps = [line.split(",")[place] for line in lines[1:]]
    return {"fit-steps": float(max(int(step) for step in steps if step.isdigit()) + 1)}
