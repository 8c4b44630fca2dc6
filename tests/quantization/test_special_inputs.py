"""Inputs of two kinds: found in the full network of SDXL, which has no weights here, and in small ones."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.convert import quantizable_layers
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.special_inputs import (
    balanced_ranges,
    concatenated_inputs,
    constant_positions,
    part_ranges,
    special_inputs,
    text_layers,
)
from genlight.quantization.trajectory import recorded_calls

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def run_sdxl(unet: nn.Module) -> None:
    with torch.device("meta"):
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 2048), added_cond_kwargs=conditions)


def test_sdxl_has_the_layers_that_were_counted() -> None:
    """794 layers, 9 shortcuts with their widths, and keys and values of 70 cross-attentions."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    layers = quantizable_layers(unet)
    kinds = [type(layer) for layer in layers.values()]
    assert (len(layers), kinds.count(nn.Linear), kinds.count(nn.Conv2d)) == (794, 743, 51)
    splits = concatenated_inputs(unet, lambda: run_sdxl(unet))
    widths = [1280] * 4 + [640] * 3 + [320] * 2
    names = [f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(3) for j in range(3)]
    assert splits == dict(zip(names, widths, strict=True))
    text = text_layers(unet, lambda: run_sdxl(unet))
    assert set(text) == {name for name in layers if name.endswith(("attn2.to_k", "attn2.to_v"))} and len(text) == 140


def test_an_unconditional_unet_has_shortcuts_and_no_text() -> None:
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    image = torch.zeros(1, 1, 8, 8)
    found = concatenated_inputs(unet, lambda: unet(image, 0))
    assert found == {f"up_blocks.{i}.resnets.{j}.conv_shortcut": s for i, j, s in [
        (0, 0, 16), (0, 1, 16), (1, 0, 16), (1, 1, 8)]}  # fmt: skip
    assert text_layers(unet, lambda: unet(image, 0)) == ()


def texts(count: int = 8) -> torch.Tensor:
    found = torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(0))
    found[:, 0] = torch.linspace(-1, 1, 16)
    found[:, 0, 3] = 200
    return found


def test_a_token_is_constant_where_it_is_the_same_and_large() -> None:
    found = texts()
    assert constant_positions(found) == (0,)
    chunked = torch.cat([found, found], dim=1)
    assert constant_positions(chunked) == (0, 5)
    # rows without text do not count, and neither does a small constant token
    assert constant_positions(torch.cat([found, torch.zeros(3, 5, 16)])) == (0,)
    small = found.clone()
    small[:, 0] = 1
    assert constant_positions(small) == ()
    other = found.clone()
    other[2, 0, 3] = 190
    assert constant_positions(other) == ()


def test_rounding_of_half_precision_makes_no_other_token() -> None:
    """Numbers of bfloat16 that are some units off, as from one batch to another."""
    found = texts().to(torch.bfloat16)
    found[3, 0] = (found[3, 0].float() * (1 + 2.0**-7)).to(torch.bfloat16)
    assert not torch.equal(found[3, 0], found[0, 0]) and constant_positions(found) == (0,)


def test_that_no_token_is_kept_is_said() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, sample: torch.Tensor, time: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
            return (sample + self.layer(encoder_hidden_states).mean(),)

    network, text = Reader(), texts()
    with recorded_calls(network) as calls:
        network(torch.zeros(8, 1, 2, 2), torch.zeros(8), text)
    assert special_inputs(network, calls, split=False, ratio=4.0).positions == (0,)
    with pytest.warns(UserWarning, match="constant_ratio = 400 times"):
        found = special_inputs(network, calls, split=False, ratio=400.0)
    assert found.positions == () and found.text == ()


def test_too_few_prompts_prove_nothing() -> None:
    for few in (texts(7), texts(1).expand(9, 5, 16)):
        try:
            constant_positions(few)
        except ValueError as error:
            assert "8 or more different prompts" in str(error)
        else:
            raise AssertionError("accepted")


def test_ranges_are_of_each_part_over_all_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    calls = [torch.tensor([[1.0, -2.0, 30.0, 4.0]]), torch.tensor([[-1.0, 2.0, 3.0, 40.0]])]
    parts = [lambda x: x[:, :2], lambda x: x[:, 2:]]
    found = part_ranges(model, {"0": parts}, [lambda: [model(call) for call in calls]])
    assert torch.equal(found["0"], torch.tensor([[[-2.0, 2.0]], [[3.0, 40.0]]]))
    found = part_ranges(model, {"0": parts}, [lambda: model(calls[0]), lambda: model(calls[1])])
    assert found["0"].tolist() == [[[-2.0, 1.0], [-1.0, 2.0]], [[4.0, 30.0], [3.0, 40.0]]]


def test_ranges_of_balanced_inputs_leave_constant_tokens_out() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Conv2d(4, 1, 1), nn.Linear(16, 1)

        def forward(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.image(sample) + self.text(encoder_hidden_states).mean(),)

    torch.manual_seed(0)
    network, image, text = Reader(), torch.randn(8, 4, 3, 3), texts()
    with recorded_calls(network) as calls:
        network(image[:4], text[:4])
        network(image[4:], text[4:])
    rotation = random_rotation(16, "full", 0)
    balances = {"image": Balance(torch.tensor([1.0, 2.0, 0.1, 4.0])), "text": Balance(None, rotation)}
    found = balanced_ranges(network, balances, calls, text=["text"], positions=[0])
    expected = {
        "image": balance_input(image, balances["image"], 1),
        "text": balance_input(text[:, 1:], balances["text"]),
    }
    by_step = balanced_ranges(network, balances, calls, text=["text"], positions=[0], places=[1, 0])
    for name, values in expected.items():
        assert torch.equal(found[name], torch.stack([values.min(), values.max()])[None, None])
        parts = [torch.stack(part.aminmax()) for part in (values[4:], values[:4])]
        assert torch.equal(by_step[name], torch.stack(parts)[None])
