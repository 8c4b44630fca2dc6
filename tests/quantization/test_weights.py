"""Quantized weights: granularity, groups that do not divide, clipping, and the agreement of packed and plain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.quantization.formats import ActivationFormat, WeightFormat
from genlight.quantization.uniform import BITS
from genlight.quantization.weights import quantize_weight, weight_grid


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMS = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"granularity": "group", "group_size": 8},
]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from(list(BITS)),
    symmetric=st.booleans(),
    form=st.sampled_from(FORMS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 29)),
    seed=st.integers(0, 999),
)
def test_numbers_are_those_of_each_part_by_itself(
    bits: int, symmetric: bool, form: dict[str, object], shape: tuple[int, int], seed: int
) -> None:
    """Whatever shares a scale is quantized as if it stood alone, also a last group that is shorter."""
    weight = randn(*shape, seed=seed)
    found = quantize_weight(weight, WeightFormat(bits, symmetric, **form)).dequantized()  # type: ignore[arg-type]
    alone = WeightFormat(bits, symmetric, "tensor")
    size = 8 if form["granularity"] == "group" else shape[1]
    parts = [weight] if form["granularity"] == "tensor" else list(weight.split(1))
    rows = [
        torch.cat([quantize_weight(group, alone).dequantized() for group in part.split(size, dim=1)], dim=1)
        for part in parts
    ]
    assert torch.equal(found, torch.cat(rows))


def test_shapes_of_scales() -> None:
    weight = randn(6, 20)
    assert quantize_weight(weight, WeightFormat(4, granularity="tensor")).grid.scale.shape == (1, 1)
    assert quantize_weight(weight, WeightFormat(4)).grid.scale.shape == (6, 1)
    grouped = quantize_weight(weight, WeightFormat(4, granularity="group", group_size=8))
    assert grouped.grid.scale.shape == (6, 3) and grouped.codes.shape == (6, 10)


def test_finer_scales_round_better() -> None:
    weight = randn(32, 128) * torch.logspace(-1, 1, 32)[:, None] * torch.logspace(-0.5, 0.5, 128)
    errors = [
        float((quantize_weight(weight, WeightFormat(4, **form)).dequantized() - weight).square().sum())  # type: ignore[arg-type]
        for form in FORMS
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_error_it_looks_at(form: dict[str, object], symmetric: bool) -> None:
    weight = randn(8, 44) ** 3
    importance = randn(44, seed=1).exp()
    moments = torch.diag(importance)

    def error(clip: str, weights: torch.Tensor) -> float:
        found = quantize_weight(weight, WeightFormat(3, symmetric, clip=clip, **form), moments)  # type: ignore[arg-type]
        return float((weights * (found.dequantized() - weight).square()).sum())

    ones = torch.ones(44)
    assert error("mse", ones) < 0.95 * error("none", ones)
    assert error("hessian", importance) < error("mse", importance)
    assert error("mse", ones) <= error("hessian", ones)


def test_clipping_is_the_best_of_all_ranges_tried() -> None:
    """By brute force over the ranges, for a row."""
    weight = randn(1, 200, seed=3)
    form = WeightFormat(2, clip="mse")
    errors = []
    for i in range(36):
        step = float(weight.abs().max()) * (1 - 0.02 * i)
        errors.append(float(((weight / step).round().clamp(-2, 1) * step - weight).square().sum()))
    found = quantize_weight(weight, form).dequantized()
    assert float((found - weight).square().sum()) == pytest.approx(min(errors), rel=1e-5)


def test_dead_weights_stay_zero_and_leave_others_alone() -> None:
    weight = randn(4, 16)
    weight[2] = 0
    for symmetric in (True, False):
        for clip in ("none", "mse"):
            found = quantize_weight(weight, WeightFormat(4, symmetric, clip=clip)).dequantized()  # type: ignore[arg-type]
            assert torch.equal(found[2], torch.zeros(16))
            others = quantize_weight(weight[[0, 1, 3]], WeightFormat(4, symmetric, clip=clip))  # type: ignore[arg-type]
            assert torch.equal(found[[0, 1, 3]], others.dequantized())


def test_what_cannot_be_quantized_is_refused() -> None:
    weight = randn(4, 8)
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight / 0, WeightFormat(4))
    with pytest.raises(ValueError, match="hessian"):
        quantize_weight(weight, WeightFormat(4, rounding="gptq"))
    with pytest.raises(ValueError, match=r"hessian of shape \[3, 3\] must be \[8, 8\]"):
        quantize_weight(weight, WeightFormat(4, clip="hessian"), torch.eye(3))
    with pytest.raises(ValueError, match="importance"):
        weight_grid(weight, WeightFormat(4, clip="hessian"))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"bits": 9}, "weight.bits"),
        ({"bits": 1}, "weight.bits"),
        ({"granularity": "row"}, "weight.granularity"),
        ({"granularity": "group"}, "weight.group_size"),
        ({"group_size": 8}, "weight.group_size"),
        ({"granularity": "group", "group_size": 0}, "weight.group_size"),
        ({"rounding": "up"}, "weight.rounding"),
        ({"clip": "l1"}, "weight.clip"),
        ({"damping": -0.1}, "weight.damping"),
    ],
)
def test_wrong_formats_name_their_field(values: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        WeightFormat(**values)  # type: ignore[arg-type]


def test_wrong_activation_formats_name_their_field() -> None:
    with pytest.raises(ValueError, match=r"activation\.bits"):
        ActivationFormat(12)
    with pytest.raises(ValueError, match=r"activation\.mode"):
        ActivationFormat(mode="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation\.granularity"):
        ActivationFormat(mode="static", granularity="token")
