"""What is kept of variants that were measured, and whether the quantized network is faster, on a tiny pipeline."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from loops.test_quantization_libraries import KEEP
from loops.test_viditq_pipeline import parts_of
from PIL import Image
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.io import CorruptFileError, read_json
from genlight.loops import quantization_speed
from genlight.loops.cost import first_validation
from genlight.loops.evaluation import noise_of
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_report import quantization_result, variants_of
from genlight.loops.quantization_samples import check_samples, sample_names, write_samples
from genlight.loops.quantization_speed import (
    Speeds,
    StepTimes,
    compiled_times,
    measured_speeds,
    milliseconds,
    step_times,
)
from genlight.loops.quantization_variants import FILE, Variant, VariantRows
from genlight.loops.quantization_work import QuantizationWork, checked_work
from genlight.quantization.layers import QuantizedLayer
from genlight.quantization.observers import InputObserver
from genlight.quantization.recipe import overall_range
from genlight.quantization.statistics import StatisticsSettings
from genlight.quantization.trajectory import Reference, replay
from genlight.search.archive import seal, unseal

SETTINGS: dict[str, Any] = {"keep": KEEP, "samples": 2, "rounding": "nearest", "dequantized": False}
NAMES = ["static", "dynamic", "scale (SmoothQuant)", "rotation (QuaRot)", "static-dynamic", "ViDiT-Q"]


def run(folder: Path, trajectory: int = 2) -> dict[str, dict[str, Any]]:
    """A whole calibration in few steps; rows by variant, without times."""
    trainer, module, data = parts_of("sd", folder, samples=2)
    module.num_inference_steps = 2
    result = QuantizationCalibration(trajectory=trajectory, **SETTINGS).run(trainer, module, data)
    return {row["variant"]: {k: v for k, v in row.items() if not k.startswith("ms")} for row in result.table}


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stops at its third variant; the next goes on there, and one with another setting begins anew."""
    monkeypatch.setattr("genlight.loops.quantization_libraries.LIBRARIES", ())
    measured, stop, real = list[int](), 3, QuantizationWork.measure

    def measure(self: QuantizationWork, layers: Mapping[str, nn.Module]) -> Any:
        measured.append(len(layers))
        if len(measured) == stop:
            raise KeyboardInterrupt
        return real(self, layers)

    monkeypatch.setattr(QuantizationWork, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    before = (tmp_path / FILE).read_text()
    kept = [unseal(line, "") for line in before.splitlines()]
    assert [line["variant"] for line in kept] == NAMES[:2]
    measured.clear()
    stop = 0
    rows = run(tmp_path)
    assert len(measured) == len(NAMES) - 2 and list(rows) == ["full precision", *NAMES]
    assert all(rows[line["variant"]] == {"variant": line["variant"], **line["row"]} for line in kept)
    assert len({tuple(rows[name]) for name in NAMES}) == 1  # columns in one order, read or measured
    assert (tmp_path / FILE).read_text().startswith(before)
    measured.clear()
    changed = run(tmp_path, trajectory=1)
    assert len(measured) == len(NAMES)
    # of one sample alone there is no interval
    assert changed["dynamic"]["ssim_low"] is None and rows["dynamic"]["ssim_low"] <= rows["dynamic"]["ssim"]


def test_a_row_that_lacks_what_is_measured_now_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the weights of LPIPS came between two runs; not where they went."""
    trainer, module, data = parts_of("sd", tmp_path, samples=2)
    module.num_inference_steps = 1
    work = checked_work(QuantizationCalibration(trajectory=1, **SETTINGS, rivals=False), trainer, module, data)
    own, speeds = first_validation(trainer, module, data).logged, Speeds(StepTimes([1], [1]), "cpu")
    monkeypatch.setattr("genlight.loops.quantization_report.measured_speeds", lambda *_: speeds)
    for number, scores in enumerate(({}, {"lpips": 0.1}, {"lpips": 0.2}, {})):
        for place in ("work", "report"):
            monkeypatch.setattr(f"genlight.loops.quantization_{place}.perceptual_scores", lambda *_, s=scores: s)
        _, row = quantization_result(work, own, None).table  # type: ignore[arg-type]
        assert row.get("lpips") == (0.1 if number else None)
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (seal({"kind": "variant", "version": 2}), UserError("version")),
        (seal({"kind": "variant", "version": 1})[:-4] + "0000", CorruptFileError("damaged")),
    ],
    ids=["version", "damage"],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, line: str, error: Exception) -> None:
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(line + "\n")
    data = SimpleNamespace(num_samples=2)
    evaluations = SimpleNamespace(trainer=SimpleNamespace(precision="32"), agreed=None)
    work: Any = SimpleNamespace(folder=tmp_path, fingerprint={}, method=None, datamodule=data, evaluations=evaluations)
    with pytest.raises(type(error), match=rf"line 1 of .*{error}"):
        VariantRows(work, [])


def test_clip_and_branch_are_those_of_the_method_and_of_no_rival() -> None:
    """Also where all round to nearest."""
    method = QuantizationCalibration(rounding="nearest", clip="mse", rank=2)
    *rivals, own = variants_of(method, {})
    assert (own.clip, own.rank, own.form("", method.form, 64).weight) == ("mse", 2, method.form.weight)
    assert {(v.clip, v.rank, v.form("", method.form, 64).weight.clip) for v in rivals} == {("none", 0, "none")}
    # the same without the parts for inputs of two kinds: what those are worth
    special = {"split_shortcuts": True, "activation_mode": "static", "constant_tokens": "warn"}
    kept = QuantizationCalibration(rounding="nearest", clip="mse", **special)
    assert {variant.clip for variant in variants_of(kept, {})} == {"mse"}


@pytest.mark.parametrize(("columns", "size"), [(1152, 128), (300, 128), (256, 128), (255, 128), (64, 32), (15, 8)])
def test_a_rival_has_weights_in_groups(columns: int, size: int) -> None:
    """Two or more in any layer."""
    method = QuantizationCalibration(weight_bits=4)
    (rival,) = (variant for variant in variants_of(method, {}) if variant.group_size)
    form = rival.form("", method.form, columns)
    assert (form.weight.granularity, form.weight.group_size, form.weight.rounding) == ("group", size, "nearest")
    assert form.weight.bits == 4 and form.activation == method.form.activation and rival.balance == "none"
    for other in (QuantizationCalibration(), QuantizationCalibration(weight_bits=4, weight_group_size=16)):
        assert not any(variant.group_size for variant in variants_of(other, {}))


def test_groups_of_a_rival_are_multiplied_as_numbers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The warning that codes are not multiplied would be of no layer that is kept."""
    trainer, module, data = parts_of("sd", tmp_path, samples=2)
    module.num_inference_steps = 1
    work = checked_work(QuantizationCalibration(trajectory=1, weight_bits=4, **SETTINGS), trainer, module, data)
    first_validation(trainer, module, data)
    reference = work.reference("report", 1)
    layers = work.layers(Variant("groups", "none", "nearest", group_size=8))
    with work.replaced(layers):
        grouped = work.noise(reference)
    assert not any("multiply its codes" in str(warning.message) for warning in recwarn)
    assert {layer.form.weight.group_size for layer in layers.values()} == {4, 8}
    with work.replaced(work.layers(Variant("dynamic", "none", "nearest"))):
        assert grouped < work.noise(reference)


def test_static_ranges_are_those_of_balanced_inputs(tmp_path: Path) -> None:
    trainer, module, data = parts_of("sd", tmp_path, samples=2)
    module.num_inference_steps = 2
    settings = {**SETTINGS, "balance": "scale", "activation_mode": "static", "rivals": False}
    work = checked_work(QuantizationCalibration(trajectory=1, **settings), trainer, module, data)
    first_validation(trainer, module, data)
    layers = work.layers(Variant.mixed(work.method, "static"))
    balances = {name: layer.balance for name, layer in layers.items()}
    observer = InputObserver(work.network, list(layers), StatisticsSettings(), balances=balances)
    with observer:
        for call in work.reference("search", work.method.samples).calls:
            work.inside(partial(replay, work.network, call))
    for name, layer in layers.items():
        assert layer.activation_range is not None and layer.input_scale is not None
        assert torch.allclose(layer.activation_range, overall_range(observer.statistics[name]))


def test_ranges_by_step_are_those_of_each_timestep(tmp_path: Path) -> None:
    """Whatever is done to the inputs; without the steps they are what one range for all is."""
    layers, quality = dict[str, dict[str, QuantizedLayer]](), dict[str, float]()
    for ranges in ("shared", "step"):
        trainer, module, data = parts_of("sd", tmp_path / ranges, samples=2)
        module.num_inference_steps = 2
        settings = {**SETTINGS, "activation_mode": "static", "activation_ranges": ranges, "balance": "none"}
        work = checked_work(QuantizationCalibration(trajectory=1, activation_bits=4, **settings), trainer, module, data)
        first_validation(trainer, module, data)
        one, reference = Variant.mixed(work.method, "own"), work.reference("report", 1)
        scaled = work.layers(replace(one, balance="scale"))
        layers[ranges], layers[f"{ranges}, scaled"] = work.layers(one), scaled
        layers[f"{ranges}, without"] = work.layers(replace(one, by_step=False))
        layers[f"{ranges}, scaled without"] = work.layers(replace(one, balance="scale", by_step=False))
        with work.replaced(layers[ranges]):
            quality[ranges] = work.noise(reference)
            assert hasattr(work.network, "sampling_steps") == (ranges == "step")
    assert quality["step"] < quality["shared"]
    assert work.ranges.steps is not None
    calls, times = work.reference("search", work.method.samples).calls, work.ranges.steps.timesteps.tolist()
    assert times == sorted({float(call.arguments[1]) for call in calls}, reverse=True) and len(times) == 2
    for kind, found in (("step", layers["step"]), ("step, scaled", layers["step, scaled"])):
        balances = {name: layer.balance for name, layer in found.items()}
        for place, timestep in enumerate(times):
            observer = InputObserver(work.network, list(found), StatisticsSettings(), balances=balances)
            with observer:
                for call in calls:
                    if float(call.arguments[1]) == timestep:
                        work.inside(partial(replay, work.network, call))
            for name, layer in found.items():
                assert layer.activation_range is not None and layer.steps is work.ranges.steps, kind
                expected = overall_range(observer.statistics[name])
                assert torch.allclose(layer.activation_range[:, place : place + 1], expected, rtol=1e-4, atol=1e-5)
    for one, other in (("", " without"), (", scaled", ", scaled without")):
        for name, layer in layers[f"shared{one}"].items():
            same = layers[f"step{other}" if one else "step, without"][name]
            assert layer.activation_range is not None and same.activation_range is not None and not same.has_steps
            assert torch.equal(layer.activation_range, same.activation_range)


def test_one_range_for_all_steps_is_a_rival_where_each_has_its_own() -> None:
    kept = {"split_shortcuts": True, "constant_tokens": "warn"}
    for title, options in (("ViDiT-Q", {}), ("MixDQ", kept)):
        method = QuantizationCalibration(
            title, rounding="nearest", activation_mode="static", activation_ranges="step", **options
        )
        *rivals, shared, own = variants_of(method, {})
        assert own.by_step and shared == replace(own, name="one range for all steps", by_step=False)
        assert not rivals[0].by_step
        plain = variants_of(replace(method, activation_ranges="shared"), {})
        assert [variant.name for variant in plain] == [variant.name for variant in (*rivals, own)]
    # what is called dynamic is so whatever the settings say
    dynamic = next(rival for rival in variants_of(QuantizationCalibration(activation_mode="static"), {})
                   if rival.name == "dynamic")  # fmt: skip
    form = dynamic.form("", QuantizationCalibration(activation_mode="static").form, 8)
    assert form == QuantizationCalibration(rounding="nearest").form


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activation_mode": "dynamic"}, "needs activation_mode"),
        ({"activation_ranges": "all"}, "must be shared or step"),
        ({"torchao": True, "weight_symmetric": True, "balance": "scale"}, "not those of each token"),
    ],
)
def test_ranges_by_step_that_are_not_possible_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        QuantizationCalibration(**{"activation_mode": "static", "activation_ranges": "step", **options})


