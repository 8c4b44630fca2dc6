"""Many networks of one shape as one: their parameters stacked, one kernel a layer for all of them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Stacked(nn.Module):
    """E networks of one shape, run at once on the same input: the output of network e is [e] of the result.

    Parameters keep their names, with a first dimension of E. Buffers must be equal in all networks.

    Args:
        networks: at least one; the first lends its structure, their parameters are copied.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        named = [dict(network.named_parameters()) for network in networks]
        self.network = networks[0]
        for name in named[0]:
            owner, _, last = name.rpartition(".")
            stacked = torch.stack([parameters[name].detach() for parameters in named])
            setattr(self.network.get_submodule(owner), last, nn.Parameter(stacked))

    def forward(self, *inputs: Tensor) -> Tensor:
        """[E, …], dropout drawn for each network on its own."""
        parameters: dict[str, Tensor] = dict(self.network.named_parameters())

        def one(own: dict[str, Tensor]) -> Tensor:
            return cast(Tensor, functional_call(self.network, own, inputs))

        return torch.vmap(one, randomness="different")(parameters)
