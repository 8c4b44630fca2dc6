"""Balances and layers from a calibration, in closed form where there is one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from genlight.quantization.balance import Balance
from genlight.quantization.formats import ActivationFormat, LayerFormat, WeightFormat
from genlight.quantization.observers import InputObserver
from genlight.quantization.recipe import (
    BalanceSettings,
    CalibratedNetwork,
    balanced_input,
    dequantized_layer,
    layer_noise,
    overall_range,
    quantized_layer,
    shared_range,
    step_ranges,
    weight_error,
    with_bits,
)
from genlight.quantization.statistics import StatisticsSettings

FORM = LayerFormat(WeightFormat(4, symmetric=False), ActivationFormat(8))


def calibrated() -> CalibratedNetwork:
    """Two layers with one input of 32 channels, one of which stands out thirtyfold."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"q": nn.Linear(32, 16), "k": nn.Linear(32, 24)})
    observer = InputObserver(network, ["q"], StatisticsSettings(hessian=torch.float32, sample_rows=64))
    values = torch.randn(64, 32)
    values[:, 5] *= 30
    with observer:
        network["q"](values)
    layers = {name: network[name] for name in ("q", "k")}
    return CalibratedNetwork(layers, (("q", "k"),), observer.statistics)


@pytest.mark.parametrize("kind", ["none", "scale", "rotation", "static_dynamic"])
def test_each_kind_has_its_parts_and_float_layers_are_exact(kind: str) -> None:
    network, untouched = calibrated(), LayerFormat(WeightFormat(16), ActivationFormat(16))
    found = balanced_input(network, 0, FORM, BalanceSettings(kind))
    scaled, rotated = kind in ("scale", "static_dynamic"), kind in ("rotation", "static_dynamic")
    assert (found.balance.scale is not None) == scaled == (found.alpha is not None)
    assert (found.balance.rotation is not None) == rotated
    for name in ("q", "k"):
        layer = quantized_layer(network, name, untouched, found.balance)
        assert layer_noise(network, name, layer) < 1e-11
        quantized = quantized_layer(network, name, FORM, found.balance)
        assert layer_noise(network, name, quantized) > 1e-6
        assert weight_error(network.layers[name], quantized) > 0


def test_static_dynamic_balance_beats_its_parts_on_static_outliers() -> None:
    """At eight bits, where inputs decide."""
    network, form = calibrated(), with_bits(FORM, 8)
    noise = {}
    for kind in ("none", "scale", "rotation", "static_dynamic"):
        balance = balanced_input(network, 0, form, BalanceSettings(kind)).balance
        noise[kind] = layer_noise(network, "q", quantized_layer(network, "q", form, balance))
    assert noise["static_dynamic"] <= 1.1 * noise["scale"] < noise["rotation"] < noise["none"]


def test_a_given_alpha_is_used_and_the_search_is_not_worse() -> None:
    network, form = calibrated(), with_bits(FORM, 8)
    one = balanced_input(network, 0, form, BalanceSettings("scale", alpha=0.01))
    assert one.alpha == 0.01
    best = balanced_input(network, 0, form, BalanceSettings("scale"))

    def noise(balance: object) -> float:
        return sum(layer_noise(network, n, quantized_layer(network, n, form, balance)) for n in ("q", "k"))  # type: ignore[arg-type]

    assert noise(best.balance) <= noise(one.balance)


def test_rotations_differ_by_seed_and_not_by_time() -> None:
    network = calibrated()
    signs = []
    for seed in (0, 0, 1):
        rotation = balanced_input(network, 0, FORM, BalanceSettings("rotation", seed=seed)).balance.rotation
        assert rotation is not None
        signs.append(rotation.signs)
    assert torch.equal(signs[0], signs[1]) and not torch.equal(signs[0], signs[2])


def test_a_dequantized_layer_has_the_weight_that_the_quantized_one_applies() -> None:
    network = calibrated()
    balance = balanced_input(network, 0, FORM, BalanceSettings()).balance
    layer = quantized_layer(network, "q", replace(FORM, activation=ActivationFormat(16)), balance)
    plain = dequantized_layer(network.layers["q"], layer)
    values = torch.randn(5, 32)
    assert torch.allclose(plain(values), layer(values), rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain.weight, network.layers["q"].weight)


def test_static_layers_have_one_range_for_all_steps() -> None:
    statistics = calibrated().statistics["q"]
    wide = replace(
        statistics,
        minimum=torch.tensor([[-1.0, -2.0], [-0.5, -4.0]]),
        maximum=torch.tensor([[3.0, 1.0], [2.0, 0.5]]),
    )
    assert overall_range(wide).tolist() == [[[-4.0, 3.0]]]
    by_step = step_ranges(wide, [0, 1])
    assert by_step.tolist() == [[[-1.0, 3.0], [-4.0, 1.0]]]
    assert torch.equal(shared_range(by_step), overall_range(wide)) and torch.equal(
        step_ranges(wide, [0, 0]), overall_range(wide)
    )
    # one call in the place of the second branch, and blocks left out of another
    nothing = torch.tensor([[False, True, False], [True, True, False]])
    torch.manual_seed(0)
    low = (torch.randn(2, 3) - 5).masked_fill(nothing, torch.inf)
    holes = replace(statistics, minimum=low, maximum=torch.ones(2, 3).masked_fill(nothing, -torch.inf))
    assert overall_range(holes).tolist() == [[[low.min().item(), 1.0]]]
    assert step_ranges(holes, [0, 0, 1])[0, 0].tolist() == [low[0, 0].item(), 1.0]
    with pytest.raises(ValueError, match="no input at timestep 2 of 3"):
        step_ranges(holes, [0, 1, 2])
    static = replace(FORM, activation=ActivationFormat(8, True, "static", "tensor"))
    layer = quantized_layer(
        calibrated(), "q", static, balanced_input(calibrated(), 0, FORM, BalanceSettings("none")).balance
    )
    assert layer.activation_range is not None and layer.activation_range.shape == (1, 1, 2)
    # the proxy, which does not know the steps of its rows, takes the range of all
    halves = torch.cat([layer.activation_range / 2, layer.activation_range], dim=1)
    by_step = quantized_layer(calibrated(), "q", static, Balance(), ranges=halves)
    assert layer_noise(calibrated(), "q", by_step) == layer_noise(calibrated(), "q", layer)


@pytest.mark.parametrize(
    "options",
    [{"kind": "some"}, {"alpha": 1.5}, {"alpha_grid": ()}, {"alpha_grid": (2.0,)}, {"reduce": "last"}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"balance|alpha|reduce"):
        BalanceSettings(**options)
