"""Where the moving average of the weights lies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from genlight.callbacks.ema import EMAWeightAveraging


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
