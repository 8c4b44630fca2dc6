"""Two real CPU processes under each strategy, held against one process that trains by a plain loop."""

import copy
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.ranks import in_ranks
from trainer import two_process_driver as driver

from genlight.errors import UserError
from genlight.io import load_tensors
from genlight.trainer.consolidate import consolidated_state_dict
from genlight.trainer.sharded_folder import check_sharded_checkpoint, is_sharded_checkpoint

STRATEGIES = ["ddp", "fsdp", "zero1+ema", "zero2", "zero3", "zero3+bf16"]
SHARDED = ["zero1+ema", "zero2", "zero3", "zero3+bf16"]
EXACT = ["ddp", "fsdp", "zero2", "zero3"]
# The mean over 8 rows is taken as the mean of two means over 4, so gradients differ in the last bits of fp32 (relative
# 1e-7), and Adam, which divides a gradient by its own size, passes that on. The largest difference seen is 3e-8, for
# weights that move by 0.04; kernels of other machines add in other orders, hence the margin.
TOLERANCE = {"rtol": 0.0, "atol": 1e-6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which the driver ran all strategies; made once, however many workers run the tests."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, done = root / "two_processes", root / "two_processes.done"
    with FileLock(root / "two_processes.lock"):
        if not done.exists():
            in_ranks(lambda: [driver.run(name, folder / name) for name in STRATEGIES])
            done.touch()
    return folder


@pytest.fixture(scope="module")
def single():
    """One process and no trainer: weights and their running average after each step, by step; index 0 is the start."""
    task = driver.tiny_task()
    module = task.module
    found = module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    weights = [copy.deepcopy(module.state_dict())]
    averages: list[dict[str, torch.Tensor]] = []
    for step in range(driver.TOTAL_STEPS):
        optimizer.zero_grad()
        module.training_step(task.batch(step), step).backward()
        optimizer.step()
        schedule.step()
        weights.append(copy.deepcopy(module.state_dict()))
        last = averages[-1] if averages else weights[-1]
        decay = driver.EMA_DECAY
        averages.append({name: decay * last[name] + (1 - decay) * value for name, value in weights[-1].items()})
    return {"weights": weights, "averages": averages, "losses": task.validation, "lr": schedule.get_last_lr()}


def assert_close(found, expected, **tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_train_the_same_weights_as_one(runs, single, name):
    found, _ = load_tensors(runs / name / "whole.safetensors")
    assert_close(found, single["weights"][-1], **TOLERANCE)
    results = json.loads((runs / name / "results.json").read_text())
    assert results["whole"] == {"global_step": driver.TOTAL_STEPS, "lr": single["lr"]}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_run_ends_with_the_same_bits(runs, name):
    whole, _ = load_tensors(runs / name / "whole.safetensors")
    resumed, _ = load_tensors(runs / name / "resumed.safetensors")
    assert_close(resumed, whole, rtol=0, atol=0)
    for step in (driver.TOTAL_STEPS,):
        first = consolidated_state_dict(driver.checkpoint_at(runs / name, step))
        second = consolidated_state_dict(driver.checkpoint_at(runs / name / "resumed", step))
        assert_close(second, first, rtol=0, atol=0)
    results = json.loads((runs / name / "results.json").read_text())
    assert results["resumed"] == results["whole"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("step", [driver.RESUME_STEP, driver.TOTAL_STEPS])
def test_any_checkpoint_consolidates_for_one_process(runs, single, name, step):
    state = consolidated_state_dict(driver.checkpoint_at(runs / name, step))
    assert_close(state, single["weights"][step], **TOLERANCE)
    driver.TinyModule().load_state_dict(state)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_continues_what_two_began(runs, single, name):
    from genlight.trainer.checkpoint_io import load_checkpoint

    checkpoint = load_checkpoint(driver.checkpoint_at(runs / name, driver.RESUME_STEP))
    task = driver.tiny_task()
    found = task.module.configure_optimizers()
    optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
    task.module.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    schedule.load_state_dict(checkpoint["lr_schedulers"][0])
    for step in range(driver.RESUME_STEP, driver.TOTAL_STEPS):
        optimizer.zero_grad()
        task.module.training_step(task.batch(step), step).backward()
        optimizer.step()
        schedule.step()
    assert_close(task.module.state_dict(), single["weights"][-1], **TOLERANCE)


def test_the_averaged_weights_survive_zero_1(runs, single):
    """Lightning's DeepSpeed strategy drops `state_dict`, which is where the averaging callback puts the average."""
    for step in (driver.RESUME_STEP, driver.TOTAL_STEPS):
        state = consolidated_state_dict(driver.checkpoint_at(runs / "zero1+ema", step))
        assert_close(state, single["averages"][step - 1], **TOLERANCE)
        apart = max((state[name] - single["weights"][step][name]).abs().max() for name in state)
        assert apart > 100 * TOLERANCE["atol"], "the average must differ from the weights for this test to say anything"


def test_mixed_precision_keeps_the_master_weights(runs, single):
    """The bf16 module holds 8 significant bits; the consolidated weights hold all of fp32, near fp32 training."""
    state = consolidated_state_dict(driver.checkpoint_at(runs / "zero3+bf16", driver.TOTAL_STEPS))
    assert state["first.weight"].dtype == torch.float32
    assert not torch.equal(state["first.weight"], state["first.weight"].bfloat16().float())
    # four steps of at most lr each, whose direction bf16 gradients can turn where they are near zero
    assert_close(
        {"w": state["first.weight"]},
        {"w": single["weights"][-1]["first.weight"]},
        rtol=0,
        atol=2 * 0.02 * (1 + 1 / 2 + 1 / 3 + 1 / 4),
    )


@pytest.mark.parametrize("name", EXACT)
def test_validation_measures_the_loaded_weights(runs, single, name):
    module = driver.TinyModule()
    module.load_state_dict(single["weights"][-1])
    with torch.no_grad():
        losses = [(module(batch["x"]) - batch["y"]).square().mean().item() for batch in single["losses"]]
    results = json.loads((runs / name / "results.json").read_text())
    assert results["validated"]["val/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize("name", SHARDED)
def test_no_file_of_a_checkpoint_is_a_pickle_or_a_program(runs, name):
    folder = driver.checkpoint_at(runs / name, driver.TOTAL_STEPS)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".pt"]) >= 3
    for path in files:
        assert path.suffix in (".pt", ".safetensors", ".json"), path
        start = path.read_bytes()[:9]
        assert not start.startswith((b"PK", b"\x80")), path
        assert path.suffix == ".json" or start[8:9] == b"{", path


def test_every_changed_byte_is_noticed(runs, tmp_path):
    original = driver.checkpoint_at(runs / "zero2", driver.TOTAL_STEPS)
    folder = shutil.copytree(original, tmp_path / "copy.ckpt")
    check_sharded_checkpoint(folder)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in torch.randint(len(content), (5,), generator=generator).tolist():
            changed = bytearray(content)
            changed[position] ^= 1 << (position % 8)
            path.write_bytes(changed)
            with pytest.raises(UserError, match=path.name):
                consolidated_state_dict(folder)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=path.name):
            consolidated_state_dict(folder)
        path.unlink()
        with pytest.raises(UserError, match=path.name):
            consolidated_state_dict(folder)
        path.write_bytes(content)
    check_sharded_checkpoint(folder)


def test_a_failing_process_leaves_no_checkpoint_and_no_waiting_ones(runs):
    results = json.loads((runs / "zero2" / "results.json").read_text())
    assert results["failed_save"]["exists"] is False
    assert "another process failed" in results["failed_save"]["error"]
    assert not list((runs / "zero2" / "checkpoints").glob(".*"))


def test_foreign_folders_are_refused_unread(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = tmp_path / "foreign.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / "checkpoint" / name).write_bytes(pickle.dumps(Payload()))
    (folder / "latest").write_text("checkpoint")
    assert not is_sharded_checkpoint(folder)
    with pytest.raises(UserError, match="not a checkpoint written by genlight") as caught:
        consolidated_state_dict(folder)
    assert "\n" not in str(caught.value)
    from genlight.trainer.deepspeed_engine import safe_checkpoint_engine

    with pytest.raises(UserError):
        safe_checkpoint_engine().load(str(folder / "checkpoint" / "mp_rank_00_model_states.pt"))
    assert not (tmp_path / "executed").exists()


def test_other_numbers_of_processes_and_stages_are_refused():
    from genlight.trainer.strategies import DeepSpeedCPUStrategy

    strategy = DeepSpeedCPUStrategy(stage=3)
    strategy._check_layout(Path("x.ckpt"), {"world_size": 1, "stage": 3})
    with pytest.raises(
        UserError, match=r"x\.ckpt was written by 4 processes under ZeRO-3, this run has 1 under ZeRO-3"
    ):
        strategy._check_layout(Path("x.ckpt"), {"world_size": 4, "stage": 3})
    with pytest.raises(UserError, match="under ZeRO-2"):
        strategy._check_layout(Path("x.ckpt"), {"world_size": 1, "stage": 2})


def test_what_deepspeed_keeps_survives_encoding():
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    from genlight.trainer.deepspeed_engine import decode, encode

    scaler = DynamicLossScaler(2.0**9, 300, 0.5, 2, True, raise_error_at_min_scale=False, dtype=torch.bfloat16)
    scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 7, 6, 1
    state = {
        "loss_scaler": scaler,
        "static": LossScaler(scale=4.0),
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"w": fragment_address(numel=3, start=5)}],
        "groups": [torch.arange(3.0)],
    }
    found = decode(encode(state))
    assert type(found["loss_scaler"]) is DynamicLossScaler and vars(found["loss_scaler"]) == vars(scaler)
    assert type(found["static"]) is LossScaler and vars(found["static"]) == vars(state["static"])
    assert found["zero_stage"] == ZeroStageEnum.gradients
    assert found["param_slice_mappings"] == state["param_slice_mappings"]
    assert torch.equal(found["groups"][0], state["groups"][0])


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_plain_state_is_unchanged_by_encoding(value):
    from genlight.trainer.deepspeed_engine import decode, encode

    assert decode(encode(value)) == value


@pytest.mark.parametrize("value", [object(), print, {1, 2}, {"a": [time.sleep]}])
def test_other_objects_are_refused(value):
    from genlight.trainer.deepspeed_engine import encode

    with pytest.raises(TypeError, match="cannot save"):
        encode(value)


def test_unknown_tags_are_refused():
    from genlight.trainer.deepspeed_engine import decode

    with pytest.raises(ValueError, match="unknown kind"):
        decode({"__deepspeed__": "os.system", "command": "true"})
    with pytest.raises(ValueError, match="unknown field"):
        decode({"__deepspeed__": "LossScaler", "__class__": 1})
    with pytest.raises(ValueError, match="unknown dtype"):
        decode({"__deepspeed__": "dtype", "name": "load"})
