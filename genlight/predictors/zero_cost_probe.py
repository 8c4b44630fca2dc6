"""What zero-cost indicators look at: a network, the arguments of one call of it, and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True, eq=False)
class Probe:
    """One network on one batch.

    Attributes:
        network: what is measured. Measurements change its buffers and flags: hand in a copy.
        args, kwargs: of one call of the network.
        loss: the training loss of the batch, a scalar; it calls the network.
        labels: class of each sample, int64 [B], where there are classes.
    """

    network: nn.Module
    args: tuple[Any, ...]
    loss: Callable[[], Tensor]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def source(self) -> Tensor | None:
        """The input that derivatives and noise go to: the first tensor [B, ...] of real numbers, if there is one."""
        return next((v for v in self._tensors() if v.is_floating_point() and v.ndim > 1), None)

    @property
    def batch_size(self) -> int:
        """Rows of the first argument that has any."""
        return next((len(v) for v in self._tensors() if v.ndim), 1)

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.network.parameters()).device

    def call(self, network: nn.Module, change: Callable[[Tensor], Tensor] = lambda value: value) -> Tensor:
        """The first output of a network of the same kind, with `change` applied to every tensor among the arguments."""
        args, kwargs = tree_map(
            lambda value: change(value) if isinstance(value, Tensor) else value, (self.args, dict(self.kwargs))
        )
        output = network(*args, **kwargs)
        first: Tensor = output if isinstance(output, Tensor) else output[0]
        return first

    def _tensors(self) -> list[Tensor]:
        return [value for value in tree_leaves((self.args, dict(self.kwargs))) if isinstance(value, Tensor)]


def layers(network: nn.Module) -> list[Layer]:
    """All 2D convolutions and linear layers, each once."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators of the CPU and of `device` start from `seed` inside, and go on outside as if nothing had been
    drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(seed)
        yield
