"""Commands for end-to-end tests: the default experiment, small enough for a second or two."""

import json
from pathlib import Path

import torch

from genlight.cli import main

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
