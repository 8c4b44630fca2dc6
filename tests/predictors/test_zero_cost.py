"""Each zero-cost indicator has its closed form on a small network, and measuring leaves no trace."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from genlight.nets.nasbench201 import NASBench201Network
from genlight.predictors.zero_cost import NAMES, indicators

REPEATABLE = tuple(name for name in NAMES if name != "latency")
K = 1e-5


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 2


def linear(inputs: int = 5, outputs: int = 3, rows: int = 7) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=False), torch.randn(rows, inputs), torch.randn(rows, outputs)


def one(
    network: nn.Module, name: str, x: Any, target: Any, loss: Callable[..., Tensor] = squared, seed: int = 0
) -> float:
    return indicators(network, x, target, loss, [name], seed)[name]


def test_one_linear_layer_and_a_squared_loss() -> None:
    network, x, target = linear()
    w = network.weight.detach().double()
    x64, t64 = x.double(), target.double()
    output = x64 @ w.T
    g = (output - t64).T @ x64
    expected = {
        "grad_norm": g.norm(),
        "snip": (w * g).abs().sum(),
        "plain": (w * g).sum(),
        "fisher": 5 * (output * (output - t64)).square().mean(0).sum() / 2,
        "grasp": -(w * (g @ x64.T @ x64)).sum(),  # the Hessian maps V to V xᵀx
        "synflow": w.abs().sum().log(),
        "l2_norm": w.norm(),
        "parameters": 15.0,
        "flops": 15.0,
    }
    found = indicators(network, x, target, squared, list(expected))
    assert list(found) == list(expected)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


def test_one_convolution() -> None:
    torch.manual_seed(1)
    network, x, target = nn.Conv2d(2, 3, 1, bias=False), torch.randn(4, 2, 5, 5), torch.randn(4, 3, 5, 5)
    w = network.weight.detach()[:, :, 0, 0]
    output = torch.einsum("oc,bchw->bohw", w, x)
    by_channel = (output * (output - target)).sum((2, 3))
    found = indicators(network, x, target, squared, ["fisher", "synflow", "flops", "parameters", "grad_norm"])
    assert found["fisher"] == pytest.approx(2 * float(by_channel.square().mean(0).sum() / 2), rel=1e-4)
    assert found["synflow"] == pytest.approx(math.log(25 * float(w.abs().sum())), rel=1e-5)
    assert (found["flops"], found["parameters"]) == (150.0, 6.0)
    gradient = torch.einsum("bohw,bchw->oc", output - target, x)
    assert found["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_synflow_does_without_normalisation_and_signs() -> None:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    w1, b1 = network[0].weight.detach().abs(), network[0].bias.detach().abs()
    w2 = network[3].weight.detach().abs()
    # R = 1ᵀ|W2| (|W1| 1 + |b1|); a layer's weights carry what flows through them
    through_first = float((w2.sum(0) * w1.sum(1)).sum())
    through_second = through_first + float((w2.sum(0) * b1).sum())
    found = one(network, "synflow", torch.randn(8, 4), torch.zeros(8, 2))
    assert found == pytest.approx(math.log(through_first + through_second), rel=1e-5)


def test_synflow_exceeds_single_precision() -> None:
    network = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(20)))
    for layer in network:
        nn.init.constant_(layer.weight, 1e3)
    # 20 layers, each with the whole flow 4 · 4000²⁰
    expected = math.log(20) + math.log(4) + 20 * math.log(4000)
    assert one(network, "synflow", torch.ones(2, 4), torch.ones(2, 4)) == pytest.approx(expected)


def test_equal_jacobians_leave_one_eigenvalue() -> None:
    network, x, _ = linear(rows=7)
    expected = -(math.log(7 + K) + 1 / (7 + K) + 6 * (math.log(K) + 1 / K))
    assert one(network, "jacov", x, torch.zeros(7, 3)) == pytest.approx(expected, rel=1e-6)


def test_jacobian_scores_equal_numpy() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    x, labels = torch.randn(9, 6), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    inner, outer = network[0].weight.detach().double(), network[2].weight.detach().double()
    active = (x.double() @ inner.T + network[0].bias.detach().double() > 0).double()
    rows = ((active * outer.sum(0)) @ inner).numpy()
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(rows))
    found = indicators(network, x, labels, functional.cross_entropy, ["jacov", "epe_nas"])
    assert found["jacov"] == pytest.approx(-np.sum(np.log(eigenvalues + K) + 1 / (eigenvalues + K)), rel=1e-3)
    by_class = [np.log(np.abs(np.corrcoef(rows[3 * c : 3 * c + 3])) + K).sum() for c in range(3)]
    assert found["epe_nas"] == pytest.approx(np.abs(by_class).sum(), rel=1e-3)


def test_epe_nas_compares_many_classes() -> None:
    network, x, _ = linear(outputs=101, rows=6)
    labels = torch.tensor([0, 1, 1, 5, 5, 5])
    # equal Jacobians: log(1 + k) for each row after division by the number of rows
    expected = 2 * (1 + 1 + 2) * math.log(1 + K) / 3
    assert one(network, "epe_nas", x, labels, functional.cross_entropy) == pytest.approx(expected, rel=1e-6)


class Functional(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


def test_nwot_counts_shared_signs() -> None:
    torch.manual_seed(4)
    layer, x = nn.Linear(5, 40), torch.randn(6, 5)
    codes = (layer(x) > 0).int().numpy()
    kernel = (codes[:, None] == codes[None]).sum(2)
    expected = np.linalg.slogdet(kernel)[1]
    for network in (nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.ReLU(inplace=True)), Functional(layer)):
        assert one(network, "nwot", x, torch.zeros(6, 40)) == pytest.approx(expected)
    two = nn.Sequential(layer, nn.ReLU(), nn.Identity(), nn.SiLU())
    assert one(two, "nwot", x, torch.zeros(6, 40)) == pytest.approx(np.linalg.slogdet(2 * kernel)[1])


def test_zen_of_one_convolution() -> None:
    network, x = nn.Conv2d(2, 3, 3, padding=1), torch.zeros(4, 2, 6, 6)
    torch.manual_seed(11)
    weight, noise, step = torch.randn(3, 2, 3, 3), torch.randn(4, 2, 6, 6), torch.randn(4, 2, 6, 6)
    difference = 0.01 * functional.conv2d(step, weight, padding=1).abs().sum((1, 2, 3)).mean()
    assert one(network, "zen", x, x, seed=11) == pytest.approx(math.log(difference), rel=1e-4)
    # normalised, and pooled after it
    torch.manual_seed(11)
    normalised = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1))
    torch.manual_seed(11)
    assert torch.equal(torch.randn(3, 2, 3, 3), weight)
    first, second = (functional.conv2d(each, weight, padding=1) for each in (noise, noise + 0.01 * step))
    norm = [functional.batch_norm(each, None, None, training=True) for each in (first, second)]
    difference = (norm[0] - norm[1]).abs().sum((1, 2, 3)).mean()
    expected = math.log(difference) + math.log(math.sqrt(first.var((0, 2, 3)).mean()))
    assert one(normalised, "zen", x, x, seed=11) == pytest.approx(expected, rel=1e-4)


def test_latency_is_a_positive_time() -> None:
    network, x, target = linear()
    assert 0 < one(network, "latency", x, target) < 1000


class Mixed(nn.Module):
    """Everything that measuring could change: statistics, dropout, frozen weights, gradients, flags of single parts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3))
        self.head = nn.Linear(8, 4)
        self.body[0].weight.requires_grad_(False)
        self.body[1].eval()
        self.head.weight.grad = torch.ones(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def trace(network: nn.Module) -> list[Any]:
    digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in network.state_dict().values())).hexdigest()
    gradients = [None if p.grad is None else p.grad.tolist() for p in network.parameters()]
    flags = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in network.modules()
    ]
    return [digest, gradients, flags, [p.requires_grad for p in network.parameters()], torch.get_rng_state().tolist()]


