"""Where the moving average of the weights lies, and what it is until its first update."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, callbacks
from oracles.toy_training import ToyModule, quiet, train

from genlight.callbacks.ema import EMAWeightAveraging
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

quiet()


def set_up(module: LightningModule, trained_on: str, **options: Any) -> EMAWeightAveraging:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(trained_on)))
    callback = EMAWeightAveraging(**options)
    callback.setup(trainer, module, "fit")
    return callback


@pytest.mark.parametrize(("options", "device"), [({}, "meta"), ({"device": "cpu"}, "cpu")])
def test_the_average_lies_on_the_device_that_trains_or_where_it_is_told(options: dict[str, Any], device: str) -> None:
    """The module itself is still on the CPU when callbacks are set up."""
    module = LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    callback = set_up(module, "meta", decay=0.5, **options)
    assert callback._average_model is not None
    assert {parameter.device.type for parameter in callback._average_model.parameters()} == {device}
    assert module.layer.weight.device.type == "cpu"


def test_a_ramp_forgets_the_beginning_and_a_resumed_run_keeps_its_count() -> None:
    module, trainer = LightningModule(), SimpleNamespace()
    module.weight = torch.nn.Parameter(torch.zeros(1))
    callback, expected = set_up(module, "cpu", decay=0.3, ramp=True), 0.0
    for updates in range(6):
        module.weight.data.fill_(updates + 1.0)
        share = min(0.3, (1 + updates) / (10 + updates)) if updates else 0.0  # the first update copies the weights
        expected = share * expected + (1 - share) * (updates + 1.0)
        assert callback._average_model is not None
        callback._average_model.update_parameters(module)
        checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
        callback.on_save_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
        callback = set_up(module, "cpu", decay=0.3, ramp=True)
        callback.on_load_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
        assert float(checkpoint["state_dict"]["weight"]) == pytest.approx(expected)


def fit(
    folder: Path, *averaging: callbacks.WeightAveraging, steps: int, resume: Path | None = None
) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """The first weights of each validation, one after every second step, and all weights in the end."""
    seen, module = [], ToyModule()
    weight = module.net[0].weight
    module.on_validation_epoch_start = lambda: seen.append(weight[0].tolist())  # type: ignore[method-assign]
    options = {"max_steps": steps, "val_check_interval": 2, "num_sanity_val_steps": 0}
    train(folder, averaging=averaging, module=module, resume=resume, **options)
    return seen, {name: value.clone() for name, value in module.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_until_its_first_update_the_average_is_the_trained_weights(tmp_path: Path) -> None:
    """In validations, in checkpoints, in the end, and in the end of a run that was resumed before it or at it."""
    seen, trained = fit(tmp_path / "plain", steps=3)
    averaging = EMAWeightAveraging(update_starting_at_step=100)
    found, ended = fit(tmp_path / "averaged", averaging, steps=3)
    assert same(ended, trained) and found == seen and not same(ended, ToyModule().state_dict())
    for step in (2, 3):
        (path,) = (tmp_path / "averaged").glob(f"*step={step}.ckpt")
        checkpoint = AtomicCheckpointIO().load_checkpoint(path)
        assert same(checkpoint["state_dict"], checkpoint["current_model_state"])
        assert int(checkpoint["averaging_state"]["n_averaged"]) == 0
        averaging = EMAWeightAveraging(update_starting_at_step=100)
        _, resumed = fit(tmp_path / "resumed", averaging, steps=3, resume=path)
        assert same(resumed, trained)


@pytest.mark.parametrize("options", [{}, {"use_buffers": False}, {"update_every_n_steps": 3}])
def test_after_its_first_update_it_is_lightnings(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"decay": 0.9, "update_starting_at_step": 3, **options}
    seen, ended = fit(tmp_path / "own", EMAWeightAveraging(**options), steps=8)
    expected, end = fit(tmp_path / "lightning", callbacks.EMAWeightAveraging(**options), steps=8)
    assert same(ended, end)
    assert seen[0] != expected[0] and seen[-2:] == expected[-2:]
