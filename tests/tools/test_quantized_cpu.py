"""Memory and speed as the proofs measure them: of things whose size and duration are known."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

PROOFS = Path(__file__).resolve().parents[2] / "tools" / "proofs"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(PROOFS))
    return runpy.run_path(str(PROOFS / "quantized_cpu.py"))


def test_memory_is_that_of_tensors_alive_each_storage_once(program: dict[str, Any]) -> None:
    program["held"]()
    before = program["held"]()
    size = 160 << 20
    kept = torch.ones(size, dtype=torch.uint8)
    view = kept[:100]
    after = program["held"]()
    assert after["live"] - before["live"] == size
    # not twice; what else this process has freed before may have gone back to the system meanwhile, or come again
    assert before["resident"] > 0 and after["resident"] <= before["resident"] + 1.5 * size
    del kept, view
    assert program["held"]()["live"] == before["live"]


def test_a_speed_is_the_first_side_s_time_over_another_s(program: dict[str, Any]) -> None:
    matrix = torch.randn(400, 400)

    def products(count: int) -> None:
        for _ in range(count):
            matrix @ matrix

    sides = {"float32": lambda: products(120), "half": lambda: products(60)}
    assert program["speeds"](sides, 5) == {"half": pytest.approx(2, rel=0.3)}


def test_layers_have_the_shapes_they_are_named_by_and_the_bits_they_are_given(program: dict[str, Any]) -> None:
    layers = program["layers_of"]("unet")
    shapes = [tuple(layer.weight.shape) for layer in layers.values()]
    assert shapes[1] == (5120, 640) and shapes[-1] == (640, 1280, 1, 1)
    assert len(shapes) == len(program["LINEARS"]) + len(program["CONVOLUTIONS"])
    made = program["quantized"]("W4A8 MixDQ", layers["0: linear 77 x 2048 x 1280"])
    assert made.weight_codes.numel() == 2048 * 1280 // 2 and made.form.activation.mode == "static"
    with torch.inference_mode():
        assert made(torch.randn(3, 2048)).shape == (3, 1280)
    made = program["quantized"]("W8A8 ViDiT-Q", layers["0: linear 77 x 2048 x 1280"])
    assert (
        made.weight_zero_point is not None and made.input_scale is not None and math.prod(made.rotation_factors) == 2048
    )


def test_bars_name_their_form(program: dict[str, Any]) -> None:
    forms = {"W8A8 ViDiT-Q": 1.2, "W4A8 ViDiT-Q": 1.1, "W8A8 plain": 1.5, "torchao int8": 1.0}
    memory = {form: {"resident": 0.1, "live": 0.2} for form in program["FORMS"]["transformer"]}
    bars = {
        bar.id: (bar.what.partition(", processor")[0], bar.holds)
        for bar in program["bars_of"]("transformer", {"transformer": forms}, memory)
    }
    assert bars["speed-transformer"] == ("transformer, float32 / W8A8 plain", True)
    assert bars["speed-transformer-viditq"] == ("transformer, float32 / W8A8 ViDiT-Q", False)
    assert bars["torchao-transformer"] == ("transformer, torchao's dynamic int8 / W8A8 plain", True)
    assert "W4A8 ViDiT-Q" in bars["memory-transformer-w4"][0]
