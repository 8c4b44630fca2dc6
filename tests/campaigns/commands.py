"""Whole commands with a fault at each of their writes: run in children of one warm process, then resumed.

A run is watched once; what the disk holds before each write is kept, as SIGKILL or a power loss there would leave it.
For writes that fail, the command is run again with the fault in it. Each time the same command with resume=true must
end with the results of a run that nothing disturbed.
"""

import csv
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from campaigns.watcher import Repeats, Watcher, digest, states
from oracles.faults import in_child

from genlight.cli import main
from genlight.io import primitives
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint

Hook = Callable[[str, Path], None]
SAVED_EVERY = 1
# of the files that are kept, which a run that was stopped between two of them knows others of
_KEPT_FILES = ("dirpath", "best_k_models", "best_model_path", "kth_best_model_path", "kth_value", "last_model_path")
_ROW = "metrics.csv, step "
_NETWORK = [
    "module.num_inference_steps=2",
    "data.eval_batch_size=4",
    "data.num_samples=8",
    "trainer.accelerator=cpu",
    "callbacks.progress=null",
    "metrics=none",
]
_TRANSFORMER = [
    *_NETWORK,
    "module.network.num_layers=1",
    "module.network.num_attention_heads=1",
    "module.network.attention_head_dim=16",
]
FIT = [
    "fit",
    *_NETWORK,
    "module.network.block_out_channels=[8,16]",
    "module.network.down_block_types=[DownBlock2D,DownBlock2D]",
    "module.network.up_block_types=[UpBlock2D,UpBlock2D]",
    "module.network.norm_num_groups=4",
    "module.network.layers_per_block=1",
    "data.batch_size=4",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    f"callbacks.checkpoint.every_n_train_steps={SAVED_EVERY}",
    "callbacks.ema.update_starting_at_step=1",
]
SEARCH = [
    "validate",
    "experiment=s3/digits",
    *_TRANSFORMER,
    "method.nfe=[2]",
    "method.solvers=[ddim,dpmpp_2m]",
    "method.spacings=[log_snr,uniform]",
    "method.teacher.steps=6",
    "method.noise.search=4",
    "method.noise.select=4",
    "method.noise.report=8",
    "method.refine.iterations=1",
    "method.finetune.iterations=1",
    "search.budget=4",
    "search.fidelity=4",
    "search.workers=2",
    "search.strategy.screening_fidelity=2",
    "search.strategy.promoted=2",
    "search.finalists=2",
    "search.shared=false",  # a disturbed run must do its work itself
]
CALIBRATION = [
    "validate",
    "experiment=viditq/digits",
    *_TRANSFORMER,
    "method.samples=8",
    "method.trajectory=4",
    "method.rivals=false",
    "method.mixed.samples=2",
    "method.mixed.choices=[4,8]",
]
COMMANDS = {"fit": FIT, "search": SEARCH, "calibration": CALIBRATION}


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote to the terminal."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def is_told(self) -> bool:
        """Failed with one line for the person, or with a few if the end could not be recorded either."""
        return self.code not in (0, None) and self.errors != [] and "Traceback" not in self.text


def run(root: Path, words: list[str], *more: str, hook: Hook | None = None, before: Any = None) -> Ended:
    """A command in a forked child, which leaves `root/tiny/<command>`.

    Args:
        hook: called before each write.
        before: called in the child first.
    """
    root.mkdir(parents=True, exist_ok=True)
    output = root / "output.txt"

    def action() -> None:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))  # pytest's own catch no child's
        torch.set_num_threads(1)
        if before is not None:
            before()
        if hook is not None:
            primitives.before_primitive = hook
        raise SystemExit(main([*words, f"run.root={root}", "run.name=tiny", *more]))

    return Ended(in_child(action), output.read_text(errors="replace"))


def folder_of(root: Path, words: list[str]) -> Path:
    return root / "tiny" / words[0]


