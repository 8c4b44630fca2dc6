"""Bits chosen from what layers do alone, of a network that is made up: what is predicted, who may have what."""

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from genlight.errors import UserError
from genlight.loops.quantization_bits import BitChoices, allocated_bits, check_budget, ways_of
from genlight.loops.quantization_calibrate import QuantizationCalibration
from genlight.loops.quantization_report import _unproved
from genlight.loops.quantization_sensitivity import (
    FILE,
    Sensitivity,
    _header,
    measure_sensitivity,
    measured_layer,
    probes_of,
)
from genlight.loops.quantization_settings import GroupSettings, MixedBits, check_groups, check_metrics
from genlight.loops.quantization_variants import VariantRows
from genlight.quantization.convert import quantize_layer
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.recipe import CalibratedNetwork
from genlight.quantization.trajectory import decibels
from genlight.run_folder import config_differences
from genlight.runner import FREE_KEYS
from genlight.search.archive import seal

CONTENT, QUALITY = GroupSettings("c", "ssim"), GroupSettings("q")
GROUPS = {"c1": CONTENT, "c2": CONTENT, "c3": CONTENT, "q1": QUALITY, "q2": QUALITY}
MIXED = MixedBits((2, 4, 8), (4, 8, 16), average_bits=4.5, average_activation_bits=8.0, ratios=(0.8, 1.0))


def work_of(groups: Mapping[str, GroupSettings]) -> Any:
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 4 + 4 * index) for index, name in enumerate(groups)}
    return SimpleNamespace(
        method=QuantizationCalibration("MixDQ", split_shortcuts=True, rounding="nearest", activation_mode="static"),
        forms=dict.fromkeys(groups, LayerFormat()),
        groups=groups,
        metrics={name: group.metric for name, group in groups.items()},
        calibrated=SimpleNamespace(layers=layers),
        network=nn.ModuleDict(layers),
        inputs={name: 10 + index for index, name in enumerate(groups)},
        macs={name: layer.weight.numel() for name, layer in layers.items()},
        image_error=lambda variant, samples: 0.1,
    )


def entry_of(work: Any, name: str, bits: int, activation: int | None) -> Sensitivity:
    """Content is hurt most where predictions are least."""
    place, levels = list(work.forms).index(name), 4.0 ** -min(bits, activation or 16)
    ssim = 1 - 0.3 * levels * 30 ** (place - 2) if work.metrics[name] == "ssim" else None
    noise, size = 10 * levels * 8.0**-place, work.calibrated.layers[name].weight.numel()
    noise = 0.0 if bits == activation == 16 else noise
    return Sensitivity(
        name, bits, activation, noise, None, ssim, None, None, noise / 2, 0.01 * levels, size * bits // 8
    )


def plans_of(
    mixed: MixedBits, groups: Mapping[str, GroupSettings] = GROUPS
) -> tuple[dict[str, Any], dict[str, Any], dict[Any, Sensitivity]]:
    work = work_of(groups)
    found = [entry_of(work, *probe) for probe in probes_of(mixed, groups)]
    return *allocated_bits(work, mixed, found), {(e.layer, e.bits, e.activation_bits): e for e in found}


@pytest.mark.parametrize("objective", ["noise_power", "sum_db", "group_budgets"])
def test_the_prediction_is_that_of_the_artifact(objective: Any) -> None:
    plans, facts, found = plans_of(replace(MIXED, objective=objective))

    def predicted(way: str) -> float:
        return decibels(sum(found[n, w, 16].noise + found[n, 16, a].noise for n, (w, a) in plans[way].items()))

    assert facts["predicted_sqnr"] == pytest.approx(predicted("mixed"))
    assert predicted("mixed") < predicted("mixed, one metric") - 0.1
    assert facts["optimality_gap"] == 0 and not facts["unproved"]
    for name, front in (("average_bits", facts["front"]), ("megabytes", facts["memory_front"])):
        assert len(front) == 9 and all(one[name] < other[name] for one, other in pairwise(front))
        assert all(one["predicted_sqnr"] <= other["predicted_sqnr"] for one, other in pairwise(front))
    assert facts["front"][-1]["average_bits"] == 8
    assert plans["uniform bits"] == dict.fromkeys(GROUPS, (4, 8))


def test_budgets_of_groups_are_a_rival_or_the_method() -> None:
    as_rival, _, _ = plans_of(MIXED)
    as_method, _, _ = plans_of(replace(MIXED, objective="group_budgets"))
    assert as_method["mixed"] == as_rival["mixed by group budgets"] != as_rival["mixed"]
    assert [way for way in as_rival if way not in as_method] == ["mixed by group budgets"]
    with pytest.raises(ValueError, match="needs ratios"):
        MixedBits(objective="group_budgets")


