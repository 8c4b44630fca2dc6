"""Weights that gpt-oss stores in four bits and DeepSeek-V3 in eight are read as numbers, to be pruned and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from experts.tiny_models import KEPT, logits, tiny_model
from safetensors.torch import load_file, save_file

from genlight.experts.editor import ExpertEditor
from genlight.experts.export import export
from genlight.experts.maps import selection_maps
from genlight.modules.pretrained_lm import _unpacked, load_language_model

# the sixteen numbers of the format E2M1, by code
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NUMBERS = torch.cat((NUMBERS, -NUMBERS))


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """Put codes in the place of a folder's experts; returns the numbers that they stand for, [E, in, out], by name."""
    file = folder / "model.safetensors"
    tensors, numbers = load_file(file), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        codes = torch.randint(16, (experts, columns, rows // 32, 32), generator=generator)
        exponents = torch.randint(-3, 0, (experts, columns, rows // 32), generator=generator)
        # the lower half of a byte comes first
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
        values = NUMBERS[codes] * 2.0 ** exponents[..., None]
        numbers[name] = values.flatten(2).transpose(1, 2)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return numbers


def test_codes_are_unpacked_and_saved_as_numbers(tmp_path: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(tmp_path / "model")
    numbers = packed(tmp_path / "model")
    assert len(numbers) == 4
    model: Any = load_language_model(str(tmp_path / "model"), "bfloat16")
    for name, expected in numbers.items():
        found = model.get_parameter(name)
        assert found.dtype == torch.bfloat16 and torch.equal(found.float(), expected), name
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, selection_maps(KEPT, 8)))
    expected = logits(model)
    export(editor, tmp_path / "pruned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert torch.equal(logits(again), expected)
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())


def in_eight_bits(folder: Path) -> None:
    """Put codes and a scale for each block of 8 × 8 in the place of the weights of a folder's experts."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].reshape(rows // 8, 8, columns // 8, 8)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(rows, columns)
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8], "ignored_layers": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_eight_bits_are_unpacked_whatever_the_device_and_saved_as_numbers(tmp_path: Path) -> None:
    whole = tiny_model("deepseek_v3")
    whole.save_pretrained(tmp_path / "model")
    in_eight_bits(tmp_path / "model")
    options = _unpacked(json.loads((tmp_path / "model" / "config.json").read_text()))["quantization_config"]
    assert options.dequantize and options.modules_to_not_convert == ["lm_head"]
    model: Any = load_language_model(str(tmp_path / "model"), "float32")
    found, stored = (m.model.layers[1].mlp.experts.gate_up_proj.detach() for m in (model, whole))
    assert found.dtype == torch.float32 and not torch.equal(found, stored)
    torch.testing.assert_close(found, stored, rtol=0.07, atol=0.01)
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, selection_maps(KEPT, 8)))
    expected = logits(model)
    export(editor, tmp_path / "pruned")
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert torch.equal(logits(again), expected)


def test_experts_with_scales_are_refused() -> None:
    model = tiny_model("deepseek_v3")
    model.model.layers[1].mlp.experts.gate_up_proj_scale_inv = torch.nn.Parameter(torch.ones(8, 6, 4))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp: its experts hold gate_up_proj_scale_inv too, .* unpacked"):
        ExpertEditor(model)
