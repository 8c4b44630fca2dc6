"""Distilled Decoding on CIFAR-10, on a GPU and within minutes: docs/results/dd_cifar.json.

The commands of the recipe `dd/cifar10` one after the other: `fit` of tokenizer, teacher and student, each for a share
of `--seconds` in place of its number of steps, and `validate`, which compares the student with its teacher and with
what needs no student. Then the time of one sample of each, as the package calls them and as one CUDA graph each.

Needs the data (GENLIGHT_DATA) and the features: `fit experiment=features/cifar10`, before or beside this. What each
part found is kept in the folder and written at once; a part that fails is told in the table, and the next one begins.

    python tools/proofs/dd_cifar.py --folder runs/dd_cifar --seconds 370
    python tools/proofs/dd_cifar.py --folder runs/dd_cifar --parts latency            # again, on an idle GPU
    python tools/proofs/dd_cifar.py --folder /tmp/dd --seconds 90 --scale tiny        # a rehearsal without a GPU
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _commands import RESULTS, ROOT, report

from genlight import io
from genlight.reports.proof import Bar, bar_at_least, bar_at_most, write_proof
from genlight.reports.results_page import write_results_page

PARTS = ("tokenizer", "teacher", "student", "validate", "latency")
TEACHER, STUDENT = "dd/cifar10_teacher", "dd/cifar10"
METRIC = "fd_cifar10"
ONE, TWO, CLASS, ALL, HALF = "student, 1 step", "student, 2 steps", "onestep*, by class", "onestep*", "skip-32"
# shares of the seconds that trainings and pairs may take; the student has what is left before `validate` begins
TRAINING, PAIRS, VALIDATE = {"tokenizer": 0.12, "teacher": 0.19}, 0.07, 0.175
# seconds of a command beside its training, until one has been measured
START_UP = 18.0
BATCHES = (1, 16, 256)


@dataclass(frozen=True)
class Scale:
    """What a rehearsal makes smaller.

    Attributes:
        words: of each command.
        shard: pairs decoded at a time.
        pairs: the fewest and the most.
        samples: images in a Fréchet distance.
    """

    words: dict[str, tuple[str, ...]]
    shard: int
    pairs: tuple[int, int]
    samples: int


SCALES = {
    "full": Scale({}, 4000, (20000, 200000), 10000),
    "tiny": Scale(
        {
            "tokenizer": (
                "data.batch_size=32",
                "module.network.channels=[8,8,16]",
                "module.network.latent_channels=16",
                "module.network.norm_num_groups=8",
            ),
            "teacher": (
                "data.batch_size=32",
                "module.network.width=32",
                "module.network.num_layers=2",
                "module.network.num_heads=2",
            ),
            "student": ("data.batch_size=32",),
            "validate": ("data.images.eval_batch_size=100", "metrics.extractor.dtype=float32"),
        },
        100,
        (400, 800),
        200,
    ),
}


class Run:
    """The parts, and what they have found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.folder: Path = arguments.folder.resolve()
        self.scale, self.seconds, self.seed = SCALES[arguments.scale], float(arguments.seconds), int(arguments.seed)
        self.out: Path = arguments.out
        self.words = tuple(arguments.words)
        self.start_up = START_UP
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "dd_cifar_parts.json"
        self.found: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def part(self, name: str) -> None:
        """Do one part, keep what it found or how it failed, and write the results so far."""
        self.say(f"{name}: begins")
        begun = time.monotonic()
        try:
            found = getattr(self, name)()
        except Exception as error:
            found = {"failure": f"{type(error).__name__}: {error}"[-2000:]}
        found["seconds"] = round(time.monotonic() - begun, 1)
        self.found[name] = found
        io.atomic_write_json(self.file, plain(self.found))
        self.say(f"{name}: {found.get('failure') or 'done'} ({found['seconds']} s)")
        self.write()

    def command(self, name: str, command: str, recipe: str, *words: str, limit: float) -> float:
        """A command of genlight, as it would be typed; its seconds.

        RuntimeError if it fails, or has not written its report after `limit` seconds, at least two minutes.
        """
        made, clock, limit = self.folder / recipe / command / "report.json", time.time(), max(120.0, limit)
        words = (f"experiment={recipe}", "run.overwrite=true", *words)
        words = (command, *words, *self.scale.words.get(name, ()), *self.words)
        line = [sys.executable, "-m", "genlight", *words, f"run.root={self.folder}", f"seed={self.seed}"]
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 4)))
        log, begun = self.folder / f"{name}.log", time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                line, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()
                code = 0 if made.is_file() and made.stat().st_mtime > clock else -1
        if code != 0:
            tail = " | ".join(log.read_text(errors="replace").strip().splitlines()[-8:])
            what = f"stopped after {limit:.0f} s" if code == -1 else f"exit code {code}"
            raise RuntimeError(f"{command} {words[1]}: {what}: {tail}")
        return time.monotonic() - begun

    def fit(self, name: str, recipe: str, training: float, *words: str, before: float = 0.0) -> dict[str, Any]:
        """A fit whose training takes so many seconds; `before` are those of what it makes first."""
        whole = max(1, round(training))
        limited = f"{whole // 60:02d}:{whole % 60:02d}"
        words = (
            # time ends it, and the learning rate falls by time
            "trainer.max_steps=1000000",
            f"trainer.max_time='00:00:{limited}'",
            f"module.lr_scheduler.seconds={whole}",
            "trainer.val_check_interval=1000000",
            "trainer.num_sanity_val_steps=0",
            "callbacks.checkpoint.every_n_train_steps=1000000",
            *words,
        )
        wall = self.command(name, "fit", recipe, *words, limit=whole + before + 150)
        # that of the first command is longer than those of the others
        self.start_up = wall - whole - before
        metrics = report(self.folder / recipe / "fit")["metrics"]
        names = ("train/loss", "train/reconstruction", "train/cross_entropy", "train/agreement")
        checkpoints = sorted((self.folder / recipe / "fit" / "checkpoints").glob("step-*.ckpt"))
        steps = int(checkpoints[-1].stem.removeprefix("step-"))
        return {"training s": whole, "steps": steps, **{key: metrics[key] for key in names if key in metrics}}

    def tokenizer(self) -> dict[str, Any]:
        return self.fit("tokenizer", "dd/cifar10_tokenizer", self.seconds * TRAINING["tokenizer"])

    def teacher(self) -> dict[str, Any]:
        words = ("metrics=none", "module.tokenizer_recipe=null")
        found = self.fit("teacher", TEACHER, self.seconds * TRAINING["teacher"], *words)
        return {**found, "probe images/s": self.pair_rate()}

    def pair_rate(self) -> float:
        """Pairs a second, from the second of three shards on: how many there will be is decided by it."""
        import torch

        from genlight.modules.dd_pairs import PairSettings, make_pairs
        from genlight.modules.token_folder import read_token_teacher

        teacher = read_token_teacher(self.folder / TEACHER / "fit" / "artifact")
        settings = PairSettings(3 * self.scale.shard, seed=self.seed + 1_000_003, shard_size=self.scale.shard)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            make_pairs(name, teacher, settings, device=device_name())
            rate = rate_of(Path(name), self.scale.shard)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return rate

    def student(self) -> dict[str, Any]:
        least, most = self.scale.pairs
        # what the probe has measured is spent: the rate for as long as pairs may take
        rate = float(self.found.get("teacher", {}).get("probe images/s") or 1000.0)
        allowed = self.seconds * PAIRS
        number = int(min(most, max(least, rate * allowed))) // self.scale.shard * self.scale.shard
        # drawing the noise of all pairs for the training takes some seconds too
        before = number / rate + number / 25000
        training = self.left - self.seconds * VALIDATE - self.start_up - before
        self.say(f"student: {number} pairs at {rate:.0f} a second, then {training:.0f} s of training")
        words = ("metrics=none", *self.pair_words(number))
        found = self.fit("student", STUDENT, max(0.1 * self.seconds, training), *words, before=before)
        return {**found, "pairs": number, "pairs/s": rate_of(self.pairs_folder(number), self.scale.shard)}

    def pair_words(self, number: int) -> tuple[str, ...]:
        """Which pairs, and that a teacher that failed is not trained again at full length."""
        return f"data.num_pairs={number}", f"data.shard_size={self.scale.shard}", "module.teacher_recipe=null"

    def pairs_folder(self, number: int) -> Path:
        """Where the command has put the pairs."""
        from genlight.data.cache import default_cache_folder
        from genlight.modules.dd_pairs import PairSettings, folder_of
        from genlight.modules.token_folder import read_token_teacher

        teacher = read_token_teacher(self.folder / TEACHER / "fit" / "artifact")
        return folder_of(default_cache_folder(), teacher, PairSettings(number, self.seed, self.scale.shard))

    def validate(self) -> dict[str, Any]:
        self.wait_for_features()
        number = int(self.found["student"]["pairs"])
        words = (
            f"ckpt_path={self.folder / STUDENT / 'fit'}",
            *self.pair_words(number),
            f"data.images.num_samples={self.scale.samples}",
            "data.images.eval_batch_size=2500",
            "metrics.metrics=[fd]",
            # the precision of the pairs: in a lower one the flow ends in other tokens
            "trainer.precision=32-true",
            "method.refine=[4]",
            "method.involved=[]",
            "method.skip=[21,32]",
            "method.latency_batches=[]",
        )
        self.command("validate", "validate", STUDENT, *words, limit=self.left)
        found = report(self.folder / STUDENT / "validate")
        return {"rows": found["table"], "floor": (found["floor"] or {}).get("metrics"), "samples": self.scale.samples}

    def wait_for_features(self) -> None:
        """Another command may be training them. RuntimeError if they do not come."""
        from genlight.data.cache import default_cache_folder

        file = default_cache_folder() / "features" / "cifar10" / "fit" / "artifact" / "classifier.safetensors"
        patience = time.monotonic() + max(5.0, self.left - 45.0)
        while not file.is_file():
            if time.monotonic() > patience:
                raise RuntimeError(f"no features at {file}: fit experiment=features/cifar10, then --parts validate")
            time.sleep(0.5)

    def latency(self) -> dict[str, Any]:
        """Milliseconds of a batch: tokens of the teacher by drawing and of the student, in bfloat16."""
        return {"rows": latencies(self.folder / TEACHER / "fit" / "artifact", self.say)}

    def bars(self) -> list[Bar]:
        rows = {row["variant"]: row for row in self.found.get("validate", {}).get("rows", [])}
        times = {(row["calls as"], row["batch"]): row for row in self.found.get("latency", {}).get("rows", [])}

        def distance(over: str, under: str) -> float | None:
            return ratio(rows.get(over, {}).get(METRIC), rows.get(under, {}).get(METRIC))

        def speed(how: str) -> float | None:
            row = times.get((how, 1), {})
            return ratio(row.get("teacher ms"), row.get("student ms"))

        fd = f"{METRIC}: one step"
        return [
            bar("class", f"{fd} / independent tokens, by class", distance(ONE, CLASS), 0.5, bar_at_most),
            bar("all", f"{fd} / independent tokens", distance(ONE, ALL), 0.5, bar_at_most),
            bar("two", f"{METRIC}: two steps / one step", distance(TWO, ONE), 1.0, bar_at_most),
            bar("skip", f"{fd} / the teacher stopped at half of the tokens", distance(ONE, HALF), 1.0, bar_at_most),
            bar("latency", "latency at batch 1: teacher, drawn / one step", speed("functions"), 20, bar_at_least),
            bar("latency-graph", "the same, each as one CUDA graph", speed("a CUDA graph"), 20, bar_at_least),
            bar("pairs", "pairs a second", self.found.get("student", {}).get("pairs/s"), 1000, bar_at_least),
        ]

    def write(self) -> None:
        """The results so far."""
        table: list[dict[str, Any]] = []
        for name, found in self.found.items():
            facts = {key: value for key, value in found.items() if key not in ("rows", "floor")}
            table.append({"part": name, **facts})
            table += [{"part": name, **row} for row in found.get("rows", [])]
            if found.get("floor"):
                table.append({"part": name, "variant": "real images", **found["floor"]})
        seconds = sum(float(found["seconds"]) for found in self.found.values())
        words = ["python", "tools/proofs/dd_cifar.py", "--seconds", f"{self.seconds:g}"]
        write_proof(
            self.out,
            bars=self.bars(),
            seeds=[self.seed],
            wall_seconds=seconds,
            table=plain(table),
            command=[*words, *self.words],
        )


