"""What a quantized model takes, counted by hand."""

from pathlib import Path

import pytest
from quantization.tiny_pixart import call, converted, pixart
from torch import nn

from genlight.quantization.accounting import count_macs, model_cost
from genlight.quantization.convert import quantizable_layers, quantized_layers
from genlight.quantization.saving import save_quantized


def test_bits_bytes_and_operations_add_up(tmp_path: Path) -> None:
    plain, model = pixart(), converted(balanced=False)
    macs = count_macs(plain, lambda: call(plain))
    assert macs["transformer_blocks.0.attn1.to_q"] == 2 * 16 * 64 * 64
    assert macs["transformer_blocks.0.attn2.to_k"] == 2 * 3 * 64 * 64
    assert macs["pos_embed.proj"] == 2 * 16 * 64 * 4
    assert count_macs(model, lambda: call(model)) == macs
    before, after = model_cost(plain, macs), model_cost(model, macs)
    assert before.average_weight_bits == 16 and before.bit_operations == sum(macs.values()) * 256
    numbers = {name: layer.weight.numel() for name, layer in quantizable_layers(plain).items()}
    bits = {name: 4 if name in quantized_layers(model) else 16 for name in numbers}
    assert {name: cost.weights for name, cost in after.layers.items()} == numbers
    average = sum(numbers[name] * bits[name] for name in numbers) / sum(numbers.values())
    assert after.average_weight_bits == pytest.approx(average)
    cost = after.layers["transformer_blocks.0.attn1.to_q"]
    assert cost.bit_operations == cost.macs * 4 * 8
    # codes of half a byte, and a scale and a bias for each of 64 outputs
    assert cost.storage_bytes == 64 * 64 // 2 + 64 * 8
    path = tmp_path / "model.safetensors"
    save_quantized(path, model)
    kept = sum(part.nbytes for part in model.state_dict().values())
    assert kept <= path.stat().st_size < kept + 40_000
    saved = sum(
        numbers[name] * 3.5 - 4 * len(model.get_submodule(name).weight_scale) for name in bits if bits[name] == 4
    )
    assert before.total_bytes - after.total_bytes == saved
    with pytest.raises(ValueError, match="no linear"):
        model_cost(nn.ReLU())
