"""Commands for end-to-end tests: the default experiment, small enough for a second or two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from oracles.faults import in_child
from oracles.ranks import in_ranks

from genlight.cli import main
from genlight.recipes import check_ended

TINY = [
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "trainer.num_sanity_val_steps=0",
    "trainer.log_every_n_steps=1",
    "module.network.block_out_channels=[8,16]",
    "module.network.down_block_types=[DownBlock2D,DownBlock2D]",
    "module.network.up_block_types=[UpBlock2D,UpBlock2D]",
    "module.network.norm_num_groups=4",
    "module.num_inference_steps=2",
    "data.batch_size=16",
    "data.eval_batch_size=20",
    "data.num_samples=40",
    "metrics.metrics=[fd]",
    "callbacks.checkpoint.every_n_train_steps=2",
    "callbacks.ema.update_starting_at_step=2",
]


def genlight(root: Path, *words: str) -> int:
    """Run a command of the tiny experiment below ``root`` in this process; returns the exit code."""
    return main([words[0], *TINY, f"run.root={root}", *words[1:]])


def untrained_features(cache: Path) -> None:
    """A feature network where the metrics of digits look for it, so that no test trains one."""
    from genlight.modules.classifier import ClassifierModule
    from genlight.nets.classifier import Classifier

    torch.manual_seed(0)
    network = Classifier(image_size=8, channels=1, num_classes=10, widths=[8, 16], blocks_per_stage=1)
    ClassifierModule(network).export(cache / "features" / "digits" / "fit" / "artifact")


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def histories(folder: Path) -> dict[str, bytes]:
    """The archives of the searches of a run, by name."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("search/*/history.jsonl"))}


def copied(run: Path, name: str) -> Path:
    """The folder of a finished run under another name, for a command that goes on with it."""
    return Path(shutil.copytree(run, run.parents[1] / name / run.name))


def added(before: Path, after: Path) -> dict[str, int]:
    """How many records each archive of a run has more than that of another, which it goes on from byte by byte."""
    old, new = histories(before), histories(after)
    assert old.keys() == new.keys() and all(new[name].startswith(old[name]) for name in old)
    return {name: new[name].count(b"\n") - old[name].count(b"\n") for name in old}


def assert_accounted(folder: Path) -> None:
    """What a run of a method took by parts: what shows at all was predicted, and all is no longer than the run."""
    report = report_of(folder)
    real, predicted = report["real"]["phase_seconds"], report["predicted"]["phase_seconds"]
    assert real and {name for name, seconds in real.items() if seconds > 0.1} <= predicted.keys()
    assert sum(real.values()) <= report["real"]["total_seconds"]
    assert f"| {next(iter(real))} | " in (folder / "report.md").read_text()


def the_error(err: str) -> str:
    """The one line in which a command said what is wrong; an error that it foresaw, with no details to look up."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "details in" not in lines[0] and "Traceback" not in err, err
    return lines[0]


def run_in_own_process(*words: str, timeout: float = 280) -> None:
    """A command in a process of its own, which starts others if it is told to; it must succeed."""
    environ = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "genlight", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def run_forked(command: str, *words: str, show: bool = True) -> str:
    """In place of `genlight.recipes.run_command`: in a child of this process, which need not import torch again."""
    assert show
    check_ended(in_child(lambda: sys.exit(main([command, *words]))), command, words[0])
    return ""


def run_in_ranks(*words: str) -> None:
    """As `run_in_own_process` a command with ``trainer.devices=2``; here no process has to import torch again."""
    in_ranks(lambda: sys.exit(main(list(words))))
