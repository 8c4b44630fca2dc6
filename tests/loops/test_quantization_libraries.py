"""Rows of other libraries in the tables of ViDiT-Q and MixDQ; with a stand-in where none is installed."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from modules.test_pipeline import module_of
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from genlight.data.prompts import PromptsDataModule
from genlight.loops.cost import first_validation
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_libraries import library_phases, library_rows
from genlight.loops.quantization_work import QuantizationWork, checked_work
from genlight.quantization.libraries import LIBRARIES

# blocks of a transformer, and a convolution
KEEP = r"^(?!down_blocks\.\d\.attentions\.0\.transformer_blocks\.0\.|conv_in$)"


class Rounded(torch.Tensor):
    """A weight in eight bits with a scale for each output, kept as torchao keeps its own: in other tensors."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Rounded":
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: None, size: Any, stride: Any) -> "Rounded":
        return Rounded(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        return function(*tree_map_only(cls, lambda weight: weight.codes * weight.scale, args), **(kwargs or {}))


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def stand_in() -> ModuleType:
    """Of torchao's functions: eight bits are rounded to, and for other formats the machine is not the right one."""

    def quantize_(model: nn.Module, config: str) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(Rounded(*rounded(layer.weight.detach())), requires_grad=False)

    def refuse(**settings: Any) -> None:
        raise AssertionError("no such machine\nand much more")

    made: Any = ModuleType("torchao.quantization")
    made.quantize_, made.PerRow = quantize_, object
    made.Int8DynamicActivationInt8WeightConfig = lambda set_inductor_config: "int8"
    made.Float8DynamicActivationFloat8WeightConfig = made.Int4WeightOnlyConfig = refuse
    return made


@pytest.fixture
def work(tmp_path: Path) -> QuantizationWork:
    """Of a tiny Stable Diffusion, of which a few layers are quantized."""
    module = module_of("sd")
    module.num_inference_steps = 2
    data = PromptsDataModule(num_samples=2, eval_batch_size=2)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=str(tmp_path), **quiet)
    method = QuantizationCalibration(keep=KEEP, samples=2, trajectory=2, rounding="nearest")
    work = checked_work(method, trainer, module, data)
    first_validation(trainer, module, data)
    return work


def test_a_library_is_measured_like_all_others(work: QuantizationWork, monkeypatch: pytest.MonkeyPatch) -> None:
    torchao: Any = ModuleType("torchao")
    torchao.quantization, torchao.__spec__ = stand_in(), ModuleSpec("torchao", None)
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "optimum", None)
    rows, notes = library_rows(work)
    plain = work.calibrated.layers
    linear = {name: layer for name, layer in plain.items() if isinstance(layer, nn.Linear)}
    assert len(linear) == len(plain) - 1
    (row,) = rows
    name = f"torchao int8 ({len(linear)} of {len(plain)} layers, convolutions in floating point)"
    assert row["variant"] == name
    assert notes[1:] == [
        "torchao float8 is left out: AssertionError: no such machine",
        "torchao int4 weights is left out: AssertionError: no such machine",
        "optimum-quanto is not installed",
    ]
    # the same weights in floats give the same predictions and images, in as many bytes as before
    same = {}
    for key, layer in linear.items():
        codes, scale = rounded(layer.weight.detach())
        same[key] = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        same[key].weight, same[key].bias = nn.Parameter(codes * scale), layer.bias
    expected, _ = work.measure(same)
    assert [row[key] for key in ("sqnr", "psnr", "ssim")] == [expected[key] for key in ("sqnr", "psnr", "ssim")]
    assert 20 < row["sqnr"] < 100
    saved = sum(3 * layer.weight.numel() - 4 * layer.out_features for layer in linear.values())
    assert (expected["megabytes"] - row["megabytes"]) * 1e6 == pytest.approx(saved, abs=1)
    numbers = {name: layer.weight.numel() for name, layer in plain.items()}
    bits = sum(count * (8 if name in linear else 16) for name, count in numbers.items()) / sum(numbers.values())
    assert row["bits"] == pytest.approx(bits) and expected["bits"] == 16
    assert work.noise(work.reference("report", 2)) == 0
    (phase,) = library_phases(work, 1.0, 1.0)
    assert phase.count == 1 and phase.seconds[0] >= 1


def test_what_is_not_installed_is_said_once(work: QuantizationWork, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "optimum"):
        monkeypatch.setitem(sys.modules, name, None)
    assert library_rows(work) == ([], ["torchao is not installed", "optimum-quanto is not installed"])
    assert library_phases(work, 1.0, 1.0) == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_the_library_itself(work: QuantizationWork, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are as named, bytes are fewer, and the network has its own layers again."""
    if not library.installed:
        pytest.skip(f"{library.name} is not installed")
    monkeypatch.setattr("genlight.loops.quantization_libraries.LIBRARIES", (library,))
    before = work.size()
    rows, notes = library_rows(work)
    found = {row["variant"].split(" (")[0]: row for row in rows}
    assert len(rows) + sum("is left out" in note for note in notes) == len(library.formats)
    expected = {
        "torchao": {"torchao int8": 8},
        "optimum-quanto": {"optimum-quanto int8": 8, "optimum-quanto int4 weights": 4},
    }
    for name, bits in expected[library.name].items():
        row = found[name]
        assert row["sqnr"] > (25 if bits == 8 else 10)
        assert row["megabytes"] < before["megabytes"]
        assert row["bits"] == bits or "floating point" in row["variant"]
        assert bits <= row["input_bits"] <= 16
    assert work.size() == before and work.noise(work.reference("report", 2)) == 0
