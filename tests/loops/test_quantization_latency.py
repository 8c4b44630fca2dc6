"""Bits within a limit of milliseconds: what is measured, what is kept, and what the report says."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops.test_quantization_bits import QUALITY, entry_of, work_of
from loops.test_quantization_libraries import KEEP
from loops.test_viditq_pipeline import parts_of

from genlight.errors import UserError
from genlight.io import read_json
from genlight.loops import quantization_bits, quantization_latency
from genlight.loops.quantization_bits import BitChoices, allocated_bits
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_latency import FILE, LayerTimes, latency_notes, layer_times, measured_latency
from genlight.loops.quantization_sensitivity import probes_of
from genlight.loops.quantization_settings import MixedBits
from genlight.loops.quantization_work import QuantizationWork, checked_work

GROUPS = dict.fromkeys(("a", "b", "c", "d", "e"), QUALITY)
MIXED = MixedBits((2, 4, 8), average_bits=None, milliseconds=6.0)


def program_of(mixed: MixedBits, times: LayerTimes, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    monkeypatch.setattr(quantization_bits, "layer_times", lambda work, choices: times)
    work = work_of(GROUPS)
    return work, [entry_of(work, *probe) for probe in probes_of(mixed, GROUPS)]


def times_of(seed: int = 0, *, slow_two: bool = False) -> LayerTimes:
    """Eight bits take most; two bits least, or as simulated layers more than four."""
    rng = np.random.default_rng(seed)
    layers = {}
    for name in GROUPS:
        first, second, third = sorted(rng.uniform(0.2, 2.0, 3).tolist())
        two, four = (second, first) if slow_two else (first, second)
        layers[name] = {"2": two, "4": four, "8": third}
    return LayerTimes("cpu, one thread", 16, 5.0, 1.5, layers)


@pytest.mark.parametrize(("seed", "slow_two"), [(0, False), (1, False), (2, True), (3, True)])
def test_the_least_noise_within_the_milliseconds(seed: int, slow_two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every one of 243 plans."""
    times = times_of(seed, slow_two=slow_two)
    work, found = program_of(MIXED, times, monkeypatch)
    fastest = times.call(sum(min(round(1000 * ms) for ms in each.values()) for each in times.layers.values()))
    mixed = replace(MIXED, milliseconds=round(fastest + 1.0, 3))
    plans, facts = allocated_bits(work, mixed, found)
    noise = {(entry.layer, entry.bits): entry.noise for entry in found}
    best = np.inf
    for bits in product((2, 4, 8), repeat=len(GROUPS)):
        chosen = list(zip(GROUPS, bits, strict=True))
        if times.predicted({name: (own, None) for name, own in chosen}) <= mixed.milliseconds:
            best = min(best, sum(noise[each] for each in chosen))
    assert sum(noise[name, bits] for name, (bits, _) in plans["mixed"].items()) == pytest.approx(best)
    assert facts["latency"]["predicted"] == times.predicted(plans["mixed"]) <= mixed.milliseconds
    assert "mixed" not in facts["latency"]["over"]
    assert [way for way in plans if times.predicted(plans[way]) > mixed.milliseconds] == facts["latency"]["over"]
    # as with any other limit, what is asked for may be the least itself
    least = BitChoices(work, replace(mixed, milliseconds=fastest), found)
    assert least.limits["milliseconds"] == least.costs["milliseconds"].min(axis=1).sum()
    with pytest.raises(UserError, match=rf"method.mixed: milliseconds = 0.1 is below {fastest:.3f}, the least that"):
        allocated_bits(work, replace(mixed, milliseconds=0.1), found)


def test_where_bits_buy_no_time_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(times: LayerTimes) -> list[str]:
        work, found = program_of(MIXED, times, monkeypatch)
        facts = allocated_bits(work, replace(MIXED, milliseconds=6.5), found)[1]["latency"]
        return latency_notes("MixDQ", {**facts, "measured": 6.25})

    same = LayerTimes("cpu", 16, 8.0, 1.0, {name: {"2": 0.97, "4": 1.04, "8": 1.0} for name in GROUPS})
    first, second = notes(same)
    assert first == (
        "one call of the network with 16 samples, in milliseconds: limit 6.5, predicted 6, measured 6.25; full "
        "precision 8 (cpu, without torch.compile)"
    )
    assert second.startswith("fewer bits make nothing faster on this machine (cpu)")
    faster = replace(same, layers={name: {"2": 0.5, "4": 0.7, "8": 1.0} for name in GROUPS})
    assert len(notes(faster)) == 1
    slower = replace(same, layers={name: {"2": 1.3, "4": 1.2, "8": 1.0} for name in GROUPS})
    assert notes(slower)[1:] == [notes(same)[1], notes(slower)[2]]
    assert "begin with the fewest bits: MixDQ mixed, greedy" in notes(slower)[2]
    assert latency_notes("MixDQ", None) == []


def work_in(folder: Path) -> QuantizationWork:
    trainer, module, data = parts_of("sd", folder, samples=2)
    module.num_inference_steps = 1
    method = QuantizationCalibration(keep=KEEP, samples=2, trajectory=2, rounding="nearest", balance="scale")
    return checked_work(method, trainer, module, data)


def test_layers_of_one_shape_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, real = list[str](), quantization_latency._by_turns

    def noted(work: Any, name: str, *rest: Any) -> Any:
        measured.append(name)
        return real(work, name, *rest)

    monkeypatch.setattr(quantization_latency, "_by_turns", noted)
    work = work_in(tmp_path)
    choices: dict[str, Any] = {name: [(4, None), (8, None)] for name in work.forms}
    before = dict(work.network.named_modules())
    times = layer_times(work, choices)
    kinds = {repr(work.network.get_submodule(name)) for name in work.forms}
    assert len(kinds) <= len(measured) < len(work.forms)
    assert dict(work.network.named_modules()) == before
    assert all(set(own) == {"4", "8"} and min(own.values()) > 0 for own in times.layers.values())
    alike = [times.layers[name] for name in work.forms if name.endswith(("attn1.to_q", "attn1.to_k"))]
    assert len(alike) > 1 and all(own == alike[0] for own in alike)
    assert times.whole > 0 and times.rest < times.whole
    assert times.predicted({name: (4, None) for name in work.forms}) > 0
    assert measured_latency(work, {}) > 0
    # a resumed run reads; on another machine it measures
    measured.clear()
    assert layer_times(work, choices) == times and not measured
    assert read_json(tmp_path / FILE)["times"]["machine"] == times.machine
    monkeypatch.setattr(quantization_latency, "device_name", lambda device: "another")
    assert layer_times(work, choices).machine == "another" and measured
