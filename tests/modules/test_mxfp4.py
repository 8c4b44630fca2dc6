"""Weights that gpt-oss stores in four bits are read as numbers, which can be pruned, merged and saved."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from experts.tiny_models import KEPT, logits, tiny_model
from safetensors.torch import load_file, save_file

from genlight.experts.editor import ExpertEditor
from genlight.experts.export import export
from genlight.experts.maps import selection_maps
from genlight.modules.pretrained_lm import load_language_model

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
