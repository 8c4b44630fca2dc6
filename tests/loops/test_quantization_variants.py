"""What is kept of variants that were measured, and whether the quantized network is faster, on a tiny pipeline."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loops.test_quantization_libraries import KEEP
from loops.test_viditq_pipeline import parts_of
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.io import CorruptFileError
from genlight.loops.cost import first_validation
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_speed import StepTimes, milliseconds, step_times
from genlight.loops.quantization_variants import FILE, VariantRows
from genlight.loops.quantization_work import QuantizationWork, checked_work
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


class Slow(nn.Module):
    """A layer that takes 100 ms more."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Any:
        time.sleep(0.1)
        return self.layer(inputs)


def test_both_networks_take_turns(tmp_path: Path) -> None:
    trainer, module, data = parts_of("sd", tmp_path, samples=2)
    module.num_inference_steps = 2
    work = checked_work(QuantizationCalibration(trajectory=2, **SETTINGS), trainer, module, data)
    first_validation(trainer, module, data)
    name, plain = next(iter(work.calibrated.layers.items()))
    slower = step_times(work, {name: Slow(plain)}, rounds=2)
    assert all(quantized - full > 50 for full, quantized in zip(slower.full, slower.quantized, strict=True))
    assert work.network.get_submodule(name) is plain


def test_faster_is_what_is_faster_in_every_round() -> None:
    assert milliseconds([3.0, 1.0, 2.5, 2.0]) == {"ms": 2.25, "ms_low": 1.0, "ms_high": 3.0}
    assert StepTimes([4, 6, 5], [2, 2, 2]).verdict("W8A8", "cpu, 1 threads") == (
        "W8A8 takes 2 ms against 5 ms a step of one sample: 2.5 times as fast (2 to 3) as full precision on this "
        "machine (cpu, 1 threads)"
    )
    for full, ratios in (([1.8, 4, 6], "2 times as fast (0.9 to 3)"), ([1, 1, 1], "0.5 times as fast (0.5 to 0.5)")):
        verdict = StepTimes(full, [2, 2, 2]).verdict("W8A8", "GPU")
        assert verdict.startswith("simulated: not faster on this machine (GPU): ") and verdict.endswith(ratios)
