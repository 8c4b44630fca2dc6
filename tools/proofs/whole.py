"""Proof of what the parts of genlight do together, on handwritten digits: docs/results/whole.json.

Group "stack": for each seed `validate experiment=stack/digits` trains a class-conditional transformer, combines its
checkpoints (LCSC), searches a solver schedule for 5 evaluations (S³) and rounds the network to 8 bits (W8A8), each
stage on the artifact of the one before. The plain model is the better of the last weights and their moving average,
sampled by DPM-Solver++ in the 20 steps of the recipe. All are measured on the report noise, which chose nothing in any
stage, against held-out images.

    make proof NAME=whole
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _commands import genlight, record, report, run
from whole_dry_run import dry_run_bars
from whole_help import help_bars

from genlight.reports.proof import Bar, bar_at_least, bar_at_most

METRIC = "fd_digits"
LAST = "plain, last weights"
Found = tuple[list[Bar], list[dict[str, Any]]]


def save_last(fit: Path, folder: Path) -> None:
    """The last weights of a training without averaging, as a diffusers folder."""
    import torch

    from genlight.checkpoints.trajectory import Trajectory
    from genlight.modules.diffusion import DiffusionModule

    module = DiffusionModule(
        pretrained=str(fit / "artifact"),
        class_conditional=None,
        label_dropout=0.0,
        num_inference_steps=None,
        guidance_scale=None,
    )
    module.configure_model()
    trajectory, live = Trajectory.open(fit / "trajectory"), module.live_weights()
    with torch.no_grad():
        for name in trajectory.names:
            live[name].copy_(trajectory.read(len(trajectory.members) - 1, name))
    module.save_pretrained(folder)


def stack_table(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Both plain models, then the stages."""
    name, common = f"stack-{seed}", [f"run.root={folder}", f"seed={seed}"]
    run_folder = folder / name / "validate"
    if not (run_folder / "report.json").is_file():
        genlight("validate", "experiment=stack/digits", *common, f"run.name={name}", "resume=true")
    made = report(run_folder)
    if made["draw"] != "report":
        raise RuntimeError(f"{run_folder} was measured on the draw {made['draw']}")
    last = folder / f"last-{seed}"
    if not last.is_dir():
        run(__file__, "--save-last", folder / name / "fit", last)
    words = ["experiment=stack/digits_stage", f"module.pretrained={last}", f"run.name=last-run-{seed}"]
    genlight("validate", *words, *common, "run.overwrite=true")
    plain = made["table"][0]
    value = report(folder / f"last-run-{seed}" / "validate")["metrics"][f"val/{METRIC}"]
    return [{**plain, "stage": LAST, METRIC: value, "loss": value - plain[METRIC]}, *made["table"]]


def stack(folder: Path, seeds: Sequence[int]) -> Found:
    """The bars of methods that follow each other; runs of an earlier call in the folder are gone on with."""
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda seed: stack_table(folder, seed), seeds))
    return stack_bars(tables), [
        {"seed": seed, **{key: row.get(key) for key in ("stage", METRIC, "nfe", "megabytes", "gain", "loss")}}
        for seed, rows in zip(seeds, tables, strict=True)
        for row in rows
    ]


def stack_bars(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[Bar]:
    """Of tables that begin with both plain models and end with the last stage, the worst over seeds."""
    plain = [min(rows[:2], key=lambda row: float(row[METRIC])) for rows in tables]
    done = [rows[-1] for rows in tables]
    pairs = list(zip(plain, done, strict=True))
    quality = max(after[METRIC] / before[METRIC] for before, after in pairs)
    calls = min(before["nfe"] / after["nfe"] for before, after in pairs)
    share = max(after["megabytes"] / before["megabytes"] for before, after in pairs)
    return [
        bar_at_most(
            "stack-quality", f"{METRIC} of the stack / of the stronger plain model, most over seeds", quality, 1
        ),
        bar_at_least("stack-evaluations", "network evaluations of the plain model / of the stack", calls, 2),
        bar_at_most("stack-bytes", "weight bytes of the stack / of the plain model", share, 0.3),
    ]


# bars by group: what measures them in a folder, for some seeds
GROUPS: dict[str, Callable[[Path, Sequence[int]], Found]] = {
    "stack": stack,
    "dry-run": lambda folder, _: dry_run_bars(folder / "dry-run"),
    "help": lambda _, seeds: (help_bars(seed=seeds[0]), []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--group", choices=GROUPS, help="measure this one, print its bars and write nothing")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with those of an earlier call")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        chosen = [arguments.group] if arguments.group else list(GROUPS)
        found = [GROUPS[group](arguments.folder or Path(name), arguments.seeds) for group in chosen]
    bars, table = [bar for part, _ in found for bar in part], [row for _, part in found for row in part]
    if arguments.group:
        for row in table:
            print(row)
        for bar in bars:
            print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")
    else:
        record("whole", bars, table, arguments.seeds, started)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--save-last"]:
        save_last(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
