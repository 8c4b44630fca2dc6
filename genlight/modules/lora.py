"""Low-rank adapters of linear layers (Hu et al. 2022), kept apart from the network that they adapt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# of diffusers' attention blocks: what its own LoRA recipes adapt
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class LowRankAdapters(nn.Module):
    """Adds B A x to the outputs of linear layers of a frozen network, by hooks: its weights are never changed.

    Only the adapters are parameters here: so one network serves as teacher (see `off`) and as student. A is drawn as
    torch draws a linear layer's weights, B is zero.

    Args:
        network: the frozen network; it is no submodule.
        rank: rows of A.
        targets: endings of the names of the linear layers to adapt.

    Raises:
        ValueError: a rank below 1, or no layer of these names.
    """

    def __init__(self, network: nn.Module, rank: int = 64, targets: Sequence[str] = ATTENTION) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"module.lora_rank = {rank} must be at least 1")
        self.active = True
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        self.names: dict[str, str] = {}
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear) and any(name.endswith(f".{target}") for target in targets):
                self._adapt(name, layer, rank)
        self.config = {"rank": rank, "layers": sorted(self.names.values())}
        if not self.names:
            raise ValueError(f"module.lora_targets: the network has no linear layer named {', '.join(targets)}")

    def _adapt(self, name: str, layer: nn.Linear, rank: int) -> None:
        key = name.replace(".", "-")  # names of parameters hold no dots
        self.names[key] = name
        down = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.down[key], self.up[key] = nn.Parameter(down), nn.Parameter(torch.zeros(layer.out_features, rank))

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.active:
                return output
            low = nn.functional.linear(inputs[0], self.down[key].to(inputs[0].dtype))
            return output + nn.functional.linear(low, self.up[key].to(low.dtype)).to(output.dtype)

        layer.register_forward_hook(hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankAdapters:
        """A copy of the parameters alone, for averages; it adapts no network."""
        twin = LowRankAdapters.__new__(LowRankAdapters)
        nn.Module.__init__(twin)
        twin.active, twin.names, twin.config = False, dict(self.names), dict(self.config)
        for kind in ("down", "up"):
            values = {key: nn.Parameter(value.detach().clone()) for key, value in getattr(self, kind).items()}
            setattr(twin, kind, nn.ParameterDict(values))
        return twin

    @contextmanager
    def off(self) -> Iterator[None]:
        """The network as it was."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def tensors(self, prefix: str = "unet") -> dict[str, Tensor]:
        """The adapters under the names by which diffusers loads them: <prefix>.<layer>.lora_A.weight and lora_B."""
        result: dict[str, Tensor] = {}
        for key, name in self.names.items():
            for letter, values in (("A", self.down), ("B", self.up)):
                result[f"{prefix}.{name}.lora_{letter}.weight"] = values[key].detach().cpu().contiguous()
        return result
