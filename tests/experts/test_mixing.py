"""Mixing along the expert axis against loops, in every type, and neurons in another order."""

import pytest
import torch
from experts.tiny_models import NAMES, block_inputs, tiny_model

from genlight.experts import mixing
from genlight.experts.editor import ExpertEditor
from genlight.experts.mixing import mix, reorder_neurons


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_mixture_is_the_sum_rounded_once(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_BLOCK", block)
    torch.manual_seed(0)
    tensor, matrix = torch.randn(6, 5, 4).to(dtype), torch.randn(3, 6)
    expected = torch.zeros(3, 5, 4, dtype=torch.float64)
    for j in range(3):
        for i in range(6):
            expected[j] += matrix[j, i].double() * tensor[i].double()
    mixed = mix(matrix, tensor)
    assert mixed.dtype == dtype
    # half a unit in the last place, and what float32 loses in the sum
    torch.testing.assert_close(mixed.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_selecting_takes_any_type_bit_for_bit_and_merging_refuses_quantized_ones() -> None:
    rows = torch.eye(4)[[2, 0]]
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float32):
        tensor = torch.randn(4, 3).to(dtype)
        assert torch.equal(mix(rows, tensor).view(torch.uint8), tensor[[2, 0]].view(torch.uint8))
    for dtype in (torch.uint8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="dequantise"):
            mix(rows * 0.5, torch.randn(4, 3).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_does_not_depend_on_the_order_of_its_neurons(name: str) -> None:
    editor = ExpertEditor(tiny_model(name))
    layer_name, layer = next(iter(editor.layers.items()))
    inputs = block_inputs(editor.model, editor)[layer_name]
    before = [layer.expert_output(e, inputs) for e in range(8)]
    neurons = layer.experts.down_proj.shape[1 if name == "gpt_oss" else 2]
    torch.manual_seed(3)
    orders = torch.stack([torch.randperm(neurons) for _ in range(8)])
    with torch.no_grad():
        for description in layer.family.tensors:
            tensor = getattr(layer.experts, description.name)
            moved = reorder_neurons(description, tensor.detach(), orders)
            assert description.neurons is None or not torch.equal(moved, tensor)
            tensor.copy_(moved)
    for e in range(8):
        torch.testing.assert_close(layer.expert_output(e, inputs), before[e], rtol=1e-4, atol=1e-5)
