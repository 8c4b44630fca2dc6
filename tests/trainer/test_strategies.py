"""What each strategy option builds, and what is refused before anything runs."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from genlight.errors import UserError
from genlight.trainer import sharded_folder
from genlight.trainer import strategies as module
from genlight.trainer.strategies import (
    DeepSpeedCPUStrategy,
    FullStateFSDPStrategy,
    GPUDeepSpeedStrategy,
    check_callbacks,
)

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted((CONF / "strategy").glob("*.yaml"))
NEED_GPU = {"fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")


def build(name, **changes):
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / "strategy" / f"{name}.yaml"), changes))


def see_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_the_promised_options_are_there():
    zero = {f"deepspeed_zero{stage}" for stage in (1, 2, 3)}
    assert {path.stem for path in OPTIONS} == {"auto", "ddp", "fsdp", "deepspeed_cpu"} | zero


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_says_what_it_is_and_names_a_class_of_ours_or_lightning(path):
    assert path.read_text().startswith("# ")
    assert OmegaConf.load(path)._target_.startswith(("genlight.", "lightning."))


@without_gpu
@pytest.mark.parametrize("name", sorted(NEED_GPU))
def test_without_a_gpu_one_line_names_the_way_out(name):
    with pytest.raises(Exception) as caught:
        build(name)
    error = caught.value.__cause__ or caught.value  # Hydra wraps what a constructor raises
    assert isinstance(error, UserError)
    assert "\n" not in str(error) and f"strategy={name} needs an NVIDIA GPU" in str(error)
    assert ("strategy=deepspeed_cpu" in str(error)) == name.startswith("deepspeed") and "strategy=ddp" in str(error)


def test_with_a_gpu_each_option_builds_its_stage(monkeypatch):
    see_a_gpu(monkeypatch)
    for stage in (1, 2, 3):
        strategy = build(f"deepspeed_zero{stage}", offload_optimizer=True)
        assert strategy.config["zero_optimization"]["stage"] == stage
        assert strategy.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (
        build("deepspeed_zero3", offload_parameters=True).config["zero_optimization"]["offload_param"]["device"]
        == "cpu"
    )
    assert isinstance(build("fsdp"), FSDPStrategy)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_cpu_engine_needs_no_gpu(stage):
    strategy = build("deepspeed_cpu", stage=stage)
    assert strategy.config["zero_optimization"]["stage"] == stage
    assert strategy.root_device == torch.device("cpu", 0)
    assert Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False).world_size == 2


def test_auto_and_ddp_leave_the_choice_of_device_to_lightning():
    assert build("auto") == "auto"
    assert isinstance(build("ddp"), DDPStrategy)


def test_bad_values_are_refused(monkeypatch):
    see_a_gpu(monkeypatch)
    with pytest.raises(ValueError, match=r"strategy\.stage must be 1, 2 or 3, got 4"):
        DeepSpeedCPUStrategy(stage=4)
    with pytest.raises(ValueError, match=r"strategy\.stage must be 1, 2 or 3, got 0"):
        GPUDeepSpeedStrategy(stage=0)
    with pytest.raises(ValueError, match="offload_parameters needs stage 3"):
        GPUDeepSpeedStrategy(stage=2, offload_parameters=True)
    with pytest.raises(ValueError, match=r"strategy\.state_dict_type must be full, got 'sharded'"):
        FullStateFSDPStrategy(state_dict_type="sharded")


def test_a_strategy_on_the_wrong_accelerator_is_refused(monkeypatch):
    see_a_gpu(monkeypatch)
    for strategy, text in (
        (GPUDeepSpeedStrategy(2), "strategy=deepspeed_cpu"),
        (FullStateFSDPStrategy(), "strategy=ddp"),
    ):
        monkeypatch.setattr(type(strategy), "accelerator", None)
        with pytest.raises(UserError, match=text):
            strategy.setup_environment()
    strategy = DeepSpeedCPUStrategy()
    monkeypatch.setattr(DeepSpeedCPUStrategy, "accelerator", None)
    with pytest.raises(UserError, match=r"trainer\.accelerator=cpu"):
        strategy.setup_environment()


def test_clipping_by_norm_is_refused_under_fsdp(monkeypatch):
    see_a_gpu(monkeypatch)
    trainer = SimpleNamespace(callbacks=[], precision="32-true", gradient_clip_val=1.0, gradient_clip_algorithm=None)
    trainer.state = SimpleNamespace(fn=TrainerFn.FITTING)
    with pytest.raises(UserError, match=r"trainer\.gradient_clip_val=1 .* strategy=deepspeed_zero3"):
        FullStateFSDPStrategy().setup(trainer)


def test_averaging_is_refused_where_it_would_be_wrong(monkeypatch):
    see_a_gpu(monkeypatch)
    ema = [ModelCheckpoint(), EMAWeightAveraging(decay=0.9)]
    for strategy, text in ((FullStateFSDPStrategy(), "FSDP"), (DeepSpeedCPUStrategy(stage=3), "ZeRO-3")):
        with pytest.raises(UserError, match=f"EMAWeightAveraging cannot average weights that {text}") as caught:
            check_callbacks(strategy, ema)
        assert "~callbacks.ema" in str(caught.value)
        check_callbacks(strategy, ema[:1])
    with pytest.raises(UserError, match="16 bits"):
        check_callbacks(DeepSpeedCPUStrategy(stage=2), ema, precision="bf16-mixed")
    with pytest.raises(UserError, match="does not work under DeepSpeed"):
        check_callbacks(DeepSpeedCPUStrategy(stage=2), [StochasticWeightAveraging(swa_lrs=0.1)])
    for strategy in ("auto", DDPStrategy(), DeepSpeedCPUStrategy(stage=1), DeepSpeedCPUStrategy(stage=2)):
        check_callbacks(strategy, ema, precision="32-true")


def test_the_trainer_itself_asks_for_that_check():
    """So that a program that forgets `check_callbacks` still gets the refusal, before the engine is built."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DeepSpeedCPUStrategy(stage=3),
        logger=False,
        callbacks=[EMAWeightAveraging()],
    )
    with pytest.raises(UserError, match="ZeRO-3"):
        trainer.strategy.setup(trainer)


