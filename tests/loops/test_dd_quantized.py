"""Students in few bits: how large, how far from the student, and the same samples where only torch is."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from modules.tiny_token_teacher import saved_teacher
from nets.test_teachers import randomised

from genlight.io import read_json
from genlight.loops.dd_quantized import FORMATS, quantized_student, save_with_quantized
from genlight.modules.distilled_decoding import DistilledDecodingModule
from genlight.nets.dd_student import ImageGPTStudent, RasterStudent
from genlight.quantization.accounting import tensor_bytes
from genlight.quantization.convert import quantized_layers


def test_fewer_bits_are_smaller_and_further_from_the_student() -> None:
    sizes = {"num_codes": 16, "grid_size": 3, "width": 64, "num_layers": 2, "num_heads": 2, "multiple_of": 32}
    student = RasterStudent(4, {**sizes, "num_classes": 3}).eval()
    randomised(student)
    generator = torch.Generator().manual_seed(0)
    noise, labels = torch.randn(50, 9, 4, generator=generator), torch.arange(50) % 3
    inputs = noise, torch.zeros(50, 9, dtype=torch.bool), labels
    with torch.no_grad():
        exact = student(*inputs)[0]
        shares, noises = {}, {}
        for name, form in FORMATS.items():
            made = quantized_student(student, form)
            layers = quantized_layers(made)
            assert len(layers) == 10 and all(each.startswith("backbone.blocks.") for each in layers)
            before = sum(tensor_bytes(student.get_submodule(each)) for each in layers)
            shares[name] = sum(tensor_bytes(layer) for layer in layers.values()) / before
            noises[name] = float((made(*inputs)[0] - exact).square().mean() / exact.square().mean())
        assert torch.equal(student(*inputs)[0], exact)
    assert shares["w8"] == shares["w8a8"] < 0.27 and shares["w4"] < 0.16
    assert 0 < noises["w8"] < noises["w8a8"] < noises["w4"] < 0.2
    # a scale for each output, and the nearest code
    weight = student.backbone.blocks[0].attention.qkv.weight.detach()
    step = weight.abs().amax(1, keepdim=True) / 127
    found = quantized_student(student, FORMATS["w8"]).backbone.blocks[0].attention.qkv
    torch.testing.assert_close(found.weight_matrix, (weight / step).round() * step)


ALONE = """
import sys
sys.modules["genlight"] = sys.modules["safetensors"] = None
sys.path.insert(0, sys.argv[1] + "/w8")
import torch
from sample import Student, read_tensors
given = read_tensors(sys.argv[2])
for name in ("w8", "w8a8", "w4"):
    student = Student(f"{sys.argv[1]}/{name}")
    for steps in ([0], [0, 2]):
        found = student.sample(given["noise"], given["label"].long(), steps)
        far = (found - given[f"{name}-{len(steps)}"]).abs().flatten(1).amax(1)
        # the last digit of a processor may turn a rounding, and that a token of one image
        assert (far < 1e-4).float().mean() > 0.8, (name, steps, far)
print("equal")
"""


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_the_folder_of_few_bits_samples_where_only_torch_is(kind: str, tmp_path: Path) -> None:
    module = DistilledDecodingModule(str(saved_teacher(tmp_path / "teacher", kind)), timesteps=(0, 2))
    randomised(module.student)
    students = {name: quantized_student(module.student, form) for name, form in FORMATS.items()}
    noise = torch.randn(10, *module.sample_shape, generator=torch.Generator().manual_seed(1))
    label = torch.arange(10)
    plain = module.sample(noise, label)
    given = {"noise": noise, "label": label.float()}
    for name, student in students.items():
        with module.with_student(student):
            given |= {f"{name}-1": module.sample(noise, label)}
            given |= {f"{name}-2": module.sample(noise, label, timesteps=(0, 2))}
    assert torch.equal(module.sample(noise, label), plain)
    assert not torch.equal(given["w4-1"], plain) and not torch.equal(given["w4-1"], given["w4-2"])
    save_with_quantized(module, students, tmp_path / "student")
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    words = [sys.executable, "-c", ALONE, str(tmp_path / "student"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr
    form = {"weight_bits": 4, "activation_bits": 16, "group_size": 32}
    assert read_json(tmp_path / "student" / "w4" / "config.json")["quantization"] == form
    assert "quantization" not in read_json(tmp_path / "student" / "config.json")


def test_the_student_of_an_imagegpt_is_refused() -> None:
    sizes = {"vocab_size": 5, "n_positions": 4, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match=r"quantized must be \[\]: the layers of an ImageGPT"):
        quantized_student(ImageGPTStudent(3, sizes), FORMATS["w8"])
