"""Norm, modulation and GELU taken into the kernel: where, where not, and that the network stays the same function."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from quantization.kernels.kernel_device import DEVICE, MARKS
from quantization.tiny_pixart import PIXART
from torch import Tensor, fx, nn
from torch.nn import functional

from genlight.quantization.balance import Balance
from genlight.quantization.convert import quantizable_layers, quantize_layer, replace_layers
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.fusion import fuse_rows, share_balances
from genlight.quantization.hadamard import random_rotation

pytestmark = MARKS
WIDTH = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def quantized(outputs: int = WIDTH, form: LayerFormat | None = None, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    balance = Balance(randn(WIDTH, seed=7).exp().cpu(), random_rotation(WIDTH, "block", 3))
    return quantize_layer(nn.Linear(WIDTH, outputs), form or LayerFormat(), balance=balance).to(DEVICE)


def rewritten(network: nn.Module, *inputs: Any, **options: Any) -> tuple[Any, int, int]:
    """The output of the rewritten graph; how many calls of the kernel it has, and how many took something in."""
    found: list[tuple[int, int]] = []

    def backend(graph: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        count = fuse_rows(graph)
        found.append((sum("row_codes" in str(node.target) for node in graph.graph.nodes), count))
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        output = torch.compile(network, backend=backend, fullgraph=True)(*inputs, **options)
    assert len(found) == 1
    return output, *found[0]


def close(found: Tensor, expected: Tensor) -> bool:
    """But for codes that fell to the other side of a tie."""
    far = (found - expected).abs() > 2e-5 * expected.abs().max()
    return bool(far.float().mean() < 0.05) and bool((found - expected).abs().max() < 0.05 * expected.abs().max())


class Block(nn.Module):
    """A transformer's block without its attention, in some variants that a network may have."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=change == "affine")
        self.first, self.second, self.third = quantized(), quantized(seed=2), quantized(seed=3)
        self.last_norm, self.last = nn.RMSNorm(WIDTH), quantized(seed=4)
        self.dropout = nn.Dropout(0.1)
        if change == "affine":
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.eval().to(DEVICE)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = condition.chunk(2, dim=1)
        if self.change == "by token":
            shift, scale = shift.expand_as(x), scale.expand_as(x)
        if self.change == "one scale":
            scale = scale[:1]
        x = x.clone()
        y = self.norm(x)
        kept = y.sum() if self.change == "read again" else 0.0
        y = shift + y * (scale + 1) if self.change == "turned" else y * (1 + scale) + shift
        if self.change == "written between":
            x += 1
        z = self.first(y)
        if self.change == "written within":
            x += 1
        z = z + self.second(y) + kept + x.mean()
        if self.change == "written after":
            z += 1
        z = self.third(self.dropout(functional.gelu(z, approximate="none" if self.change == "exact" else "tanh")))
        return self.last(self.last_norm(z.bfloat16().float()) if self.change == "cast" else self.last_norm(z))


@pytest.mark.parametrize(
    ("change", "kernels", "took"),
    [
        ("", 3, 3),
        ("affine", 3, 3),
        ("turned", 3, 3),
        ("exact", 3, 3),
        ("cast", 3, 3),
        # the modulation alone, without the norm before it
        ("read again", 3, 3),
        # these modulations are no scale and shift of a sample
        ("by token", 3, 2),
        ("one scale", 3, 2),
        ("written after", 3, 3),
        # between the norm and the kernel
        ("written between", 3, 2),
        # between the two layers that read one input, and between the norm and the second of them
        ("written within", 4, 2),
    ],
)
def test_what_stands_before_a_kernel_goes_into_it(change: str, kernels: int, took: int) -> None:
    block, x, condition = Block(change), 2 * randn(3, 5, WIDTH) + 1, randn(3, 2, WIDTH, seed=1)
    share_balances(block)
    with torch.no_grad():
        expected = block(x, condition)
    found, *counts = rewritten(block, x, condition)
    assert counts == [kernels, took] and close(found, expected)


def test_an_input_is_rounded_once_where_shapes_may_change() -> None:
    block, x, condition = Block(), randn(3, 5, WIDTH), randn(3, 2, WIDTH, seed=1)
    share_balances(block)
    for given in (x, condition):
        torch._dynamo.mark_dynamic(given, 0)
    found, kernels, _ = rewritten(block, x, condition)
    assert kernels == 3 and close(found, block(x, condition))


