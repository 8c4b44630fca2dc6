"""The network that a calibration takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genlight.loops.quantization_settings import network_of
from genlight.quantization.observers import InputObserver
from genlight.quantization.statistics import StatisticsSettings


class Network(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Generator:
    """Its network is compiled where a module would do it."""

    def __init__(self) -> None:
        self.net, self.compiled = Network(), False

    def configure_model(self) -> None:
        if not self.compiled:
            self.net.compile(backend="eager")
            self.compiled = True

    def sample_latents(self, *_: Any) -> None:
        """Never called here."""


@torch.no_grad()
@pytest.mark.parametrize("calls", [(), (4, 3)], ids=["fresh", "compiled for any batch"])
def test_a_compiled_network_is_observed_layer_by_layer(calls: tuple[int, ...]) -> None:
    """Code that was compiled before would run without the hooks, and is not compiled again."""
    module = Generator()
    for batch in calls:
        module.configure_model()
        module.net(torch.zeros(batch, 4))
    with pytest.warns(UserWarning, match="module.compile=true"):
        network = network_of(module)
    module.configure_model()
    with InputObserver(network, ["first", "second"], StatisticsSettings()) as observer:
        network(torch.ones(2, 4))
    assert [entry.rows for entry in observer.statistics.values()] == [2, 2]
    assert network_of(module) is network