def test_measuring_leaves_no_trace_and_repeats() -> None:
    torch.manual_seed(5)
    network, x, labels = Mixed(), torch.randn(12, 3, 6, 6), torch.arange(12) % 4
    before = trace(network)
    found = indicators(network, x, labels, functional.cross_entropy, NAMES, 3)
    assert trace(network) == before
    assert all(math.isfinite(value) for value in found.values()), found
    for name in REPEATABLE:
        assert one(network, name, x, labels, functional.cross_entropy, 3) == found[name], name
    assert one(network, "snip", x, labels, functional.cross_entropy, 4) != found["snip"]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_hidden_units_does_not_matter(seed: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    x, labels, order = torch.randn(8, 6), torch.arange(8) % 3, torch.randperm(24)
    moved = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    state = network.state_dict()
    moved.load_state_dict(
        {
            "0.weight": state["0.weight"][order],
            "0.bias": state["0.bias"][order],
            "2.weight": state["2.weight"][:, order],
            "2.bias": state["2.bias"],
        }
    )
    names = [name for name in REPEATABLE if name != "zen"]
    first, second = (indicators(n, x, labels, functional.cross_entropy, names) for n in (network, moved))
    assert second == pytest.approx(first, rel=1e-3, abs=1e-6)


def test_what_does_not_exist_is_nan() -> None:
    network, x, target = linear()
    twice = torch.cat([x[:1], x[:1], x[1:]])
    relu = nn.Sequential(nn.Linear(5, 3), nn.ReLU())
    assert math.isnan(one(relu, "nwot", twice, torch.zeros(8, 3)))
    nothing = indicators(network, x, target, squared, ["nwot", "epe_nas", "zen"])  # no activations, classes, positions
    assert all(map(math.isnan, nothing.values()))
    nn.init.zeros_(network.weight)
    zero = indicators(network, x, target, squared, ["synflow", "jacov", "snip", "grad_norm"])
    assert math.isnan(zero["synflow"]) and math.isnan(zero["jacov"]) and zero["snip"] == 0 and zero["grad_norm"] > 0
    nn.init.constant_(network.weight, math.inf)
    names = [name for name in REPEATABLE if name not in ("parameters", "flops", "zen")]
    assert all(map(math.isnan, indicators(network, x, target, squared, names).values()))
    embedding = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    words = indicators(embedding, torch.tensor([[0, 1], [2, 3]]), torch.tensor([0, 1]), functional.cross_entropy, NAMES)
    assert [name for name, value in words.items() if math.isnan(value)] == [
        "jacov",
        "epe_nas",
        "synflow",
        "nwot",
        "zen",
    ]


def test_a_cell_without_connection_has_no_gradient() -> None:
    network = NASBench201Network([3, 3, 3, 0, 0, 0], 4, channels=4, cells_per_stage=1)
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 4
    found = indicators(network, x, labels, functional.cross_entropy, REPEATABLE)
    assert [n for n, v in found.items() if math.isnan(v)] == ["jacov", "epe_nas", "synflow", "zen"]
    assert found["parameters"] > 0 and found["l2_norm"] > 0


def test_bad_input_is_refused() -> None:
    network, x, target = linear()
    with pytest.raises(ValueError, match="'fish' must be among grad_norm, snip"):
        indicators(network, x, target, squared, ["snip", "fish"])
    with pytest.raises(ValueError, match="a ReLU has no 2D convolution and no linear layer"):
        indicators(nn.ReLU(), x, x, squared, ["snip"])


def test_transformers_have_indicators() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(6)
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    network = ViTForImageClassification(config)
    x, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 0, 0, 1, 1, 1])
    found = indicators(network, x, labels, functional.cross_entropy, REPEATABLE)
    assert all(map(math.isfinite, found.values())), found
    assert found["parameters"] == network.num_parameters()
