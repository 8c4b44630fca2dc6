"""LCSC on CIFAR-10 on a GPU, in minutes: docs/results/lcsc_cifar.json. Needs the data, below GENLIGHT_DATA.

The recipes lcsc/cifar10_teacher and lcsc/cifar10_cd, each stopped by its time: a diffusion model, its student of one
step with checkpoints collected, and the search of their combination beside every average. Nothing is tuned to it.

Every distance of the bars is measured on noise and real images that neither a search nor a choice has seen.

The parts, in this order: teacher, student, features (the network in which images are compared, where it is not in the
cache), search, mixing (tools/benchmarks/mixing.py), two (averages at two steps), random (random combinations, as many
as the search had). What is there in --folder is used; the record is written after each part, with what failed.

    python tools/proofs/lcsc_cifar.py --seconds 360 --folder runs/lcsc_cifar
    python tools/proofs/lcsc_cifar.py --seconds 100 --folder runs/lcsc_cifar --parts mixing
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _commands import RESULTS, ROOT, bar_if_measured, in_use, report, watch

from genlight.data.cache import default_cache_folder
from genlight.io import atomic_write_json
from genlight.reports.proof import Bar, bar_at_least, bar_at_most, write_proof
from genlight.reports.results_page import write_results_page

METRIC = "fd_cifar10"
TEACHER, STUDENT, FEATURES = "lcsc/cifar10_teacher", "lcsc/cifar10_cd", "features/cifar10"
PARTS = ("teacher", "student", "features", "search", "mixing", "two", "random")
# shares of the time that the two trainings take, beside starting
TEACHER_SHARE, STUDENT_SHARE = 0.19, 0.20
MEMBERS = 100
# a step of the student has six passes of the network, with the backward one as two; a step of the teacher three
PASSES = 6 / 3
# seconds of a search's command before its search, and after it
BEFORE, AFTER = 40.0, 55.0
# parts that are left out where there is less time
LEAST = {"search": 60.0, "mixing": 50.0, "two": 75.0, "random": 75.0}
NEEDS = {"student": "teacher", "search": "student", "two": "student", "random": "search"}
FIDELITY, REPORTED, SCREENED, PROMOTED = 5000, 10000, 1000, 20
TRACKED = ("tracked ema",)
USUAL = ("tracked ema", "post-hoc ema", "power ema", "lawa", "swa", "single", "ema", "last", "line", "neon")

# small enough for a CPU, to try the program itself
TINY_NETWORK = (
    "module.network.block_out_channels=[8,8,8]",
    "module.network.layers_per_block=1",
    "module.network.attention_head_dim=8",
    "module.network.norm_num_groups=4",
)
TINY_FEATURES = ("module.network.widths=[8,8,8]", "module.network.blocks_per_stage=1", "module.network.stem_stride=2")
TINY_SEARCH = (40, 60, 20, 5)


@dataclass
class Proof:
    """One call of the program.

    Attributes:
        folder: trainings, searches and what parts found.
        out: the record.
        deadline: of ``time.monotonic()``.
        seconds: of all of it.
        tiny: sizes for a CPU.
        words: the options, for the record.
        found: what each part found, by its name; ``{"failed": why}`` where it did not.
    """

    folder: Path
    out: Path
    started: float
    seconds: float
    tiny: bool
    words: list[str]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.started + self.seconds - time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time."""
        print(f"{time.monotonic() - self.started:7.1f} s  {text}", flush=True)

    def command(self, name: str, *words: str) -> float:
        """A process of Python, ended with the time that is left; its seconds. What it says goes to a file.

        Raises:
            RuntimeError: it failed or ran out of time, with the end of what it said.
        """
        log = self.folder / "logs" / f"{name.replace('/', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "COLUMNS": "200"}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | str = process.wait(max(self.left, 1.0))
            except BaseException as error:
                # with the commands that it started
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = "out of time"
        if code != 0:
            said = log.read_text(errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(f"{name}: {code}: {' | '.join(said)}"[:600])
        return time.monotonic() - begun

    def fit(self, experiment: str, seconds: float, *words: str, timed: Path | None = None) -> float:
        """Train an experiment for so long, into its usual place; seconds of the command."""
        limit = f"00:{int(seconds) // 3600:02d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
        words = ("fit", f"experiment={experiment}", *words, f"trainer.max_time={limit}", "trainer.benchmark=true")
        words = (*words, "trainer.num_sanity_val_steps=0", f"run.root={self.folder}", f"run.name={experiment}")
        begin = ("-m", "genlight") if timed is None else (__file__, "--timed", str(timed))
        return self.command(experiment, *begin, *words)


def steps_of(folder: Path) -> int:
    """Optimizer steps of a training, by its last checkpoint."""
    return max(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("step-*.ckpt"))


def features(proof: Proof) -> dict[str, Any]:
    """The feature network in the cache: while another process makes it, it is waited for."""
    sizes: tuple[str, ...]
    run = default_cache_folder() / FEATURES / "fit"
    while in_use(run) and proof.left > 1.0:
        time.sleep(0.5)
    if (run / "artifact").is_dir():
        return {"seconds": 0.0}
    sizes = ("trainer.max_steps=1500",)
    if proof.tiny:
        sizes = (*TINY_FEATURES, "trainer.max_steps=30", "data.batch_size=32")
    words = ("-m", "genlight", "fit", f"experiment={FEATURES}", *sizes, "trainer.precision=bf16-mixed")
    seconds = proof.command(FEATURES, *words, "trainer.num_sanity_val_steps=0", "run.overwrite=true")
    return {"seconds": seconds}


def teacher(proof: Proof) -> dict[str, Any]:
    """The diffusion model: the learning rate falls over its time."""
    seconds = max(5.0, TEACHER_SHARE * proof.seconds)
    words = ["metrics=none", "data.eval_batch_size=64", "callbacks.ema.decay=0.995", "trainer.max_steps=20000"]
    words += [f"module.lr_scheduler.seconds={seconds:g}", "trainer.val_check_interval=20000"]
    words += [*TINY_NETWORK, "data.batch_size=16"] if proof.tiny else ["data.batch_size=256"]
    whole = proof.fit(TEACHER, seconds, *words)
    return {"steps": steps_of(proof.folder / TEACHER / "fit"), "trained": seconds, "seconds": whole}


def student(proof: Proof) -> dict[str, Any]:
    """The student of one step, at a constant rate; its newest 100 checkpoints are about the last three quarters."""
    seconds = max(5.0, STUDENT_SHARE * proof.seconds)
    taught = proof.found["teacher"]
    expected = max(20, round(taught["steps"] / taught["trained"] * seconds / PASSES))
    every = max(1, round(0.75 * expected / MEMBERS))
    length = round(1.5 * expected)
    words = ["metrics=none", "data.eval_batch_size=64", f"trainer.max_steps={length}"]
    words += [f"trainer.val_check_interval={length}", f"callbacks.collector.every_n_steps={every}"]
    words += ["callbacks.collector.window=[0,1]", f"callbacks.collector.max_members={MEMBERS}"]
    words += ["data.batch_size=16" if proof.tiny else "data.batch_size=256"]
    timed = proof.folder / "collect.json"
    whole = proof.fit(STUDENT, seconds, *words, timed=timed)
    shares = json.loads(timed.read_text())
    return {
        "steps": steps_of(proof.folder / STUDENT / "fit"),
        "every": every,
        "members": len(list((proof.folder / STUDENT / "fit" / "trajectory").glob("step-*.safetensors"))),
        "trained": seconds,
        "seconds": whole,
        "collect": shares["collect"]["seconds"],
        "write": shares["write"]["seconds"],
    }


def searched(proof: Proof, name: str, *words: str) -> dict[str, Any]:
    """One search on the student's checkpoints, in the time that what comes before and after it leaves."""
    seconds = 20.0 if proof.tiny else max(20.0, proof.left - BEFORE - AFTER)
    fidelity, reported, screened, promoted = TINY_SEARCH if proof.tiny else (FIDELITY, REPORTED, SCREENED, PROMOTED)
    timed, run = proof.folder / f"apply-{name}.json", proof.folder / name / "validate"
    every = ["validate", f"experiment={STUDENT}", f"ckpt_path={proof.folder}/{STUDENT}/fit", *words]
    every += [f"run.root={proof.folder}", f"run.name={name}", f"search.seconds={seconds:g}"]
    every += [f"search.fidelity={fidelity}", f"method.select={fidelity}", f"data.num_samples={reported}"]
    every += [f"search.strategy.screening_fidelity={screened}", f"search.strategy.promoted={promoted}"]
    every += ["search.finalists=6", "method.singles=10", "method.random_search=false", "metrics.metrics=[fd]"]
    every += [f"data.eval_batch_size={fidelity // 2}", "search.shared=false", "resume=true"]
    whole = proof.command(name, __file__, "--timed", str(timed), *every)
    found = report(run)
    # below a line that says what the search is
    lines = (run / "search" / "lcsc" / "history.jsonl").read_text().splitlines()[1:]
    samples = [json.loads(line)["fidelity"] for line in lines]
    return {
        "rows": found["table"],
        "floor": (found["floor"] or {}).get("metrics", {}).get(METRIC),
        "evaluations": len(samples),
        "whole": samples.count(fidelity),
        "seconds": whole,
        "calls": json.loads(timed.read_text()),
    }


def search(proof: Proof) -> dict[str, Any]:
    """The combination of the student's checkpoints, beside every average."""
    return searched(proof, "search", "search.budget=1000")


def two(proof: Proof) -> dict[str, Any]:
    """Averages at two steps of the student: no search."""
    return searched(proof, "two", "search.budget=1", "module.num_inference_steps=2")


def random(proof: Proof) -> dict[str, Any]:
    """Random combinations in place of the search, as many."""
    budget = max(1, proof.found["search"]["whole"] - (TINY_SEARCH if proof.tiny else (PROMOTED,))[-1])
    return searched(proof, "random", "search=random", f"search.budget={budget}")


def mixing(proof: Proof) -> dict[str, Any]:
    """What a combination costs, beside a copy and beside averaging state dicts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ("1000000", "8") if proof.tiny else ("20000000", "40")
    words = ["--device", device, "--parameters", sizes[0], "--members", sizes[1], "--rounds", "5"]
    seconds = proof.command("mixing", "tools/benchmarks/mixing.py", *words)
    line = (proof.folder / "logs" / "mixing.log").read_text().strip().splitlines()[-1]
    return {**json.loads(line), "seconds": seconds}


DO: dict[str, Callable[[Proof], dict[str, Any]]] = {
    "teacher": teacher,
    "student": student,
    "features": features,
    "search": search,
    "mixing": mixing,
    "two": two,
    "random": random,
}


def score(result: dict[str, Any], *kinds: str) -> float:
    """On the report draw: of these kinds the one that is best on the select draw."""
    rows = [row for row in result["rows"] if row["kind"] in kinds]
    return float(min(rows, key=lambda row: row["select"])[METRIC])


def bars_of(found: dict[str, dict[str, Any]]) -> list[Bar]:
    """Every claim; one that could not be measured fails."""

    def over(part: str, *kinds: str) -> float:
        return score(found["search"], "LCSC") / score(found[part], *kinds)

    def applying() -> float:
        calls = found["search"]["calls"]
        return float(calls["apply"]["median"] / calls["measure"]["median"])

    def collecting() -> float:
        return float(found["student"]["collect"] / found["student"]["trained"])

    def raw(name: str) -> float:
        return float(found["mixing"]["raw"][name])

    what, usual = f"{METRIC}, one step: LCSC / ", "best of all other weights"
    claims: list[tuple[Callable[[str, str, float, float], Bar], str, str, Callable[[], float], float]] = [
        (bar_at_most, "cifar", what + "best tracked EMA", lambda: over("search", *TRACKED), 0.93),
        (bar_at_most, "cifar-all", what + usual, lambda: over("search", *USUAL), 0.93),
        (bar_at_most, "apply", "applying a combination / evaluating it, time", applying, 0.1),
        (bar_at_most, "random", what + "random combinations, equal evaluations", lambda: over("random", "LCSC"), 0.95),
        (bar_at_most, "two", what + usual + " at two steps", lambda: over("two", *USUAL), 1.0),
        (bar_at_most, "collect", "collecting / training, time of the thread that trains", collecting, 0.02),
        (bar_at_least, "mix-bandwidth", "mixing / bandwidth of a copy", lambda: raw("share_of_copy"), 0.5),
        (bar_at_least, "mix-naive", "averaging state dicts / mixing, time", lambda: raw("state_dicts_over_mix"), 5.0),
    ]
    return [bar_if_measured(*claim) for claim in claims]


SAID = {
    "student": "{members} checkpoints, one in {every} steps; writing them took {write:.1f} s of a thread of its own",
    "search": "{whole} evaluations on all samples; real images against real ones: {floor}",
    "mixing": "{parameters} parameters, {members} checkpoints; {raw}",
}
KEYS = ("part", "what", "weights", "search", "select", METRIC, "steps", "evaluations", "seconds")


def table_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the table: of each part what it was, or why it is missing, and below a search its weights."""
    table: list[dict[str, Any]] = []
    for part, row in found.items():
        what = f"failed: {row['failed']}" if "failed" in row else SAID.get(part, "").format_map(row)
        values = {"part": part, "what": what, **{key: row.get(key) for key in ("steps", "evaluations", "seconds")}}
        table.append({key: values.get(key) for key in KEYS})
        for line in row.get("rows", []):
            values = {"part": part, **{key: line[key] for key in ("weights", "search", "select", METRIC)}}
            table.append({key: values.get(key) for key in KEYS})
    return table


def write(proof: Proof) -> list[Bar]:
    """The record of what was found until now."""
    bars = bars_of(proof.found)
    command = ["python", "tools/proofs/lcsc_cifar.py", *proof.words]
    seconds = sum(float(row.get("seconds") or 0.0) for row in proof.found.values())
    write_proof(proof.out, bars=bars, seeds=[0], wall_seconds=seconds, table=table_of(proof.found), command=command)
    return bars


def do(proof: Proof, part: str) -> None:
    """One part, unless an earlier call did it; what fails is recorded."""
    kept = proof.folder / "parts" / f"{part}.json"
    if kept.is_file():
        proof.found[part] = json.loads(kept.read_text())
        return proof.say(f"{part}: from an earlier call")
    if proof.left < LEAST.get(part, 0.0) * (0.1 if proof.tiny else 1.0):
        return proof.say(f"{part}: left out, {proof.left:.0f} s are left")
    if "failed" in proof.found.get(NEEDS.get(part, ""), {}):
        return proof.say(f"{part}: left out, it needs {NEEDS[part]}")
    proof.say(f"{part} begins")
    try:
        proof.found[part] = DO[part](proof)
        write(proof)
        atomic_write_json(kept, proof.found[part])
        proof.say(f"{part} is done")
    except Exception as error:
        proof.found[part] = {"failed": f"{type(error).__name__}: {error}"}
        proof.say(f"{part} failed: {error}")
    write(proof)


def timed(file: Path, words: list[str]) -> int:
    """A command of genlight in this process; the seconds that calls took, all and the median, go to a file.

    Of a GPU's work what the caller waits for; combinations until they are written.
    """
    from genlight.callbacks.checkpoint_collector import CheckpointCollector
    from genlight.checkpoints.writer import TrajectoryWriter
    from genlight.cli import main as command
    from genlight.loops.evaluation import MetricObjective
    from genlight.search.spaces.checkpoint_coefficients import CheckpointCoefficients

    calls: dict[str, tuple[Any, str]] = {
        "collect": (CheckpointCollector, "on_train_batch_end"),
        "write": (TrajectoryWriter, "append"),
        "apply": (CheckpointCoefficients, "apply"),
        "measure": (MetricObjective, "evaluate_applied"),
    }

    def finish(name: str) -> None:
        if name == "apply" and torch.cuda.is_available():
            torch.cuda.synchronize()

    seconds = watch(calls, finish)
    code = command(words)
    found = {name: {"seconds": sum(each), "median": statistics.median(each or [0.0])} for name, each in seconds.items()}
    atomic_write_json(file, found)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=360.0, help="of all parts, which are sized by it")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "lcsc_cifar", help="trainings and searches")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "lcsc_cifar.json", help="the record")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the program; proves nothing")
    arguments = parser.parse_args()
    if not os.environ.get("GENLIGHT_DATA"):
        print("skipped: GENLIGHT_DATA names no folder with CIFAR-10 (cifar10/plain_text)")
        return
    words = ["--seconds", f"{arguments.seconds:g}", *(["--tiny"] if arguments.tiny else [])]
    folder, out = arguments.folder.absolute(), arguments.out.absolute()
    proof = Proof(folder, out, time.monotonic(), arguments.seconds, arguments.tiny, words)
    for part in PARTS:
        # an earlier call's are read too: the record is of all
        if part in arguments.parts or (folder / "parts" / f"{part}.json").is_file():
            do(proof, part)
    bars = write(proof)
    if out.parent == RESULTS:
        write_results_page(RESULTS)
    for bar in bars:
        print(f"{'holds' if bar.holds else 'FAILS'}  {bar.id}: {bar.value} ({bar.bar})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--timed"]:
        sys.exit(timed(Path(sys.argv[2]), sys.argv[3:]))
    main()
