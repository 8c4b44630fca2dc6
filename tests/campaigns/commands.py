"""Whole commands with a fault at each of their writes: run in children of one warm process, then resumed.

A run is watched once; what the disk holds before each write is kept, as SIGKILL or a power loss there would leave it.
For writes that fail, the command is run again with the fault in it. Each time the same command with resume=true must
end with the results of a run that nothing disturbed.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracles.faults import in_child

from genlight.cli import main
from genlight.io import primitives
from genlight.trainer.checkpoint_io import load_checkpoint, newest_whole_checkpoint

Hook = Callable[[str, Path], None]
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
    "callbacks.checkpoint.every_n_train_steps=1",
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
        kept = load_checkpoint(newest)  # all of it but the names of folders
        for part in ("global_step", "state_dict", "current_model_state", "optimizer_states", "loops"):
            found[f"{newest.name}: {part}"] = digest(_bytes_of(kept[part]))
    files = [*folder.glob("search/*/history.jsonl"), *folder.glob("search/*/outcome.json")]
    files += [*folder.glob("*.safetensors"), *(folder / "artifact").rglob("*")]
    for file in files:
        if file.is_file() and file.name not in ("README.md", "manifest.json"):
            found[str(file.relative_to(folder))] = digest(file.read_bytes())
    report = json.loads((folder / "report.json").read_text())
    found["metrics"] = json.dumps(report["metrics"], sort_keys=True)
    found["table"] = json.dumps(report["table"], sort_keys=True)
    return found


def _bytes_of(value: Any) -> bytes:
    """Of nested state, all bits of its tensors."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype).encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(str(key).encode() + _bytes_of(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return b"".join(map(_bytes_of, value))
    return repr(value).encode()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if ".tmp-" in path.name or ".old-" in path.name]


@dataclass
class Repeats:
    """Tells the third and further writes to a file in a row: there are thousands, one for each tensor."""

    last: tuple[str, str] = ("", "")
    times: int = 0

    def __call__(self, name: str, path: Path) -> bool:
        self.times = self.times + 1 if self.last == (name, str(path)) else 1
        self.last = (name, str(path))
        return name == "write" and self.times > 2