def results(folder: Path) -> dict[str, str]:
    """Digests of all that a disturbed run must end with, by what it is."""
    found = {}
    newest, _ = newest_whole_checkpoint(folder / "checkpoints")
    if newest is not None:
        checkpoint = load_checkpoint(newest)  # by its step: one of an interruption at the end has a name of its own
        for part, value in checkpoint.items():
            found[f"step {checkpoint['global_step']}: {part}"] = digest(_bytes_of(value))
        found |= _rows(folder / "metrics.csv")
    files = [*folder.glob("search/*/history.jsonl"), *folder.glob("search/*/outcome.json")]
    files += [*folder.glob("*.safetensors"), *(folder / "artifact").rglob("*")]
    for file in files:
        if file.is_file() and file.name not in ("README.md", "manifest.json"):
            found[str(file.relative_to(folder))] = digest(file.read_bytes())
    report = json.loads((folder / "report.json").read_text())
    found["metrics"] = json.dumps(report["metrics"], sort_keys=True)
    # but for measured times of a step
    rows = [{name: value for name, value in row.items() if not name.startswith("ms")} for row in report["table"]]
    found["table"] = json.dumps(rows, sort_keys=True)
    return found


def _rows(table: Path) -> dict[str, str]:
    """The rows of a table of metrics, by step and columns."""
    found: dict[str, str] = {}
    if not table.is_file():
        return found
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            filled = {name: value for name, value in row.items() if value}
            found[f"{_ROW}{row['step']}: {', '.join(sorted(filled))}"] = json.dumps(filled, sort_keys=True)
    return found


