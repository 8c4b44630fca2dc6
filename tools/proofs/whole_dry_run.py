"""What a dry run says beforehand against what the run then took, for the digits command of every method.

For each method its models are made with few steps; then the command runs with `dry_run=true`, and then in earnest with
the same settings, a small budget in both. Predicted is what the dry run printed, real what the run's own report says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _commands import genlight, report, run

from genlight.reports.cost import seconds_said
from genlight.reports.proof import Bar, bar_at_most

# how far predicted / real may be from 1
TOLERANCE = 0.25
_WIDTHS = (16, 32, 64, 128, 192)


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        name: of the bar.
        words: command and overrides; `ROOT` stands for the folder of all runs.
        first: commands that make what it needs.
    """

    name: str
    words: Sequence[str]
    first: Sequence[Sequence[str]] = ()


def _fit(experiment: str, steps: int, *words: str, name: str | None = None) -> list[str]:
    """A short training of an experiment."""
    settings = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "trainer.num_sanity_val_steps=0"]
    return ["fit", f"experiment={experiment}", f"run.name={name or experiment}", *settings, *words]


CASES = (
    Case("fit", ["fit", "experiment=digits", "trainer.max_steps=300", "trainer.val_check_interval=150"]),
    Case(
        "baseline",
        ["validate", "experiment=s3/digits", "method=none", "search=none", "ckpt_path=ROOT/s3/fit"],
        [_fit("s3/digits", 100, name="s3")],
    ),
    Case(
        "s3",
        ["validate", "experiment=s3/digits", "ckpt_path=ROOT/s3/fit", "method.nfe=[4]", "search.budget=40",
         "search.shared=false", "method.finetune.iterations=3", "method.noise.report=512", "data.num_samples=2000"],
    ),
    Case(
        "lcsc",
        ["validate", "experiment=lcsc/digits_cd", "ckpt_path=ROOT/cd/fit", "search.budget=40", "search.fidelity=1000",
         "search.shared=false", "method.select=1000"],
        [_fit("lcsc/digits_teacher", 100), _fit("lcsc/digits_cd", 600, name="cd")],
    ),
    Case(
        "oms",
        ["validate", "experiment=oms/digits", "search.budget=90", "search.fidelity=250", "search.finalists=2",
         "search.shared=false",
         "data.num_samples=1000", "method.select=500", "method.per_rule=3", "method.singles=16"],
        [_fit("oms/digits_member", 20, f"module.network.attention_head_dim={width}", name=f"oms/digits_w{width}")
         for width in _WIDTHS],
    ),
    Case(
        "dele",
        ["validate", "experiment=dele/nasbench201", "ckpt_path=ROOT/cells/fit",
         "method.labels=[24,46]", "method.label_seeds=2", "method.search_seeds=2"],
        [["fit", "experiment=dele/nasbench201", "run.name=cells"]],
    ),
    Case(
        "eep",
        ["validate", "experiment=eep/digits", "search.budget=40", "search.strategy.prune_evaluations=25",
         "search.finalists=4", "search.shared=false"],
        [_fit("eep/tiny_moe", 20)],
    ),
    Case(
        "dd",
        ["validate", "experiment=dd/digits", "ckpt_path=ROOT/student/fit", "data.num_pairs=2000",
         "data.images.num_samples=500", "method.latency_batches=[1,16]"],
        [_fit("dd/digits_tokenizer", 100), _fit("dd/digits_teacher", 50),
         _fit("dd/digits", 50, "data.num_pairs=2000", name="student")],
    ),
    Case(
        "viditq",
        ["validate", "experiment=viditq/digits", "ckpt_path=ROOT/q/fit", "method.mixed.samples=4",
         "data.num_samples=200", "method.trajectory=8"],
        [_fit("viditq/digits", 50, name="q")],
    ),
    Case(
        "mixdq",
        ["validate", "experiment=mixdq/digits", "ckpt_path=ROOT/mixed/fit/artifact", "data.num_samples=200",
         "method.trajectory=8", "method.samples=16"],
        [_fit("mixdq/digits", 50, name="mixed")],
    ),
)  # fmt: skip


def dry_run_bars(root: Path, names: Sequence[str] = ()) -> tuple[list[Bar], list[dict[str, Any]]]:
    """One bar for each method, and a table of predicted and real seconds.

    Args:
        root: an empty folder for all runs.
        names: of the cases; all of them if empty.

    Returns bars and rows. DELE is left out where `GENLIGHT_DATA` names no folder with its table.
    """
    data = Path(os.environ.get("GENLIGHT_DATA", ""))
    chosen = [case for case in CASES if not names or case.name in names]
    if not (data / "nasbench").is_dir():
        chosen = [case for case in chosen if case.name != "dele"]
    rows = [_measured(case, root) for case in chosen]
    bars = [
        bar_at_most(
            f"dry-run-{row['command']}",
            f"{row['command']}: |time predicted by the dry run / real - 1|",
            abs(row["predicted / real"] - 1),
            TOLERANCE,
        )
        for row in rows
    ]
    return bars, rows


def _measured(case: Case, root: Path) -> dict[str, Any]:
    def words(given: Sequence[str]) -> list[str]:
        return [*(word.replace("ROOT", str(root)) for word in given), f"run.root={root}"]

    for each in case.first:
        genlight(*words(each))
    command = [*words(case.words), f"run.name=measured/{case.name}"]
    os.environ["COLUMNS"] = "200"  # of the printed table
    predicted = predicted_seconds(run("-m", "genlight", *command, "dry_run=true"))
    genlight(*command)
    found = report(root / "measured" / case.name / command[0])
    real, own = float(found["real"]["total_seconds"]), float(found["predicted"]["total_seconds"])
    row = {"command": case.name, "predicted s": predicted, "real s": real, "predicted / real": predicted / real}
    return {**row, "predicted by the run itself / real": own / real}


def predicted_seconds(printed: str) -> float:
    """The time in what a dry run printed, such as "about 2 min 5 s in all"."""
    said = seconds_said(printed)
    if said is None:
        raise ValueError(f"a dry run printed no time: {printed[-500:]}")
    return said[0]


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for bar in dry_run_bars(Path(folder), sys.argv[1:])[0]:
            print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value:.3g} ({bar.bar})")