@dataclass
class Watcher:
    """A hook that keeps what the disk holds before each write, each different content once.

    Args:
        run_root: that the run writes below.
        kept: where the states go, numbered folders that can be a run.root.
        power: with what was not synced cut off, as a power loss may leave it.
    """

    run_root: Path
    kept: Path
    power: bool = False
    calls: int = 0
    seen: set[str] = field(default_factory=set)
    synced: dict[int, int] = field(default_factory=dict)
    repeats: Repeats = field(default_factory=Repeats)

    def __call__(self, name: str, path: Path) -> None:
        self.calls += 1
        if self.repeats(name, path):
            return
        folder = self.run_root / "tiny"
        content = {
            str(file.relative_to(self.run_root)): self._durable(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.is_symlink()
        }
        links = {
            str(file.relative_to(self.run_root)): os.readlink(file) for file in folder.rglob("*") if file.is_symlink()
        }
        key = digest(json.dumps([{n: digest(c) for n, c in content.items()}, links], sort_keys=True).encode())
        if key in self.seen:
            return
        self.seen.add(key)
        place = self.kept / f"{len(self.seen):04d}"
        for folder_ in [f for f in (self.run_root / "tiny").rglob("*") if f.is_dir()]:
            (place / folder_.relative_to(self.run_root)).mkdir(parents=True, exist_ok=True)
        for inner, data in content.items():
            (place / inner).parent.mkdir(parents=True, exist_ok=True)
            (place / inner).write_bytes(data)
        for inner, target in links.items():
            (place / inner).symlink_to(target)
        place.mkdir(parents=True, exist_ok=True)
        (place / "moment.txt").write_text(f"{self.calls} {name} {path.name}")

    def trace_syncs(self) -> None:
        """From here on know what was synced."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            real(descriptor)
            status = os.fstat(descriptor)
            self.synced[status.st_ino] = status.st_size

        os.fsync = fsync

    def _durable(self, file: Path) -> bytes:
        data = file.read_bytes()
        return data[: self.synced.get(file.stat().st_ino, 0)] if self.power else data


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

    ended = run(root / "watched", words, hook=watcher, before=watcher.trace_syncs if power else None)
    assert ended.code == 0, ended.text
    wrong, states = [], sorted((root / "states").glob("[0-9]*"))
    for state in some_of(states, count):
        moment = (state / "moment.txt").read_text()
        good = newest_whole_checkpoint(folder_of(state, words) / "checkpoints")[0]
        saved = any((folder_of(state, words) / "checkpoints").glob("*.ckpt"))
        if saved and good is None:
            wrong.append(f"{moment}: no whole checkpoint")
        wrong += [f"{moment}: {fault}" for fault in resumed(state, words, expected)]
    shutil.rmtree(root / "states")
    shutil.rmtree(root / "watched")
    return Points(len(some_of(states, count)), wrong)


def resumed(root: Path, words: list[str], expected: dict[str, str]) -> list[str]:
    """What is wrong after the same command with resume=true."""
    ended = run(root, words, "resume=true")
    if ended.code != 0:
        return [f"resume ended with {ended.code}: {ended.text[-300:]}"]
    folder = folder_of(root, words)
    wrong = [f"{name} differs" for name in differing(results(folder), expected)]
    return wrong + [f"{name} is left over" for name in leftovers(folder)]


def reference(root: Path, words: list[str]) -> dict[str, str]:
    """The results of a run that nothing disturbs; made once below `root`."""
    folder = folder_of(root / "whole", words)
    if not (folder / "report.json").is_file():
        ended = run(root / "whole", words)
        assert ended.code == 0, ended.text
    return results(folder)


def writes(root: Path, words: list[str]) -> list[int]:
    """The numbers of the system calls of a whole run that change the disk, without repeated writes to a file."""
    calls, repeats, number = root / "calls.txt", Repeats(), 0
    if calls.exists():
        return [int(line) for line in calls.read_text().split()]

    def hook(name: str, path: Path) -> None:
        nonlocal number
        number += 1
        if not repeats(name, path):
            with calls.open("a") as file:
                file.write(f"{number}\n")

    assert run(root / "counted", words, hook=hook).code == 0
    shutil.rmtree(root / "counted")
    return writes(root, words)


def failing(root: Path, words: list[str], code: int, count: int | None = None, *, for_good: bool = False) -> Points:
    """Every write fails in turn (or `count` of them), once or for good from there on; then the disk is well again."""
    expected, wrong = reference(root, words), []
    numbers = some_of(writes(root, words), count)
    for number in numbers:
        place = root / f"failing-{number}"
        ended = run(place, words, hook=_failing_from(number, code, for_good))
        if not ended.is_told:
            wrong.append(f"call {number} ended with {ended.code}: {ended.text[-300:]}")
        wrong += [f"call {number}: {fault}" for fault in resumed(place, words, expected)]
        shutil.rmtree(place)
    return Points(len(numbers), wrong)


def _failing_from(number: int, code: int, for_good: bool) -> Hook:
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        # a full disk still takes new names for what is there, and removals
        takes_room = name in ("create", "open", "write", "fsync", "mkdir")
        if seen == number or (for_good and seen > number and takes_room):
            raise OSError(code, os.strerror(code), str(path))

    return hook


def signalled(root: Path, words: list[str], number: int, count: int | None = None) -> Points:
    """A signal at every write, or at `count` of them: the command ends with its code, or with what it was about to
    finish; the same command again ends with the results of a run that none disturbed."""
    expected, wrong = reference(root, words), []
    calls = some_of(writes(root, words), count)
    for call in calls:
        place = root / f"signal-{number}-{call}"
        ended = run(place, words, hook=_sending_at(call, number))
        if ended.code not in (128 + number, 0) or "Traceback" in ended.text:
            wrong.append(f"call {call} ended with {ended.code}: {ended.text[-300:]}")
        wrong += [f"call {call}: {fault}" for fault in resumed(place, words, expected)]
        shutil.rmtree(place)
    return Points(len(calls), wrong)


def _sending_at(call: int, number: int) -> Hook:
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == call:
            os.kill(os.getpid(), number)

    return hook