def test_samples_of_both_networks_are_written_under_the_names_of_their_prompts(tmp_path: Path) -> None:
    trainer, module, data = parts_of("sd", tmp_path, samples=3)
    module.num_inference_steps = 2
    work = checked_work(QuantizationCalibration(trajectory=2, **SETTINGS), trainer, module, data)
    first_validation(trainer, module, data)
    check_samples(work)
    write_samples(work, work.layers(Variant("dynamic", "none", "nearest")))
    noise, conditions = noise_of(data, "report", 3)
    prompts = module.prompts_of(conditions["label"])
    pictures = []
    for place in ("full_precision", "quantized"):
        folder = tmp_path / "samples" / place
        found = read_json(folder / "prompts.json")
        assert list(found.values()) == prompts and set(found) == {path.name for path in folder.glob("*.png")}
        with Image.open(folder / f"{prompts[0]}-0.png") as picture:
            pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
    expected = work.images(Reference(noise, conditions["label"], [], torch.empty(0)))[0].clamp(-1, 1)
    assert torch.allclose(pictures[0], expected, atol=1 / 127) and not torch.equal(*pictures)
    assert sample_names(["a/b", "a b", "c"]) == ["a b-0", "a b-1", "c-0"]


def test_processes_write_samples_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first one the names of all, in the order of the draw."""
    noise, prompts = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 4, 4), [f"class {i}" for i in range(5)]
    monkeypatch.setattr("genlight.loops.quantization_samples.noise_of", lambda *_: (noise, {"label": torch.arange(5)}))
    made, sent, both = ([], []), {}, Barrier(2, timeout=30)

    def process(rank: int) -> None:
        def broadcast(value: Any, src: int) -> Any:
            if rank == src:
                sent[src] = value
            both.wait()
            found = sent[src]
            both.wait()
            return found

        def images(batch: Reference) -> Tensor:
            made[rank].append(len(batch.noise))
            return batch.noise

        strategy, data = SimpleNamespace(broadcast=broadcast), SimpleNamespace(num_samples=5, eval_batch_size=2)
        trainer = SimpleNamespace(global_rank=rank, is_global_zero=rank == 0, strategy=strategy)
        evaluations = SimpleNamespace(shares=2, trainer=trainer, display=SimpleNamespace(counted=lambda work: work))
        work: Any = SimpleNamespace(
            folder=tmp_path, module=None, datamodule=data, evaluations=evaluations, images=images,
            replaced=lambda layers: nullcontext(),
        )  # fmt: skip
        write_samples(work, {})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(process, range(2)))
    assert made == ([2, 1] * 2, [2] * 2)
    for place in ("full_precision", "quantized"):
        found = read_json(tmp_path / "samples" / place / "prompts.json")
        assert list(found.items()) == [(f"{prompt}-0.png", prompt) for prompt in prompts]
        assert {path.name for path in (tmp_path / "samples" / place).glob("*.png")} == set(found)


class Slow(nn.Module):
    """A layer that takes so many seconds more."""

    def __init__(self, layer: nn.Module, seconds: float = 0.1) -> None:
        super().__init__()
        self.layer, self.seconds = layer, seconds

    def forward(self, *given: Tensor, **options: Any) -> Any:
        time.sleep(self.seconds)
        return self.layer(*given, **options)


def test_both_networks_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, module, data = parts_of("sd", tmp_path, samples=2)
    module.num_inference_steps = 2
    work = checked_work(QuantizationCalibration(trajectory=2, **SETTINGS), trainer, module, data)
    first_validation(trainer, module, data)
    name, plain = next(iter(work.calibrated.layers.items()))
    slower = step_times(work, {name: Slow(plain)}, rounds=2)
    assert all(quantized - full > 50 for full, quantized in zip(slower.full, slower.quantized, strict=True))
    assert work.network.get_submodule(name) is plain

    monkeypatch.setattr("torch.compile", lambda network, backend=None: Slow(network, 0.1 if backend else 0.0))
    found = compiled_times(work, {name: plain}, rounds=1)
    assert isinstance(found, StepTimes) and found.compiled and found.quantized[0] - found.full[0] > 50
    monkeypatch.setattr("torch.compile", lambda network, backend=None: Slow(network, -1))
    assert compiled_times(work, {name: plain}) == "sleep length must be non-negative"
    assert step_times(work, {name: plain}, rounds=1).full


@pytest.mark.parametrize(
    ("kind", "compiled", "both"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_networks_are_compiled_on_a_gpu_if_asked(
    kind: str, compiled: bool, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = StepTimes([2.0], [1.0])
    for name in ("step_times", "compiled_times"):
        monkeypatch.setattr(quantization_speed, name, lambda *_: times)
    monkeypatch.setattr(quantization_speed, "device_name", str)
    strategy = SimpleNamespace(root_device=torch.device(kind))
    evaluations = SimpleNamespace(trainer=SimpleNamespace(strategy=strategy))
    work: Any = SimpleNamespace(evaluations=evaluations, method=QuantizationCalibration(compiled=compiled))
    assert measured_speeds(work, {}).compiled == (times if both else None)


def test_faster_is_what_is_faster_in_every_round() -> None:
    assert milliseconds([3.0, 1.0, 2.5, 2.0]) == {"ms": 2.25, "ms_low": 1.0, "ms_high": 3.0}
    assert StepTimes([4, 6, 5], [2, 2, 2]).verdict("W8A8", "cpu, 1 threads") == (
        "W8A8 takes 2 ms against 5 ms a step of one sample, both without torch.compile: 2.5 times as fast (2 to 3) as "
        "full precision on this machine (cpu, 1 threads)"
    )
    for full, ratios in (([1.8, 4, 6], "2 times as fast (0.9 to 3)"), ([1, 1, 1], "0.5 times as fast (0.5 to 0.5)")):
        verdict = StepTimes(full, [2, 2, 2]).verdict("W8A8", "GPU")
        assert verdict.startswith("simulated: not faster on this machine (GPU): ") and verdict.endswith(ratios)
    plain, compiled = StepTimes([4, 4], [2, 2]), StepTimes([1, 1], [2, 2], compiled=True)
    assert Speeds(plain, "GPU", compiled).verdict("W8A8") == compiled.verdict("W8A8", "GPU")
    assert "2 ms against 1 ms a step of one sample, both with torch.compile" in compiled.verdict("W8A8", "GPU")
    failed = Speeds(plain, "GPU", "no compiler").verdict("W8A8")
    assert failed == f"{plain.verdict('W8A8', 'GPU')}; torch.compile failed: no compiler"
