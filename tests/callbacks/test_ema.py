"""Where the moving average of the weights lies."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from genlight.callbacks.ema import EMAWeightAveraging


@pytest.mark.parametrize(("options", "device"), [({}, "meta"), ({"device": "cpu"}, "cpu")])
def test_the_average_lies_on_the_device_that_trains_or_where_it_is_told(options: dict[str, Any], device: str) -> None:
    """The module itself is still on the CPU when callbacks are set up."""
    module = LightningModule()
    module.layer = torch.nn.Linear(2, 2)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    callback = EMAWeightAveraging(decay=0.5, **options)
    callback.setup(trainer, module, "fit")
    assert callback._average_model is not None
    assert {parameter.device.type for parameter in callback._average_model.parameters()} == {device}
    assert module.layer.weight.device.type == "cpu"
