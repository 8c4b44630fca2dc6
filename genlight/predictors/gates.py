"""GATES: a cell encoded by passing information along its edges, which the operations on them gate.

Ning et al., "A Generic Graph-based Neural Architecture Encoding Scheme for Predictor-based NAS", ECCV 2020
(arXiv 2004.01899), section 3.2, for cells with operations on edges.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from genlight.nets.nasbench201 import EDGES


class GATES(nn.Module):
    """Operations on the edges of a cell, int64 [N, edges], to the information at its last node, [N, width].

    In each layer the states of the nodes are projected, P = X W, and node j gets the sum over its edges of P_i times
    a gate, sigmoid of a linear map of the operation's embedding, which is 0 for operation 0 ("none"). The input node
    keeps its own P. A ReLU stands between layers.

    Args:
        vocabulary: the number of operations, for each edge.
        embedding: width of an operation's vector.
        width: of the states.
        depth: number of layers, at least as many as the longest path has edges.
        edges: (from, to) of each operation; nodes are numbered from 0, the input, to the output.

    Raises:
        ValueError: edges or vocabulary that do not fit together, or too few layers.
    """

    def __init__(
        self,
        vocabulary: Sequence[int],
        embedding: int,
        width: int,
        depth: int,
        edges: Sequence[tuple[int, int]] = EDGES,
    ) -> None:
        super().__init__()
        if len(vocabulary) != len(edges) or len(set(vocabulary)) != 1:
            raise ValueError(
                f"encoder gates needs an operation of one vocabulary for each of {len(edges)} edges, "
                f"the tokens have {list(vocabulary)} values"
            )
        self.edges, self.nodes = tuple(edges), 1 + max(target for _, target in edges)
        if depth < self.nodes - 1:
            raise ValueError(f"depth = {depth} must be at least {self.nodes - 1}, the length of the longest path")
        self.operations = nn.Parameter(torch.randn(vocabulary[0], embedding))
        self.start = nn.Parameter(torch.randn(width))
        bound = width**-0.5
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty(width, width).uniform_(-bound, bound)) for _ in range(depth)
        )
        self.gates = nn.ModuleList(nn.Linear(embedding, width) for _ in range(depth))
        self.register_buffer("passes", (torch.arange(vocabulary[0]) > 0).float().unsqueeze(1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        chosen = nn.functional.one_hot(tokens, len(self.operations)).to(self.operations.dtype)  # [N, edges, operations]
        empty = (chosen[:, :1, 0] * 0).unsqueeze(1) * self.start  # [N, 1, width]
        states = torch.cat([empty + self.start] + [empty] * (self.nodes - 1), dim=1)
        for layer, (weight, gate) in enumerate(zip(self.weights, self.gates)):
            projected = (torch.relu(states) if layer else states) @ weight
            gated = chosen @ (torch.sigmoid(gate(self.operations)) * cast(Tensor, self.passes))  # [N, edges, width]
            arriving = [projected[:, 0], *[torch.zeros_like(projected[:, 0])] * (self.nodes - 1)]
            for edge, (source, target) in enumerate(self.edges):
                arriving[target] = arriving[target] + gated[:, edge] * projected[:, source]
            states = torch.stack(arriving, dim=1)
        return states[:, -1]
