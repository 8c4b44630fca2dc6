"""Networks of NAS-Bench-201 (Dong & Yang 2020; topology space of NATS-Bench): six operations make a cell, fifteen cells
a network.

A cell has four nodes. Node j is the sum over i < j of an operation applied to node i; node 0 is the input of the cell,
node 3 its output. The skeleton is a 3x3 stem, three stages of cells with 16, 32 and 64 channels, a residual block of
stride 2 between stages, and mean pooling (section 2.1 and figure 1 of the paper).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# (from, to), in the order of the architecture strings and of the tables
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))


def arch_string(operations: Sequence[int]) -> str:
    """The benchmark's name of a cell, such as ``|none~0|+|none~0|none~1|+|none~0|none~1|skip_connect~2|``.

    Raises:
        ValueError: not six indices of `OPERATIONS`.
    """
    edges = zip(EDGES, _checked(operations), strict=True)
    nodes: dict[int, list[str]] = {1: [], 2: [], 3: []}
    for (source, target), operation in edges:
        nodes[target].append(f"{OPERATIONS[operation]}~{source}")
    return "+".join(f"|{'|'.join(entries)}|" for entries in nodes.values())


def parse_arch(text: str) -> tuple[int, ...]:
    """The six operations of an architecture string, as indices of `OPERATIONS` in the order of `EDGES`.

    Raises:
        ValueError: not a string of the form of `arch_string`.
    """
    names = re.findall(r"([a-z0-9_]+)~\d", text)
    if set(names) <= set(OPERATIONS) and len(names) == len(EDGES):
        operations = tuple(OPERATIONS.index(name) for name in names)
        if arch_string(operations) == text:
            return operations
    raise ValueError(
        f"arch = {text!r} must name one of {', '.join(OPERATIONS)} for each edge, as "
        f"{arch_string((3, 1, 3, 0, 1, 3))!r} does"
    )


def index_of(operations: Sequence[int], table: NDArray[Any]) -> int:
    """The benchmark's index of a cell.

    Args:
        operations: six indices of `OPERATIONS`.
        table: [cells, 6], the operations of every cell in the order of the benchmark, which follows no rule.

    Raises:
        ValueError: the table does not hold the cell exactly once.
    """
    found = np.flatnonzero((np.asarray(table) == np.asarray(_checked(operations))).all(axis=1))
    if len(found) != 1:
        raise ValueError(f"table holds the cell {arch_string(operations)} {len(found)} times; it must hold it once")
    return int(found[0])


def _checked(operations: Sequence[int]) -> tuple[int, ...]:
    checked = tuple(int(operation) for operation in operations)
    if len(checked) != len(EDGES) or not all(0 <= operation < len(OPERATIONS) for operation in checked):
        raise ValueError(f"operations = {list(checked)} must be {len(EDGES)} numbers from 0 to {len(OPERATIONS) - 1}")
    return checked


def _relu_conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _operation(index: int, channels: int) -> nn.Module:
    match OPERATIONS[index]:
        case "skip_connect":
            return nn.Identity()
        case "nor_conv_1x1":
            return _relu_conv_norm(channels, channels, 1)
        case "nor_conv_3x3":
            return _relu_conv_norm(channels, channels, 3)
        case _:
            return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Cell(nn.Module):
    """One cell: [B, channels, H, W] to the same shape. An edge with "none" is left out; a node without edges is 0."""

    def __init__(self, operations: Sequence[int], channels: int) -> None:
        super().__init__()
        used = {edge: op for edge, op in zip(EDGES, _checked(operations), strict=True) if OPERATIONS[op] != "none"}
        self.edges = tuple(used)
        self.operations = nn.ModuleList(_operation(op, channels) for op in used.values())

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for node in (1, 2, 3):
            total = torch.zeros_like(x)
            for (source, target), operation in zip(self.edges, self.operations, strict=True):
                if target == node:
                    total = total + operation(nodes[source])
            nodes.append(total)
        return nodes[-1]


class ReductionBlock(nn.Module):
    """Halves height and width and doubles the channels, by a residual block of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _relu_conv_norm(in_channels, out_channels, 3, stride=2), _relu_conv_norm(out_channels, out_channels, 3)
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x) + self.shortcut(x)
        return out


class NASBench201Network(nn.Module):
    """The network of a cell: [B, 3, H, W] to logits [B, num_classes].

    Args:
        operations: six indices of `OPERATIONS` in the order of `EDGES`, or an architecture string.
        num_classes: 10, 100 and 120 in the benchmark.
        channels: of the first stage.
        cells_per_stage: cells in each of the three stages.

    Raises:
        ValueError: no cell of the space, or a size below 1.
    """

    def __init__(
        self,
        operations: Sequence[int] | str,
        num_classes: int = 10,
        channels: int = 16,
        cells_per_stage: int = 5,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_classes", num_classes),
            ("channels", channels),
            ("cells_per_stage", cells_per_stage),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        cell = parse_arch(operations) if isinstance(operations, str) else _checked(operations)
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        body: list[nn.Module] = []
        for stage in range(3):
            if stage:
                body.append(ReductionBlock(channels, 2 * channels))
                channels *= 2
            body += [Cell(cell, channels) for _ in range(cells_per_stage)]
        self.body = nn.Sequential(*body)
        self.last = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.pool(self.last(self.body(self.stem(x))))
        logits: Tensor = self.head(features.flatten(1))
        return logits


def published_flops(network: NASBench201Network, image_size: int) -> int:
    """FLOPs of one image as the benchmark counts them.

    Multiply-accumulates of convolutions and of the linear layer (without its bias), one for each element of a ReLU, two
    for each of a batch normalisation, the window for each output of a pooling, where the window of the global one is
    taken to be larger by one than the image.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        match module:
            case nn.Conv2d():
                total += output.numel() * module.weight[0].numel()
            case nn.Linear():
                total += module.weight.numel()
            case nn.BatchNorm2d():
                total += 2 * output.numel()
            case nn.ReLU():
                total += output.numel()
            case nn.AvgPool2d(kernel_size=int(side)):
                total += output.numel() * side**2
            case nn.AdaptiveAvgPool2d():
                total += output.numel() * (args[0].shape[-1] + 1) ** 2

    handles = [module.register_forward_hook(count) for module in network.modules()]
    training = network.training
    try:
        with torch.no_grad():
            weight = network.head.weight
            network.eval()(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return total