def plain(value: Any) -> Any:
    """As JSON has it: a number that is not finite becomes text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def bar(id: str, what: str, value: float | None, limit: float, make: Callable[[str, str, float, float], Bar]) -> Bar:
    """A bar; one that does not hold where there is no value."""
    if isinstance(value, int | float) and math.isfinite(value):
        return make(id, what, float(value), limit)
    return Bar(id, what, "not measured", make(id, what, 0.0, limit).bar, False)


def ratio(over: Any, under: Any) -> float | None:
    return over / under if isinstance(over, int | float) and isinstance(under, int | float) and under else None


def rate_of(folder: Path, shard: int) -> float:
    """Pairs a second by the times of the files, without the first, before which everything has to warm up."""
    times = sorted(file.stat().st_mtime for file in folder.glob("shard-*.safetensors"))
    return shard * (len(times) - 1) / max(times[-1] - times[0], 1e-3)


def device_name() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def warm_up() -> None:
    """Imports and the first use of the device, which take seconds."""
    import torch

    import genlight.modules.dd_pairs  # noqa: F401

    torch.zeros(1, device=device_name())


def latencies(artifact: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each batch size and way to call: medians in milliseconds, of tokens without the decoder."""
    import torch

    from genlight.modules.token_folder import read_token_teacher
    from genlight.nets.dd_student import student_of, take_from
    from genlight.nets.few_step import few_steps
    from genlight.nets.llamagen import LlamaGen

    device, saved = device_name(), read_token_teacher(artifact)
    assert isinstance(saved.model, LlamaGen)
    # time does not depend on the weights: the student is as it begins
    student: Any = student_of(saved.model)
    take_from(student, saved.model)
    student = student.to(device, torch.bfloat16).eval()
    quantizer = saved.model.quantizer.to(device)
    model = LlamaGen(copy.deepcopy(saved.model.transformer).to(device, torch.bfloat16).eval(), quantizer)
    decoder, codebook = saved.tokenizer.to(device, torch.bfloat16).eval(), quantizer.codebook.float().detach()
    second = len(model.group_sizes) * 20 // 64
    rows: list[dict[str, Any]] = []
    for size in BATCHES:
        label = torch.arange(size, device=device) % int(saved.num_classes or 1)
        noise = torch.randn(size, *saved.noise_shape, device=device, dtype=torch.bfloat16)

        def teacher_tokens(label: torch.Tensor = label) -> torch.Tensor:
            logits, state = model.begin(label)
            tokens: list[torch.Tensor] = []
            while True:
                # a draw of a multinomial distribution, without a look at the numbers, for which a device has to wait
                tokens.append((logits.softmax(-1) / torch.empty_like(logits).exponential_()).argmax(-1))
                if len(tokens) == len(model.group_sizes):
                    return torch.cat(tokens, dim=1)
                logits = model.extend(state, tokens[-1])

        def student_tokens(
            timesteps: Sequence[int] = (0,), noise: torch.Tensor = noise, label: torch.Tensor = label
        ) -> torch.Tensor:
            return few_steps(student, codebook, noise, label, timesteps).tokens

        def two_steps(run: Callable[[Sequence[int]], torch.Tensor] = student_tokens) -> torch.Tensor:
            return run((0, second))

        def images(noise: torch.Tensor = noise) -> torch.Tensor:
            return decoder.decode_vectors(noise)

        work: dict[str, Callable[[], Any]] = {
            "teacher ms": teacher_tokens,
            "student ms": student_tokens,
            "student, 2 steps ms": two_steps,
            "decoder ms": images,
        }
        for how, prepare in (("functions", None), ("a CUDA graph", as_graph)):
            row: dict[str, Any] = {"calls as": how, "batch": size}
            for name, run in work.items():
                try:
                    with torch.inference_mode():
                        row[name] = round(median_ms(run if prepare is None else prepare(run)), 4)
                except Exception as error:
                    row[f"{name}: failure"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            say(f"  {row}")
    return rows


def as_graph(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work, recorded once: no time goes into launching it."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def median_ms(run: Callable[[], Any], seconds: float = 1.0, most: int = 50) -> float:
    """Median over calls of the time until the device has done the work, after three that warm up."""
    import torch

    for _ in range(3):
        run()
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 5 or (len(times) < most and time.monotonic() - begun < seconds):
        if torch.cuda.is_available():
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            run()
            last.record()
            torch.cuda.synchronize()
            times.append(first.elapsed_time(last))
        else:
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    """The parts, each into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="trainings, logs, and what each part found")
    parser.add_argument("--seconds", type=float, default=370.0, help="for all parts but latency")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--out", type=Path, help="in place of docs/results/dd_cifar.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="further words of every command")
    arguments = parser.parse_args()
    recorded = arguments.out is None and arguments.scale == "full"
    if arguments.out is None:
        arguments.out = RESULTS / "dd_cifar.json" if recorded else arguments.folder / "dd_cifar.json"
    run = Run(arguments)
    # while the first command runs
    threading.Thread(target=warm_up, daemon=True).start()
    for name in arguments.parts:
        run.part(name)
    if recorded:
        write_results_page(RESULTS)
    for each in run.bars():
        print(f"{'holds' if each.holds else 'FAILS'}  {each.id}: {each.value} ({each.bar})")
    run.say(f"written: {run.out}")


if __name__ == "__main__":
    main()