def test_what_is_not_rounded_does_not_outweigh_all_else() -> None:
    """In sums of dB an input in 16 bits counts as in 8, not as 200 dB; budgets of groups, as the paper's, have none."""
    work = work_of(GROUPS)
    found = [entry_of(work, *probe) for probe in probes_of(MIXED, GROUPS)]
    program = BitChoices(work, MIXED, found)
    four, eight, sixteen = (program.choices.index((8, bits)) for bits in (4, 8, 16))
    gains = program.decibels[:, [four]] - program.decibels
    assert gains[:, sixteen] == pytest.approx(gains[:, eight]) and (gains[:, eight] > 20).all()
    assert {inputs for _, inputs in plans_of(MIXED)[0]["mixed by group budgets"].values()} == {8}
    alone = replace(MIXED, activation_choices=(16,), average_activation_bits=None)
    assert {inputs for _, inputs in plans_of(alone)[0]["mixed by group budgets"].values()} == {16}


@pytest.mark.parametrize(
    ("limits", "least"),
    [
        ({"average_bits": 4.2}, 4.4),
        ({"average_bits": None, "bit_operations": 0.3}, 0.55),
        ({"average_bits": None, "megabytes": 1e-4}, 0.0002),
    ],
    ids=["average_bits", "bit_operations", "megabytes"],
)
def test_a_limit_below_the_least_is_refused_in_its_own_unit(limits: dict[str, Any], least: float) -> None:
    """Before layers are measured, of what their weights, inputs and multiplications come to."""
    groups = {"a": GroupSettings(weight_bits=8), "b": GroupSettings(), "c": GroupSettings(), "d": GroupSettings()}
    work, mixed = work_of(groups), MixedBits((4, 8), **limits)
    ((name, value),) = ((name, value) for name, value in limits.items() if value is not None)
    with pytest.raises(UserError, match=rf"^method.mixed: {name} = {value:g} is below {least:g}, the least that"):
        check_budget(work, mixed)
    check_budget(work, replace(mixed, **{name: least}))
    found = [entry_of(work, *probe) for probe in probes_of(mixed, groups)]
    with pytest.raises(UserError, match=rf"^method.mixed: {name} = {value:g} is below {least:g}, the least that"):
        allocated_bits(work, mixed, found)