def test_inputs_are_rounded_apart_where_balances_differ() -> None:
    block = Block()
    assert block.second.input_scale is not None
    block.second.input_scale = 2 * block.second.input_scale  # type: ignore[operator]
    share_balances(block)
    x, condition = randn(2, 5, WIDTH), randn(2, 2, WIDTH, seed=1)
    found, kernels, took = rewritten(block, x, condition)
    # the norm is read twice then, and stays
    assert (kernels, took) == (4, 2) and close(found, block(x, condition))


def test_shared_balances_are_the_same_tensors_and_change_nothing() -> None:
    layers = nn.ModuleList([quantized(), quantized(seed=2), quantized(8)])
    before = [layer(randn(3, WIDTH)) for layer in layers]
    share_balances(layers)
    assert len({id(layer.input_scale) for layer in layers}) == len({id(layer.rotation_signs) for layer in layers}) == 1
    assert all(torch.equal(layer(randn(3, WIDTH)), output) for layer, output in zip(layers, before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_loses_about_what_it_does_without(dtype: torch.dtype) -> None:
    """What lies between is not rounded to the type of the network any more."""
    block, x, condition = Block("affine"), randn(4, 16, WIDTH), randn(4, 2, WIDTH, seed=1)
    with torch.no_grad():
        exact = block(x, condition)
        block = block.to(dtype)
        share_balances(block)
        plain = block(x.to(dtype), condition.to(dtype)).float()
    found, kernels, took = rewritten(block, x.to(dtype), condition.to(dtype))
    assert (kernels, took) == (3, 3) and found.dtype == dtype
    assert float((found.float() - exact).square().mean()) < 1.5 * float((plain - exact).square().mean())


def convert(network: nn.Module, keep: tuple[str, ...]) -> nn.Module:
    """All layers of the blocks in W4A8, with the same balance for layers of the same width."""
    layers = {}
    form = LayerFormat(WeightFormat(4), ActivationFormat(8))
    for name, layer in quantizable_layers(network).items():
        if isinstance(layer, nn.Linear) and "blocks" in name and not any(word in name for word in keep):
            scale = randn(layer.in_features, seed=layer.in_features).exp().cpu()
            balance = Balance(scale, random_rotation(layer.in_features, "block", 0))
            layers[name] = quantize_layer(layer, form, balance=balance)
    replace_layers(network, layers)
    network = network.eval().to(DEVICE)
    share_balances(network)
    return network


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    conditions = {"resolution": None, "aspect_ratio": None}
    inputs = {"hidden_states": randn(2, 1, 8, 8), "encoder_hidden_states": randn(2, 3, 32, seed=1)}
    network = diffusers.PixArtTransformer2DModel(**(PIXART | {"num_layers": 1}))
    return network, {**inputs, "timestep": torch.tensor([7, 7], device=DEVICE), "added_cond_kwargs": conditions}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.DiTTransformer2DModel(
        2, 16, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    time = {"timestep": torch.tensor([7, 3], device=DEVICE), "class_labels": torch.tensor([1, 4], device=DEVICE)}
    return network, {"hidden_states": randn(2, 4, 8, 8), **time}


def wan() -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=1,
    )  # fmt: skip
    inputs = {"hidden_states": randn(1, 4, 1, 8, 8), "encoder_hidden_states": randn(1, 5, 16, seed=1)}
    return network, {**inputs, "timestep": torch.tensor([7], device=DEVICE)}


@pytest.mark.parametrize(
    ("family", "kernels", "took"),
    [
        # both modulated norms and the GELU; of ten layers, three and two read one input
        (pixart, 7, 3),
        # the same, and no cross-attention
        (dit, 4, 3),
        # and the norm before cross-attention
        (wan, 7, 4),
    ],
)
def test_networks_of_diffusers_are_fused_as_they_are(
    family: Callable[[], tuple[nn.Module, dict[str, Any]]], kernels: int, took: int
) -> None:
    torch.manual_seed(0)
    network, options = family()
    network = convert(network, ("norm", "embed"))
    with torch.no_grad():
        expected = network(**options, return_dict=False)[0]
    found, *counts = rewritten(network, **options, return_dict=False)
    assert counts == [kernels, took]
    assert float((found[0] - expected).square().mean() / expected.square().mean()) < 1e-3