def _bytes_of(value: Any) -> bytes:
    """Of nested state, all bits of its tensors; without what it says of files that are kept."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype).encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        names = sorted((key for key in value if key not in _KEPT_FILES), key=str)
        return b"".join(str(key).encode() + _bytes_of(value[key]) for key in names)
    if isinstance(value, list | tuple):
        return b"".join(map(_bytes_of, value))
    return repr(value).encode()


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if ".tmp-" in path.name or ".old-" in path.name]


@dataclass(frozen=True)
class Points:
    """What a campaign found: how many faults, and those after which something was wrong, in words."""

    tried: int
    wrong: list[str]


def some_of(items: list[Any], count: int | None) -> list[Any]:
    """So many of a list, evenly over it; all of it for None."""
    if count is None or count >= len(items):
        return items
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def killed(root: Path, words: list[str], count: int | None = None, *, power: bool = False) -> Points:
    """SIGKILL, or a power loss, at every write (or at `count` of them), each followed by the same command again."""
    expected = reference(root, words)
    watcher = Watcher(root / "watched", root / "states", power)
    ended = run(root / "watched", words, hook=watcher, before=watcher.begin)
    assert ended.code == 0, ended.text
    wrong, chosen = [], some_of(states(root / "states"), count)
    for state, moment, steps in chosen:
        faults = [] if words[0] != "fit" else _lost(folder_of(state, words), steps)
        faults += resumed(state, words, expected, torn=power)
        wrong += [f"{moment}: {fault}" for fault in faults]
    shutil.rmtree(root / "states")
    shutil.rmtree(root / "watched")
    return Points(len(chosen), wrong)


def _lost(folder: Path, steps: int) -> list[str]:
    """What is wrong with the checkpoints of a fit that died after so many optimizer steps."""
    newest, _ = newest_whole_checkpoint(folder / "checkpoints")
    saved = 0 if newest is None else load_checkpoint(newest)["global_step"]
    if newest is None and any((folder / "checkpoints").glob("*.ckpt")):
        return ["no whole checkpoint"]
    return [f"{steps} steps were done, {saved} are saved"] if steps - saved > SAVED_EVERY else []


def resumed(root: Path, words: list[str], expected: dict[str, str], *, torn: bool = False) -> list[str]:
    """What is wrong after the same command with resume=true.

    Args:
        torn: rows of metrics.csv may be missing, or torn, where the disk may have lost them: the table is not synced
            as it grows.
    """
    ended = run(root, words, "resume=true")
    if ended.code != 0:
        return [f"resume ended with {ended.code}: {ended.text[-300:]}"]
    folder = folder_of(root, words)
    found = results(folder)
    names = [name for name in differing(found, expected) if not (torn and name.startswith(_ROW))]
    return [f"{name} differs" for name in names] + [f"{name} is left over" for name in leftovers(folder)]


def reference(root: Path, words: list[str]) -> dict[str, str]:
    """The results of a run that nothing disturbs, made once below `root`; `writes` knows its writes then."""
    place, calls = root / "whole", root / "calls.txt"
    repeats, number = Repeats(), 0

    def hook(name: str, path: Path) -> None:
        nonlocal number
        number += path.is_relative_to(place)
        if path.is_relative_to(place) and not repeats(name, path):
            with calls.open("a") as file:
                file.write(f"{number}\n")

    if not (folder_of(place, words) / "report.json").is_file():
        ended = run(place, words, hook=hook)
        assert ended.code == 0, ended.text
    return results(folder_of(place, words))


def writes(root: Path) -> list[int]:
    """The numbers of the calls of that run that change the disk, without repeated writes to a file."""
    return [int(line) for line in (root / "calls.txt").read_text().split()]


def failing(root: Path, words: list[str], code: int, count: int | None = None, *, for_good: bool = False) -> Points:
    """Every write fails in turn (or `count` of them), once or for good from there on; then the disk is well again."""
    expected, wrong = reference(root, words), []
    numbers = some_of(writes(root), count)
    for number in numbers:
        place = root / f"failing-{number}"
        ended = run(place, words, hook=_failing_from(place, number, code, for_good))
        if not ended.is_told:
            wrong.append(f"call {number} ended with {ended.code}: {ended.text[-300:]}")
        wrong += [f"call {number}: {fault}" for fault in resumed(place, words, expected)]
        shutil.rmtree(place)
    return Points(len(numbers), wrong)


def _failing_from(place: Path, number: int, code: int, for_good: bool) -> Hook:
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        if not path.is_relative_to(place):  # a cache of several runs
            return
        seen += 1
        # a full disk still takes new names for what is there, and removals
        takes_room = name in ("create", "open", "write", "fsync", "mkdir")
        if seen == number or (for_good and seen > number and takes_room):
            raise OSError(code, os.strerror(code), str(path))

    return hook


def artifact_without_room(root: Path, words: list[str]) -> Points:
    """No room for a large file from the artifact on (RLIMIT_FSIZE), which those feel too who write it for genlight."""
    expected, place = reference(root, words), root / "no-room"

    def hook(name: str, path: Path) -> None:
        if name == "mkdir" and path.name.startswith(".artifact"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    ended = run(place, words, hook=hook)
    told = ended.is_told and "disk full while writing" in ended.text
    wrong = [] if told else [f"ended with {ended.code}: {ended.text[-300:]}"]
    wrong += resumed(place, words, expected)
    shutil.rmtree(place)
    return Points(1, wrong)


def signalled(root: Path, words: list[str], number: int, count: int | None = None, times: int = 1) -> Points:
    """A signal at every write, or at `count` of them, `times` over: the command ends with its code, or with what it was
    about to finish; the same command again ends with the results of a run that none disturbed."""
    expected, wrong = reference(root, words), []
    calls = some_of(writes(root), count)
    for call in calls:
        place = root / f"signal-{number}-{call}"
        ended = run(place, words, hook=_sending_at(place, call, number, times))
        codes = (128 + number, 0) if times == 1 else (128 + number,)
        if ended.code not in codes or "Traceback" in ended.text:
            wrong.append(f"call {call} ended with {ended.code}: {ended.text[-300:]}")
        wrong += [f"call {call}: {fault}" for fault in resumed(place, words, expected)]
        shutil.rmtree(place)
    return Points(len(calls), wrong)


def _sending_at(place: Path, call: int, number: int, times: int) -> Hook:
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += path.is_relative_to(place)
        if seen == call and path.is_relative_to(place):
            for _ in range(times):
                os.kill(os.getpid(), number)

    return hook