def staged(path):
    sharded_folder.make_staging(path)
    staging = sharded_folder.staging_folder(path)
    (staging / "checkpoint").mkdir()
    (staging / "checkpoint" / "shard.pt").write_bytes(b"shard")
    (staging / "zero_to_fp32.py").write_text("import pickle")
    return staging


def test_a_folder_is_whole_or_absent(tmp_path):
    path = tmp_path / "step=1.ckpt"
    staging = staged(path)
    assert not path.exists()
    sharded_folder.write_common(staging, {"w": torch.ones(2)}, {"world_size": 2})
    assert not path.exists()
    sharded_folder.commit(path)
    sharded_folder.check_sharded_checkpoint(path)
    assert not staging.exists() and not (path / "zero_to_fp32.py").exists()
    assert sharded_folder.read_trainer_state(path) == {"world_size": 2}
    assert torch.equal(sharded_folder.read_weights(path)["w"], torch.ones(2))


def test_a_second_save_replaces_the_first_whole(tmp_path):
    path = tmp_path / "last.ckpt"
    for number in (1.0, 2.0):
        sharded_folder.write_common(staged(path), {"w": torch.full((2,), number)}, {"world_size": 2})
        sharded_folder.commit(path)
    assert torch.equal(sharded_folder.read_weights(path)["w"], torch.full((2,), 2.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    path = tmp_path / "last.ckpt"
    staging = staged(path)
    sharded_folder.make_staging(path)
    assert staging.is_dir() and not list(staging.iterdir())


def test_a_half_deleted_folder_is_not_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    sharded_folder.write_common(staged(path), {"w": torch.ones(2)}, {})
    sharded_folder.commit(path)
    monkeypatch.setattr(sharded_folder, "remove_path", lambda path: None)
    sharded_folder.remove(path)
    assert not sharded_folder.is_sharded_checkpoint(path)
    with pytest.raises(UserError):
        sharded_folder.check_sharded_checkpoint(path)


def test_a_single_file_cannot_continue_a_deepspeed_run():
    strategy = DeepSpeedCPUStrategy()
    with pytest.raises(UserError, match="was written without DeepSpeed"):
        strategy._load_single_file(Path("x.ckpt"), fitting=True)


def test_no_unsafe_name_is_exported():
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_commands_of_the_page_on_multi_node_runs_parse_in_bash():
    text = (CONF.parent / "docs" / "multi_node.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    assert any("#SBATCH" in block for block in blocks)
    for block in blocks:
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        for word in re.findall(r"\bstrategy=(\w+)", block):
            assert (CONF / "strategy" / f"{word}.yaml").is_file()


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (143, True)])
def test_the_script_for_slurm_goes_back_into_the_queue_after_a_signal_alone(code, requeued, tmp_path):
    """The commands of SLURM note their words; the job asks for as many processes as the trainer wants."""
    text = (CONF.parent / "docs" / "multi_node.md").read_text()
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) if "#SBATCH" in block)
    for name, end in {"srun": code, "scontrol": 0}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/{name}.txt\nexit {end}\n')
        (tmp_path / name).chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(tmp_path)}
    assert subprocess.run(["bash", "-c", script], env=environ).returncode == code
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 42\n"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, flags=re.MULTILINE))
    words = (tmp_path / "srun.txt").read_text().split()
    assert f"trainer.devices={asked['ntasks-per-node']}" in words and f"trainer.num_nodes={asked['nodes']}" in words
    assert "resume=true" in words
