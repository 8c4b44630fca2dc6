"""ViDiT-Q on whole pipelines of diffusers, whose networks are called in different ways."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from modules.test_pipeline import module_of

from genlight.data.prompts import PromptsDataModule
from genlight.io import load_state
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_settings import network_of
from genlight.quantization.calls import sampling_calls
from genlight.quantization.convert import quantized_layers
from genlight.quantization.statistics import load_statistics
from genlight.quantization.trajectory import noise_to_signal, recorded_calls


@pytest.mark.parametrize(
    ("name", "branches"), [("sd", [(0, 1)]), ("flux", [(0,)]), ("latte", [(0, 1)]), ("wan", [(0,), (1,)])]
)
def test_branches_of_guidance_are_found(name: str, branches: list[tuple[int, ...]]) -> None:
    """In one batch, none at all, or in two calls of each step."""
    module = module_of(name)
    noise = torch.randn(1, *module.sample_shape)
    found = sampling_calls(network_of(module), lambda: module.sample_latents(noise, torch.tensor([0])))
    assert [context.branches for context in found] == branches * 5
    assert {context.num_steps for context in found} == {5}


@pytest.mark.parametrize("name", ["sd", "flux", "latte"])
def test_a_pipeline_is_calibrated_quantized_and_saved(name: str, tmp_path: Path) -> None:
    module = module_of(name)
    data = PromptsDataModule(num_samples=4, eval_batch_size=2)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=str(tmp_path), **quiet)
    result = QuantizationCalibration(samples=2, trajectory=2, rivals=False).run(trainer, module, data)
    full, row = result.table
    assert 20 < row["sqnr"] < 80 and row["bits"] == 8 and row["megabytes"] < full["megabytes"]
    network = network_of(module)
    assert not quantized_layers(network) and result.save is not None
    artifact = tmp_path / "artifact"
    result.save(artifact, module)
    assert not quantized_layers(network) and not hasattr(network, "hf_quantizer")
    key = "unet" if name == "sd" else "transformer"
    again, plain = (type(network).from_pretrained(folder / key) for folder in (artifact, artifact / "dequantized"))
    assert quantized_layers(again) and not quantized_layers(plain)
    assert "import genlight" in (artifact / "README.md").read_text()
    with recorded_calls(network) as calls:
        module.sample_latents(torch.randn(1, *module.sample_shape), torch.tensor([0]))
    assert 0 < noise_to_signal(plain.eval(), calls) < noise_to_signal(again.eval(), calls) < 1e-2


def test_statistics_are_of_every_step_and_branch(tmp_path: Path) -> None:
    module = module_of("sd")
    data = PromptsDataModule(num_samples=2, eval_batch_size=2)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=str(tmp_path), **quiet)
    method = QuantizationCalibration(samples=4, trajectory=1, rivals=False, dequantized=False, rounding="nearest")
    method.run(trainer, module, data)
    file = tmp_path / "calibration.safetensors"
    state = load_state(file, kind="input statistics")
    statistics, batches = load_statistics(file, fingerprint=state["fingerprint"])
    assert batches == 2
    for entry in statistics.values():
        assert entry.absmax.shape[:2] == (2, 5) and entry.ranges.shape == (2, 5, 2)
        assert (entry.absmax.amax(-1) > 0).all() and entry.hessian is None
