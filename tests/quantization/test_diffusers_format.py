"""Quantized networks saved and loaded by diffusers itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from quantization.tiny_pixart import W4A8, call, converted, pixart, save_altered
from safetensors.torch import load_file

from genlight.quantization.convert import quantized_layers
from genlight.quantization.diffusers_format import ViDiTQConfig, marked_quantized, register
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.saving import plans_of

GROUPED = LayerFormat(WeightFormat(2, False, "group", 24), ActivationFormat(6, False))
SHIFTED = LayerFormat(WeightFormat(4, False), ActivationFormat(8, False))


@pytest.fixture(autouse=True)
def known() -> None:
    register()


@pytest.mark.parametrize("form", [W4A8, GROUPED, SHIFTED])
def test_a_network_comes_back_bit_for_bit(form: LayerFormat, tmp_path: Path) -> None:
    model = converted(form)
    with marked_quantized(model, {"seed": 3}):
        model.save_pretrained(tmp_path)
    other = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(call(other), call(model)) and plans_of(other) == plans_of(model)
    assert other.config.quantization_config.settings == {"seed": 3, "dtype": "float32"}
    # and what was loaded can be saved as it is
    other.save_pretrained(tmp_path / "again")
    again = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(call(again), call(model))
    assert not any(tensor.is_meta for tensor in again.buffers())
    if not form.activation.symmetric and form.weight.group_size is None:
        assert all(layer.weight_sums is not None for layer in quantized_layers(again).values())
    # as `pipe.enable_sequential_cpu_offload` does where a network has a parameter of its own
    accelerate.cpu_offload(again, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(call(again), call(model))


def test_nothing_is_left_of_the_mark(tmp_path: Path) -> None:
    model = converted()
    before = dict(model.config)
    with marked_quantized(model, {}):
        assert "quantization_config" in model.config
    assert dict(model.config) == before and not hasattr(model, "hf_quantizer")
    with pytest.raises(ValueError, match="no quantized layer"), marked_quantized(pixart(), {}):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_sixteen_bits_comes_back_in_its_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """With nothing asked for; a folder of before the type was recorded still loads."""
    load = diffusers.PixArtTransformer2DModel.from_pretrained
    pixart().save_pretrained(tmp_path / "plain")
    model = converted(model=load(tmp_path / "plain", torch_dtype=dtype))
    with marked_quantized(model, {}):
        model.save_pretrained(tmp_path / "own")
    other = load(tmp_path / "own")
    assert {part.dtype for part in other.parameters()} == {dtype} and torch.equal(call(other), call(model))
    # and what is loaded in another type is saved as that
    load(tmp_path / "own", torch_dtype=torch.float32).save_pretrained(tmp_path / "wide")
    assert load(tmp_path / "wide").dtype == torch.float32
    config = tmp_path / "own" / "config.json"
    content = json.loads(config.read_text())
    del content["quantization_config"]["settings"]["dtype"]
    config.write_text(json.dumps(content))
    assert load(tmp_path / "own").dtype == torch.float32


def test_other_types_are_for_the_other_layers(tmp_path: Path) -> None:
    """Loaded in bfloat16, scales and codes are those of the file."""
    model = converted()
    with marked_quantized(model, {}):
        model.save_pretrained(tmp_path)
    half = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for name, layer in quantized_layers(half).items():
        own = model.get_submodule(name)
        for key, tensor in layer.state_dict().items():
            assert tensor.dtype == own.state_dict()[key].dtype and torch.equal(tensor, own.state_dict()[key])
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    assert sum(t.nbytes for t in tensors.values()) < 0.6 * sum(p.nbytes for p in pixart().parameters())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c["settings"].update(dtype="half"), "'half' is no type"),
        (lambda c: c["tensors"].popitem(), "same layers"),
        (lambda c: next(iter(c["layers"].values()))["form"]["weight"].update(bits=40), "bits"),
        (lambda c: next(iter(c["tensors"].values())).pop("weight_scale"), "weight is missing"),
        (lambda c: next(iter(c["tensors"].values())).update(weight_codes=["int9", 1, 1]), "int9"),
        (lambda c: next(iter(c["tensors"].values())).update(weight_codes=["uint8", 1, 1]), "shape"),
    ],
)
def test_a_config_that_does_not_hold_is_refused(change: Any, expected: str, tmp_path: Path) -> None:
    save_altered(converted(), tmp_path, change)
    with pytest.raises(ValueError, match=expected):
        diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_the_config_is_plain_json() -> None:
    content = json.loads(json.dumps(ViDiTQConfig.of(converted(), {"bits": 4}).to_dict()))
    assert content["quant_method"] == "viditq" and len(content["layers"]) == 20
    again = ViDiTQConfig.from_dict(content)
    assert again.to_dict() == ViDiTQConfig.of(converted(), {"bits": 4}).to_dict()


@pytest.mark.parametrize(
    "order", ["import genlight, diffusers.quantizers.auto as a", "import diffusers.quantizers.auto as a, genlight"]
)
def test_importing_both_is_enough(order: str) -> None:
    """Whichever comes first."""
    program = f"{order}; assert 'viditq' in a.AUTO_QUANTIZER_MAPPING and 'viditq' in a.AUTO_QUANTIZATION_CONFIG_MAPPING"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_genlight_alone_imports_neither() -> None:
    alone = "import genlight, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", alone], check=True)


@pytest.mark.parametrize("first", ["diffusers", "genlight.quantization.diffusers_format", "diffusers.quantizers.auto"])
def test_whatever_is_imported_first_diffusers_knows_the_method(first: str) -> None:
    program = f"import genlight, {first}; from diffusers.quantizers import auto; print(auto.AUTO_QUANTIZER_MAPPING)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ViDiTQQuantizer" in done.stdout, done.stderr