def test_bits_that_no_layer_can_have_are_refused() -> None:
    for choices in ((4, 12), (1, 8), (4.5, 8), (True, 8)):
        with pytest.raises(ValueError, match=r"^choices = .* must be whole numbers from 2 to 8, or 16"):
            MixedBits(choices, average_bits=6.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^activation_choices = \[0, 8\] must be whole numbers .*, not 0$"):
        MixedBits((4, 16), (0, 8), average_bits=6.0)


def test_an_answer_that_is_not_proved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    proved, _, _ = plans_of(MIXED)
    monkeypatch.setattr("genlight.quantization.allocation._MOST_WORK", 0.0)
    plans, facts, _ = plans_of(MIXED)
    assert plans["mixed, one metric"] == proved["mixed, greedy"] and facts["optimality_gap"] > 0
    assert facts["unproved"] == [
        "mixed", "mixed by weight error", "mixed by proxy", "mixed, one metric",
        "mixed, one sum of dB for all layers", "mixed by group budgets",
    ]  # fmt: skip
    (note,) = _unproved("MixDQ", facts)
    assert note.startswith("not proved to be the best") and "MixDQ mixed by proxy, " in note
    assert not _unproved("MixDQ", {**facts, "unproved": []})


def test_a_group_chooses_among_its_own_bits() -> None:
    groups = {"c1": CONTENT, "c2": GroupSettings("c2", "ssim", activation_bits=8),
              "q1": GroupSettings("q", weight_bits=[4, 8]), "q2": GroupSettings("q", weight_bits=4)}  # fmt: skip
    probes = probes_of(MIXED, groups)
    assert {(n, w) for n, w, a in probes if a == 16 and w == 2} == {("c1", 2), ("c2", 2)}
    assert [probe for probe in probes if probe[0] == "c2" and probe[1] == 16] == [("c2", 16, 8)]
    plans, _, _ = plans_of(MIXED, groups)
    assert list(plans) == list(ways_of(MIXED))
    for plan in plans.values():
        assert plan["c2"][1] == 8 and plan["q1"][0] in (4, 8) and plan["q2"][0] == 4
    only = MixedBits((2, 4, 8), average_bits=4.5)
    assert {plan["q2"] for plan in plans_of(only, groups)[0].values()} == {(4, None)}


@pytest.mark.parametrize(
    ("group", "mixed", "expected"),
    [
        (
            {"weight_bits": [3, 8]},
            MIXED,
            r"weight_bits = \[3, 8\] of a group must be among mixed.choices = \[2, 4, 8\]",
        ),
        ({"activation_bits": 6}, MIXED, r"activation_bits = \[6\] of a group must be among mixed.activation_choices"),
        ({"activation_bits": [8]}, MixedBits(), "needs mixed.activation_choices: give one number"),
        ({"weight_bits": [4, 8]}, None, "needs mixed bits: give one number"),
        ({"weight_bits": []}, MIXED, "at least one number"),
    ],
)
def test_bits_of_a_group_that_cannot_be_are_refused(group: Any, mixed: MixedBits | None, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_groups([GroupSettings(**group)], mixed)


def probing(metric: Any, noise: float, images: torch.Tensor | None) -> Any:
    """The work of measuring one layer, whose images are asked for only where there are some."""
    plain = nn.Linear(8, 4)
    statistics: Any = SimpleNamespace(sample=torch.randn(5, 8))
    form = LayerFormat(WeightFormat(4), ActivationFormat(16))

    def sampled(reference: Any) -> torch.Tensor:
        assert images is not None, "nobody asked for images"
        return images

    return SimpleNamespace(
        method=QuantizationCalibration(),
        metrics={"layer": metric},
        calibrated=CalibratedNetwork({"layer": plain}, (("layer",),), {"layer": statistics}),
        layers_of=lambda variant, names: {"layer": quantize_layer(plain, form)},
        reference=lambda draw, count: SimpleNamespace(images=torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)),
        replaced=lambda layers: nullcontext(),
        noise=lambda reference: noise,
        images=sampled,
        full_metric=lambda name, samples: 31.5,
        metric=lambda name, samples: noise,
    )


def test_images_are_sampled_where_they_judge() -> None:
    assert measured_layer(probing("sqnr", 0.1, None), MIXED, "layer", 4, 16).ssim is None
    images = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    assert measured_layer(probing("ssim", 0.1, images), MIXED, "layer", 4, 16).ssim == 1
    every = replace(MIXED, every_metric=True)
    assert measured_layer(probing("sqnr", 0.1, images), every, "layer", 4, 16).ssim == 1


def test_a_metric_of_the_run_judges_by_how_far_it_moves() -> None:
    entry = measured_layer(probing("val/clip_score", 30.0, None), MIXED, "layer", 4, 16)
    assert (entry.shift, entry.loss("val/clip_score"), entry.loss("sqnr")) == (1.5, 1.5, 30.0)
    with pytest.warns(UserWarning, match="not finite"):
        assert measured_layer(probing("val/clip_score", math.nan, None), MIXED, "layer", 4, 16).shift == 1e6
    logged = ["val/clip_score", "val/is", "val/is_std"]
    check_metrics([GroupSettings("a", "val/is"), GroupSettings()], logged)
    with pytest.raises(UserError, match=r"metric=val/fid: .* choose one of sqnr, .* val/clip_score, val/is$"):
        check_metrics([GroupSettings("a", "val/fid")], logged)
    with pytest.raises(ValueError, match="or val/<name>"):
        GroupSettings("a", "clip_score")


@pytest.mark.parametrize("noise", [math.nan, math.inf])
def test_what_overflows_is_the_worst_and_can_be_kept(noise: float) -> None:
    work = probing("ssim", noise, torch.full((1, 1, 8, 8), math.nan))
    with pytest.warns(UserWarning, match="layer with 4 bits a weight and 16 an input: predictions are not finite"):
        entry = measured_layer(work, MIXED, "layer", 4, 16)
    assert entry.noise == 100 and entry.psnr is not None and entry.psnr < 10 and entry.loss("ssim") > 0.5
    assert json.loads(seal(asdict(entry)))["noise"] == 100


def test_another_budget_measures_nothing_again(tmp_path: Any) -> None:
    """Limits may change on resuming, and a row belongs to its bits, however they were chosen."""
    then = {"method": {"mixed": {"average_bits": 4.0, "milliseconds": None, "ratios": [], "samples": 8}}}
    now = {"method": {"mixed": {"average_bits": None, "milliseconds": 2.0, "ratios": [1.0], "samples": 8}}}
    assert not config_differences(then, now, FREE_KEYS)
    assert config_differences(then, {"method": {"mixed": {**then["method"]["mixed"], "samples": 4}}}, FREE_KEYS)
    keys = set()
    for mixed in (MIXED, replace(MIXED, average_bits=5.0), None):
        method = QuantizationCalibration(mixed=mixed)
        trainer = SimpleNamespace(precision="32", is_global_zero=True)
        evaluations = SimpleNamespace(trainer=trainer, agreed=lambda rows: rows)
        data = SimpleNamespace(num_samples=2)
        work: Any = SimpleNamespace(
            folder=tmp_path, fingerprint={}, method=method, datamodule=data, evaluations=evaluations
        )
        keys.add(repr(VariantRows(work, [])._settings))
    assert len(keys) == 1


def test_what_was_measured_with_one_range_for_all_steps_is_of_another_calibration(tmp_path: Path) -> None:
    """Than that of ranges by step."""
    work = work_of(GROUPS)
    work.folder, work.fingerprint = tmp_path, {}
    work.evaluations = SimpleNamespace(trainer=None, display=None, agreed=lambda found: found)
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(_header(work, MIXED) + "\n")
    work.method = replace(work.method, activation_ranges="step")
    with pytest.raises(UserError, match="another calibration: inputs differ"):
        measure_sensitivity(work, MIXED)
