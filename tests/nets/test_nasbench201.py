"""The networks of NAS-Bench-201 have the parameters, the FLOPs and the wiring that the benchmark published."""

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from genlight.nets.nasbench201 import (
    EDGES,
    OPERATIONS,
    Cell,
    NASBench201Network,
    arch_string,
    index_of,
    parse_arch,
    published_flops,
)

FIRST = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|skip_connect~2|"


def table() -> dict[str, np.ndarray]:
    path = Path(os.environ.get("GENLIGHT_DATA", "none")) / "nasbench" / "nasbench201.npz"
    if not path.is_file():
        pytest.skip("needs nasbench/nasbench201.npz below GENLIGHT_DATA")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files if name.endswith(("arch_ops", "params_m", "flops_m"))}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_first_cell_has_the_published_sizes() -> None:
    network = NASBench201Network(FIRST)
    assert parse_arch(FIRST) == (4, 2, 1, 2, 1, 1)
    assert parameters(network) == 129_306
    assert published_flops(network, 32) == 17_958_592
    assert published_flops(NASBench201Network(FIRST, num_classes=120), 16) == 4_497_472
    assert network.training and network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(("dataset", "classes", "size"), [("cifar10", 10, 32), ("cifar100", 100, 32)])
def test_random_cells_have_the_sizes_of_the_table(dataset: str, classes: int, size: int) -> None:
    columns = table()
    for index in np.random.default_rng(0).choice(15_625, 100 if classes == 10 else 10, replace=False):
        network = NASBench201Network(columns["arch_ops"][index], classes)
        # the table is in single precision
        assert np.float32(parameters(network) / 1e6) == pytest.approx(columns[f"{dataset}__params_m"][index], rel=2e-7)
        found = np.float32(published_flops(network, size) / 1e6)
        assert found == pytest.approx(columns[f"{dataset}__flops_m"][index], rel=2e-7)


def test_strings_and_operations_are_one_to_one() -> None:
    cells = list(product(range(5), repeat=6))
    names = [arch_string(cell) for cell in cells]
    assert len(set(names)) == 15_625
    assert [parse_arch(name) for name in names] == cells


def test_index_string_and_operations_round_trip() -> None:
    operations = table()["arch_ops"]
    assert arch_string(operations[0]) == FIRST
    for index in np.random.default_rng(1).choice(15_625, 100, replace=False):
        assert index_of(parse_arch(arch_string(operations[index])), operations) == index
    with pytest.raises(ValueError, match=r"holds the cell .* 0 times"):
        index_of(operations[0], operations[1:])


@pytest.mark.parametrize(
    "text", ["", "|none~0|", FIRST.replace("avg", "max"), FIRST.replace("~2", "~0"), FIRST + "|", "|none~0|" * 6]
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must name one of none, skip_connect"):
        parse_arch(text)


@pytest.mark.parametrize("operations", [(0, 1, 2), (0, 0, 0, 0, 0, 5), (-1, 0, 0, 0, 0, 0)])
def test_other_operations_are_refused(operations: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be 6 numbers from 0 to 4"):
        NASBench201Network(operations)


def cell(**edges: str) -> Cell:
    """A cell with the named edges, such as e01="skip_connect", and no other."""
    named = [edges.get(f"e{source}{target}", "none") for source, target in EDGES]
    return Cell([OPERATIONS.index(name) for name in named], 2)


def test_wiring_of_a_cell() -> None:
    x = torch.randn(3, 2, 5, 5)
    skip = "skip_connect"
    assert torch.equal(cell(e03=skip)(x), x)
    assert torch.equal(cell(e01=skip, e13=skip)(x), x)
    assert torch.equal(cell(e02=skip, e23=skip)(x), x)
    assert torch.equal(cell(e01=skip, e12=skip, e23=skip)(x), x)
    for unreachable in (
        cell(e01=skip, e02=skip, e12=skip),
        cell(e13=skip, e23=skip, e12=skip),
        cell(e01=skip, e23=skip),
    ):
        assert torch.equal(unreachable(x), torch.zeros_like(x))
    # of n nodes before it each node takes the sum: 1, 1 + 1, 1 + 1 + 2
    torch.testing.assert_close(Cell([1] * 6, 2)(x), 4 * x)
    constant = torch.full((1, 2, 5, 5), 3.0)
    torch.testing.assert_close(Cell([4] * 6, 2)(constant), 4 * constant)


def test_convolution_comes_after_relu_and_before_normalisation() -> None:
    torch.manual_seed(0)
    one = cell(e03="nor_conv_3x3")
    x = torch.randn(4, 2, 6, 6)
    _, convolution, norm = one.operations[0]
    expected = nn.functional.conv2d(x.clamp(min=0), convolution.weight, padding=1)
    mean, variance = expected.mean((0, 2, 3), keepdim=True), expected.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(one(x), (expected - mean) / (variance + norm.eps).sqrt())


def test_counting_leaves_the_network_as_it_was() -> None:
    network = NASBench201Network(FIRST, 4, channels=4, cells_per_stage=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    published_flops(network, 8)
    assert network.training and not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
