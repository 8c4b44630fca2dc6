"""ViDiT-Q on whole pipelines of diffusers, whose networks are called in different ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from metrics.test_video import Quarters
from modules.test_pipeline import module_of, tiny_pipe
from modules.tiny_folders import vae, wan_vae

from genlight.callbacks.begun import Begun
from genlight.data.prompts import PromptsDataModule
from genlight.errors import UserError
from genlight.io import load_state
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_settings import GroupSettings, MixedBits, network_of
from genlight.loops.quantization_variants import Variant
from genlight.loops.quantization_work import checked_work
from genlight.metrics.paired import image_scores
from genlight.metrics.video import VideoMetrics
from genlight.quantization.calls import sampling_calls
from genlight.quantization.convert import quantized_layers
from genlight.quantization.observers import InputObserver
from genlight.quantization.recipe import overall_range
from genlight.quantization.statistics import StatisticsSettings, load_statistics
from genlight.quantization.trajectory import noise_to_signal, recorded_calls, replay


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


def parts_of(name: str, folder: Path, samples: int = 4, **options: Any) -> tuple[Trainer, Any, PromptsDataModule]:
    """What a method runs with."""
    module, data = module_of(name, **options), PromptsDataModule(num_samples=samples, eval_batch_size=2)
    module.check_data(data)
    data.noise_shape = module.sample_shape
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", default_root_dir=str(folder), **quiet), module, data


def test_calls_for_guidance_may_leave_out_blocks_and_branches(tmp_path: Path) -> None:
    """Skip-layer guidance: one more call in some steps, of one branch, without a block."""
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5}
    pipe = tiny_pipe("sd3")
    pipe.register_modules(vae=vae(shift_factor=0.1))
    parts = parts_of("sd3", tmp_path, pipe=pipe, call=skipping)
    method = QuantizationCalibration(samples=2, trajectory=1, dequantized=False)
    _, *rows = method.run(*parts).table
    assert "static" in {row["variant"] for row in rows} and all(row["sqnr"] > 20 for row in rows)
    work = checked_work(method, *parts)
    found = work.layers(Variant("static", "none", "nearest", mode="static"))
    observer = InputObserver(work.network, list(found), StatisticsSettings())
    with observer:
        calls = work.reference("search", 2).calls
        for call in calls:
            replay(work.network, call)
    assert {len(call.output) for call in calls} == {2, 4}
    for name, layer in found.items():
        assert layer.activation_range is not None
        assert torch.allclose(layer.activation_range, overall_range(observer.statistics[name]), rtol=1e-5)


MOTION = GroupSettings("^temporal_transformer_blocks", "motion")


def test_a_video_is_measured_whole_and_its_motion_chooses_bits(tmp_path: Path) -> None:
    trainer, module, data = parts_of("latte", tmp_path)
    module.metrics = VideoMetrics(Quarters())
    mixed = MixedBits((2, 8), average_bits=4.0, samples=1)
    method = QuantizationCalibration(
        samples=2, trajectory=2, groups=(MOTION, GroupSettings()), mixed=mixed, dequantized=False, rounding="nearest"
    )
    result = method.run(trainer, module, data)
    rows = {row["variant"]: row for row in result.table}
    full = rows.pop("full precision")
    own, fd = {"flow_size", "flow_flicker", "video_consistency"}, "video_fd_quarters"
    assert own <= set(full) and full["motion"] is None and fd not in full
    assert {"dynamic", "rotation (QuaRot)", "ViDiT-Q", "ViDiT-Q mixed"} <= set(rows)
    for row in rows.values():
        assert own < set(row) and row["motion"] > 0 and row[fd] > 0
    # two bits against eight
    assert rows["ViDiT-Q"]["motion"] < rows["ViDiT-Q mixed"]["motion"]
    assert rows["ViDiT-Q"][fd] < rows["ViDiT-Q mixed"][fd]
    lines = [json.loads(line) for line in (tmp_path / "search/sensitivity/history.jsonl").read_text().splitlines()[1:]]
    # no other group asks for it
    assert all((line["motion"] is None) != line["layer"].startswith("temporal") for line in lines)
    lines = [line for line in lines if line["motion"] is not None]
    by_bits = [sum(line["motion"] for line in lines if line["bits"] == bits) for bits in (2, 8)]
    assert by_bits[0] > 3 * by_bits[1] > 0
    # the temporal layers share what they were given so that the sum of their squared errors of motion is least
    temporal = sorted({line["layer"] for line in lines})
    loss = {(line["layer"], line["bits"]): line["motion"] ** 2 for line in lines}
    assert result.save is not None
    result.save(tmp_path / "artifact", module)
    found = json.loads((tmp_path / "artifact" / "quantization.json").read_text())["layers"]
    bits = {name: found[name]["weight_bits"] for name in temporal}
    weights = {name: network_of(module).get_submodule(name).weight.numel() for name in temporal}
    for one in temporal:
        for other in temporal:
            if weights[one] == weights[other] and bits[one] != bits[other]:
                kept = loss[one, bits[one]] + loss[other, bits[other]]
                assert kept <= loss[one, bits[other]] + loss[other, bits[one]] + 1e-12
    assert len(temporal) > 3


def test_all_frames_are_sampled_and_one_of_them_is_shown() -> None:
    """And layers that join frames change the motion."""
    module = module_of("latte")
    noise, label = torch.randn(2, *module.sample_shape), torch.tensor([0, 1])
    before = module.sample_whole(noise, label)
    assert before.shape == (2, 2, 3, 64, 64) and torch.equal(module.sample(noise, label), before[:, 1])
    with torch.no_grad():
        for name, weight in network_of(module).named_parameters():
            if name.startswith("temporal"):
                weight.mul_(1.5)
    assert image_scores(module.sample_whole(noise, label), before)["motion"] > 0


def test_images_have_no_motion(tmp_path: Path) -> None:
    method = QuantizationCalibration(samples=2, trajectory=1, groups=(GroupSettings(metric="motion"),), rivals=False)
    with pytest.raises(UserError, match="metric = motion needs a generator of videos"):
        method.run(*parts_of("sd", tmp_path))


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
        assert entry.absmax.shape[:2] == entry.minimum.shape == (2, 5) and entry.minimum.isfinite().all()
        assert (entry.absmax.amax(-1) > 0).all() and entry.hessian is None


def test_a_calibration_is_kept_from_its_beginning(tmp_path: Path) -> None:
    """The run that it replaces, if there is one, counts no longer."""
    trainer, module, data = parts_of("sd", tmp_path)
    noted: list[bool] = []
    trainer.callbacks.append(begun := Begun(lambda: noted.append((tmp_path / "calibration.safetensors").exists())))
    begun.says_itself = True
    QuantizationCalibration(samples=2, trajectory=1, rivals=False, dequantized=False).run(trainer, module, data)
    assert noted[0] is False


def test_layers_whose_weights_the_network_reads_are_refused_before_the_calibration(tmp_path: Path) -> None:
    """Wan asks its time embedder for the type of a parameter."""
    method = QuantizationCalibration(samples=2, trajectory=1, keep="^proj_out", rivals=False)
    pipe = tiny_pipe("wan")
    pipe.register_modules(vae=wan_vae())
    trainer, module, data = parts_of("wan", tmp_path, pipe=pipe)
    with pytest.raises(UserError, match=r"^method.keep: condition_embedder.* asks for the weights of its layers"):
        method.run(trainer, module, data)
    assert not list(tmp_path.glob("calibration*"))
    # and the network is as it was
    assert isinstance(module.networks["transformer"].condition_embedder.time_embedder.linear_1, torch.nn.Linear)


def test_a_budget_that_cannot_be_kept_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    groups = (GroupSettings("attn", weight_bits=8), GroupSettings())
    mixed = MixedBits((4, 8), average_bits=4.2, samples=1)
    method = QuantizationCalibration(samples=2, trajectory=1, groups=groups, mixed=mixed, rivals=False)
    with pytest.raises(UserError, match=r"^method.mixed: average_bits = 4.2 is below \d\.\d+, the least that"):
        method.run(*parts_of("sd", tmp_path))
    assert not list(tmp_path.glob("calibration*")) and not (tmp_path / "search/sensitivity/history.jsonl").exists()
