"""Ranges of inputs by step: chosen by the timestep that a network is called with, saved, loaded, compiled."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from quantization.tiny_pixart import KEPT, call, pixart, save_altered
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from genlight.quantization.accounting import file_bytes, tensor_bytes
from genlight.quantization.context import SamplingSteps
from genlight.quantization.convert import (
    LayerGroup,
    formats_of_layers,
    quantize_layer,
    quantize_split,
    quantized_layers,
    replace_layers,
)
from genlight.quantization.diffusers_format import marked_quantized
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.recipe import shared_range
from genlight.quantization.saving import save_quantized
from genlight.quantization.steps import follow_steps, following_steps, steps_of, timestep_of
from genlight.quantization.trajectory import recorded_calls

FORM = LayerFormat(WeightFormat(8), ActivationFormat(6, False, "static", "tensor"))
TIMES = [999.0, 500.0, 7.0]
LOAD = """
import sys, genlight, torch
from diffusers import PixArtTransformer2DModel
from quantization.tiny_pixart import call
network = PixArtTransformer2DModel.from_pretrained(sys.argv[1])
print(torch.stack([call(network, time) for time in (999.0, 400.0, 7.0)]).numpy().tobytes().hex())
"""


def quantized(ranges: Tensor, model: nn.Module | None = None) -> diffusers.PixArtTransformer2DModel:
    """The small transformer with one table of ranges [1, steps, 2] for all of its layers."""
    model = model or pixart()
    forms = formats_of_layers(model, [LayerGroup(KEPT), LayerGroup(".*", FORM)])
    chosen = {name: model.get_submodule(name) for name, form in forms.items() if form is not None}
    made = {name: quantize_layer(layer, FORM, activation_range=ranges.clone()) for name, layer in chosen.items()}
    replace_layers(model, made)
    return model


def table() -> Tensor:
    """Of three steps, each with another range."""
    return torch.tensor([[[-1.0, 2.0], [-3.0, 3.0], [-9.0, 5.0]]])


def followed(model: nn.Module | None = None) -> diffusers.PixArtTransformer2DModel:
    model = quantized(table(), model)
    follow_steps(model, SamplingSteps(TIMES))
    return model


def test_the_nearest_timestep_chooses_the_range() -> None:
    """As a network would compute that had this range alone; after it is copied, too."""
    model = followed()
    other = copy.deepcopy(model)
    for index, times in enumerate(((999.0, 760.0, 2000.0), (740.0, 500.0), (250.0, 7.0, -1.0))):
        single = quantized(table()[:, index : index + 1])
        for time in times:
            alone = call(single, time)
            assert torch.equal(call(model, time), alone) and torch.equal(call(other, time), alone)
    assert [int(one.sampling_steps.index) for one in (model, other)] == [2, 2]
    call(other, 999.0)
    assert [int(one.sampling_steps.index) for one in (model, other)] == [2, 0]


def test_fractions_numbers_and_a_first_of_equals() -> None:
    steps = SamplingSteps([1.0, 0.75, 0.25])
    for time, place in (
        (0.9, 0),
        (torch.tensor(0.8), 1),
        (torch.tensor([0.0, 0.0], dtype=torch.bfloat16), 2),
        (0.5, 1),
    ):
        assert steps.nearest(time).tolist() == [place]
    assert SamplingSteps([999.0, 7.0]).nearest(torch.tensor([400, 400])).tolist() == [1]
    with pytest.raises(ValueError, match="at least one"):
        SamplingSteps([])


def test_different_timesteps_in_one_call_are_refused() -> None:
    model = followed()
    with pytest.raises(ValueError, match="activation_ranges=shared"):
        model(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 32), timestep=torch.tensor([7, 8]))
    with pytest.raises(ValueError, match="without a timestep"):
        model.sampling_steps.find(None)


def test_what_was_made_in_inference_mode_runs_outside_of_it() -> None:
    with torch.inference_mode():
        steps = SamplingSteps(TIMES)
        steps.find(500)
    steps.find(7)
    assert steps.index.tolist() == [2] and steps.to(torch.bfloat16).timesteps.tolist() == TIMES


def test_one_range_for_all_leaves_the_network_alone(tmp_path: Path) -> None:
    """Nothing is found in a call, and nothing is written that was not before."""
    model = quantized(shared_range(table()))
    undo = follow_steps(model, SamplingSteps(TIMES))
    undo()
    assert not model._forward_pre_hooks and steps_of(model) is None
    with marked_quantized(model, {}):
        assert "timesteps" not in model.config["quantization_config"].to_dict()
        model.save_pretrained(tmp_path)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded._forward_pre_hooks and torch.equal(call(loaded), call(model))
    assert shared_range(table()).tolist() == [[[-9.0, 5.0]]]


def test_a_block_ends_and_the_bytes_are_those_of_the_tables() -> None:
    model, one = quantized(table()), quantized(table()[:, :1])
    steps, count = SamplingSteps(TIMES), len(quantized_layers(model))
    with following_steps(model, steps):
        # a minimum, a maximum, a scale and a zero point for two steps more, timesteps and index
        assert tensor_bytes(model) - tensor_bytes(one) == count * 2 * (8 + 4 + 1) + 3 * 4 + 8
        assert file_bytes(model) - file_bytes(one) == count * 2 * 8
    assert not model._forward_pre_hooks and not hasattr(model, "sampling_steps")
    with following_steps(model, None), pytest.raises(ValueError, match="3 steps and the sampling has 1"):
        call(model)


def test_compiled_code_is_one_graph_for_all_timesteps() -> None:
    """Without a break, and not compiled anew where layers are taken out and put back."""
    model, counter = quantized(table()), CompileCounter()
    steps, compiled = SamplingSteps(TIMES), torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        with following_steps(model, steps):
            for time in TIMES:
                assert torch.equal(call(compiled, time), call(model, time))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_a_saved_network_knows_its_steps(tmp_path: Path) -> None:
    """In another process bit for bit; in bfloat16 it keeps them, and it can be saved again."""
    model = followed()
    with marked_quantized(model, {}):
        model.save_pretrained(tmp_path / "one")
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    expected = torch.stack([call(model, time) for time in (999.0, 400.0, 7.0)])
    assert torch.equal(torch.stack([call(loaded, time) for time in (999.0, 400.0, 7.0)]), expected)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "two"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == expected.numpy().tobytes().hex()
    half = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "one", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.sampling_steps.timesteps.tolist() == TIMES
    call(half, 400.0)
    assert half.sampling_steps.index.tolist() == [1]


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [(None, "no timesteps"), ([999.0, 7.0], "3 steps, not of 1 and 2"), (["soon"], "must be numbers"), (7, "numbers")],
    ids=str,
)
def test_a_config_whose_steps_do_not_hold_is_refused(timesteps: object, expected: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        assert config.pop("timesteps") == TIMES
        if timesteps is not None:
            config["timesteps"] = timesteps

    save_altered(followed(), tmp_path, change)
    with pytest.raises(ValueError, match=expected):
        diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)


def test_what_cannot_follow_is_refused(tmp_path: Path) -> None:
    model = quantized(table().expand(2, -1, -1))
    with pytest.raises(ValueError, match="2 branches and 3 steps"):
        follow_steps(model, SamplingSteps(TIMES))
    timeless = nn.Sequential(quantize_layer(nn.Linear(4, 4), FORM, activation_range=table()))
    with pytest.raises(ValueError, match="Sequential takes no argument 'timestep'"):
        follow_steps(timeless, SamplingSteps(TIMES))
    with pytest.raises(ValueError, match="no timesteps"), marked_quantized(quantized(table()), {}):
        pass
    with pytest.raises(ValueError, match="save_pretrained"):
        save_quantized(tmp_path / "model.safetensors", followed())


def test_the_timestep_of_a_recorded_call() -> None:
    model = pixart()
    with recorded_calls(model) as calls:
        call(model, 3.5)
    assert timestep_of(model, calls[0]) == 3.5


def test_channels_of_a_split_have_ranges_by_step() -> None:
    """Each step as a layer would that had its ranges alone; codes of shortcuts are not multiplied."""
    layer, values = nn.Conv2d(6, 4, 1), torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    ranges = torch.tensor([[[-1.0, 1.0], [-2.0, 2.0]], [[-8.0, 8.0], [0.0, 3.0]]])
    split, steps = quantize_split(layer, FORM, 4, ranges), SamplingSteps([1.0, 0.5])
    split.steps, split.execution = steps, "fake"
    for index, time in enumerate((1.0, 0.5)):
        steps.find(time)
        alone = quantize_split(layer, FORM, 4, ranges[:, index])
        alone.execution = "fake"
        assert torch.equal(split(values), alone(values))
