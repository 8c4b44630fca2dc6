"""EEP on a GPU: what it costs at the size of Mixtral-8x7B's layers, and what it finds in a larger trained mixture.

Results go to docs/results/experts_gpu.json. Needs a GPU of 80 GB and no data. Each part writes what it has after every
measurement, goes on after one that fails, and stops at its limit of seconds.

- "speed": random weights in bfloat16. A Mixtral with eight layers of the true shapes of 8x7B (12 B parameters) and one
  of 2.4 B: memory of four of eight experts, merging, candidates applied, and one expert a token instead of two.
- "quality": a Mixtral of 80 M parameters, trained on three small tasks by `fit experiment=eep/tiny_moe`; then for each
  search `validate experiment=eep/digits` leaves it four of eight experts, or two, beside every baseline.

    python tools/proofs/experts_gpu.py --part speed --seconds 60 --out speed.json
    python tools/proofs/experts_gpu.py --part quality --seconds 300 --out quality.json
    python tools/proofs/experts_gpu.py --join speed.json quality.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from _commands import RESULTS
from _experts_quality import SEEDS, quality
from _experts_speed import EXPERTS, KEPT, speed
from _findings import Findings

from genlight.io import atomic_write_json
from genlight.reports.environment import environment
from genlight.reports.proof import Bar, Proof, bar_at_least, bar_at_most, read_proof
from genlight.reports.results_page import write_results_page

PROGRAM = "tools/proofs/experts_gpu.py"


def bars_of(values: Mapping[str, float]) -> list[Bar]:
    """All claims; one whose number is missing does not hold."""
    bars: list[Bar] = []

    def bar(make: Callable[[str, str, float, float], Bar], id: str, what: str, name: str, limit: float) -> None:
        value = values.get(name)
        known = value is not None and math.isfinite(value)
        made = make(id, what, float(value) if known and value is not None else math.nan, limit)
        bars.append(made if known else replace(made, value="not measured", holds=False))

    for size, name in (("12b", "12 B"), ("2b", "2.4 B")):
        words = (
            f"{name}, peak of memory of {KEPT} of {EXPERTS} experts / that of all, over the ratio of parameters: off 1"
        )
        sure = {k: abs(v) for k, v in values.items()} if f"{name}-memory" in values else {}
        shown = sure.get(f"{name}-memory", math.nan)
        memory = bar_at_most(f"memory-{size}", words, shown, 0.03)
        bars.append(memory if math.isfinite(shown) else replace(memory, value="not measured", holds=False))
        words = f"{name}, peak of memory of a merging candidate / (model + experts of one layer)"
        bar(bar_at_most, f"applied-{size}", words, f"{name}-applied", 1.15)
        words = f"{name}, prefilling 8,192 tokens: two experts a token / one, the least of two shapes"
        bar(bar_at_least, f"prefill-{size}", words, f"{name}-prefill", 1.3)
    words = "the same in two of its layers, compiled"
    bar(bar_at_least, "prefill-compiled", words, "compiled-prefill", 1.3)
    words = "merging the experts of one layer: a loop over experts / genlight, time"
    bar(bar_at_least, "merge-loop", words, "merge-loop", 5.0)
    for phase in ("prune", "merge"):
        words = f"12 B, a candidate that {phase}s: applying it, merging included / all of its evaluation, time"
        bar(bar_at_most, f"apply-{phase}", words, f"12 B-apply-{phase}", 0.05)
    for kept in (KEPT, 2):
        mine = f"{kept} of {EXPERTS}: "
        for make, id, what, limit in (
            (bar_at_least, "elitist", "search score above that of every baseline, the least over seeds, nats", 0.0),
            (bar_at_most, "err", "error of the pruned model / of the best baseline, mean", 0.90),
            (bar_at_least, "accuracy-random", "accuracy of the pruned model above random choices, least", 0.10),
            (bar_at_most, "accuracy-full", "accuracy of all experts above the pruned model's, most", 0.05),
            (bar_at_most, "merge", "negative log-likelihood: best merged / best pruned, mean", 1.0),
            (bar_at_most, "merge-search", "the same on the search draw, most", 1.0),
            (bar_at_most, "chosen", "the same of what is chosen among them / best pruned, mean", 1.0),
            (bar_at_most, "dedupe", "candidates that were measured twice", 0.0),
            (bar_at_most, "apply", "applying a candidate / measuring it, time, most", 0.03),
        ):
            bar(make, f"{id}-{kept}", mine + what, f"{kept}-{id}", limit)
    bar(bar_at_most, "size", f"share of expert parameters in the saved model - {KEPT}/{EXPERTS}", "size", 0.0)
    bar(bar_at_most, "reload", "saved model measured again: relative difference", "reload", 1e-5)
    bar(bar_at_most, "bytes", "bytes of the saved weights / predicted", "bytes", 1.02)
    return bars


def join(files: Sequence[Path]) -> None:
    """The record of all parts."""
    parts = [json.loads(file.read_text()) for file in files]
    values = {name: value for part in parts for name, value in part["values"].items()}
    rows = [row for part in parts for row in part["rows"]]
    rows += [{"what": f"{name} failed", "other": text} for part in parts for name, text in part["failures"].items()]
    if "fit-steps" in values:
        rows.append({"what": "training: steps", "other": f"{values['fit-steps']:.0f} in {values['fit-seconds']:.0f} s"})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = [{key: row.get(key) for key in keys} for row in rows]
    surroundings = max((part["environment"] for part in parts), key=lambda each: len(each["machine"]["gpus"]))
    del surroundings["git_dirty"]
    surroundings["command"] = f"python {PROGRAM} --join {' '.join(file.name for file in files)}"
    surroundings["git_revision"] = surroundings["git_revision"] or environment([])["git_revision"]
    seconds = sum(part["seconds"] for part in parts)
    proof = Proof(**surroundings, seeds=list(SEEDS), wall_seconds=seconds, bars=bars_of(values), table=table)
    target = RESULTS / "experts_gpu.json"
    atomic_write_json(target, asdict(proof))
    read_proof(target)
    write_results_page(RESULTS)
    for bar in proof.bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["speed", "quality"])
    parser.add_argument("--seconds", type=float, default=300.0, help="the most that a part may take")
    parser.add_argument("--out", type=Path, help="file of a part")
    parser.add_argument(
        "--folder", type=Path, help="keep trainings and searches here; a training that is there is used"
    )
    parser.add_argument("--join", type=Path, nargs="+", metavar="FILE", help="make the record from the parts' files")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.join:
        join(arguments.join)
        return
    if arguments.part is None or arguments.out is None:
        parser.error("either --part with --out, or --join")
    found = Findings(arguments.out, arguments.seconds)
    found.stop_in_time()
    if arguments.part == "speed":
        speed(found, arguments.tiny)
    else:
        with tempfile.TemporaryDirectory() as name:
            quality(found, (arguments.folder or Path(name)).resolve(), arguments.tiny)
    found.save()
    found.say("done")


if __name__ == "__main__":
    main()
