"""Trains a small task on two CPU processes with a trajectory and averages beside it, for a test to judge.

    python collector_driver.py FOLDER STRATEGY [STRATEGY ...]

FOLDER/<strategy>/ then holds ``checkpoints/step=….ckpt``, ``whole/`` (the trajectory of a run that was not stopped) and
``trajectory/`` (the same after the run was continued from step 2). FOLDER/one/ holds the trajectory of one process.
"""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))
import two_process_driver as driver

from genlight.callbacks.checkpoint_collector import CheckpointCollector
from genlight.callbacks.ema_bank import EMABank


def train(folder: Path, name: str, *, resume: bool = False, devices: int = driver.WORLD_SIZE) -> None:
    """Four steps, a member after each."""
    task = driver.tiny_task()
    trainer = driver.make_trainer(name, folder, task, "auto" if devices == 1 else None, devices)
    trainer.callbacks.insert(0, CheckpointCollector(str(folder / "trajectory"), every_n_steps=1, window=(0.0, 1.0)))
    if name.split("+")[0] not in ("zero3", "fsdp"):
        bank = EMABank(str(folder / "trajectory" / "ema"), rates=(0.5, 0.9), power_snapshots=4)
        trainer.callbacks.insert(0, bank)
    start = driver.checkpoint_at(folder, driver.RESUME_STEP) if resume else None
    trainer.fit(task.module, driver.GlobalBatches(task), ckpt_path=start, weights_only=True)


def start_both() -> int:
    """One process first, alone; then this program once for each of the two."""
    train(Path(sys.argv[1]) / "one", "ddp", devices=1)
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(driver.free_port()),
        "WORLD_SIZE": str(driver.WORLD_SIZE),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *sys.argv]
    ranks = range(driver.WORLD_SIZE)
    processes = [subprocess.Popen(command, env=common | {"LOCAL_RANK": str(rank)}) for rank in ranks]
    return max(process.wait() for process in processes)


def main() -> int:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "LOCAL_RANK" not in os.environ:
        return start_both()
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        train(folder, name)
        if os.environ["LOCAL_RANK"] == "0":
            shutil.copytree(folder / "trajectory", folder / "whole")
        train(folder, name, resume=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
