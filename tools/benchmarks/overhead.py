"""CPU time of the default training under the Trainer against a bare PyTorch loop of the same step, in one run.

Both do the same work: the same module, batches, seeds, clipped gradients, optimizer, learning rate and moving average.
The Trainer adds its loops, callbacks, CSV log and progress. Rounds alternate, so that a change of the machine's speed
meets both.

    python tools/benchmarks/overhead.py --steps 150 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import OmegaConf

from genlight.build import build
from genlight.callbacks.step_seed import step_seed
from genlight.cli import cache_folder

SEED = 0


def compose_config(steps: int, folder: str) -> Any:
    """The default experiment, of ``steps`` optimizer steps."""
    OmegaConf.register_new_resolver("genlight.cache", cache_folder, replace=True)
    overrides = ["command=fit", f"trainer.max_steps={steps}", f"run.root={folder}", "run.name=overhead"]
    overrides += ["trainer.num_sanity_val_steps=0", f"trainer.val_check_interval={steps + 1}"]
    overrides += [f"callbacks.checkpoint.every_n_train_steps={10 * steps}"]
    with initialize_config_module("genlight.conf", version_base="1.3"):
        return compose("config", overrides=overrides)


def under_trainer(config: Any) -> tuple[float, LightningModule]:
    """CPU seconds of the steps alone, from the first batch to the last."""
    torch.manual_seed(SEED)
    module: LightningModule = build(config.module, "module")
    datamodule: LightningDataModule = build(config.data, "data")
    datamodule.noise_shape = module.sample_shape
    names = [n for n in config.callbacks if config.callbacks[n] and n not in ("checkpoint", "sample_grid")]
    callbacks = [build(config.callbacks[name], name) for name in names]
    trainer: Trainer = build(
        config.trainer,
        "trainer",
        callbacks=callbacks,
        logger=[build(config.logger.csv, "logger.csv")],
        default_root_dir=config.run.dir,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    started = time.process_time()
    trainer.fit(module, datamodule=datamodule)
    return time.process_time() - started, module


def bare_loop(config: Any, steps: int) -> tuple[float, LightningModule]:
    """The same steps by hand."""
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    torch.manual_seed(SEED)
    module: Any = build(config.module, "module")
    datamodule: Any = build(config.data, "data")
    module.log = lambda *args, **kwargs: None
    started = time.process_time()
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    schedule = module.lr_scheduler(optimizer, total_steps=steps)
    average = AveragedModel(module, avg_fn=get_ema_avg_fn(config.callbacks.ema.decay), use_buffers=True)
    module.train()
    loader = datamodule.train_dataloader()
    for step in range(steps):
        batch = loader.dataset.__getitems__(loader.batch_sampler.batch(step))
        torch.manual_seed(step_seed(SEED, step, 0))
        loss = module.training_step(batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()
        if step + 1 >= config.callbacks.ema.update_starting_at_step:
            average.update_parameters(module)
    average.update_parameters(module)
    return time.process_time() - started, module


def measure(steps: int, rounds: int) -> dict[str, Any]:
    """The ratio of CPU times, median over rounds, with both series."""
    trainer_seconds, bare_seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = compose_config(steps, folder)
        under_trainer(compose_config(6, folder))  # first calls compile and allocate
        bare_loop(config, 6)
        for _ in range(rounds):
            bare_seconds.append(bare_loop(config, steps)[0])
            trainer_seconds.append(under_trainer(config)[0])
    ratios = [a / b for a, b in zip(trainer_seconds, bare_seconds)]
    return {
        "steps": steps,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "trainer_cpu_seconds": trainer_seconds,
        "bare_cpu_seconds": bare_seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.steps, arguments.rounds), indent=1))
