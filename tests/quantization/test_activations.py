"""Grids of inputs: dynamic ones see nothing but what they should, static ones come from the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.quantization.activations import activation_grid, dynamic_grid
from genlight.quantization.context import SamplingContext, current_context, sampling_context
from genlight.quantization.formats import ActivationFormat
from genlight.quantization.uniform import fake_quantize, quantize


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["token", "sample"]),
    seed=st.integers(0, 99),
)
def test_a_sample_is_rounded_as_if_it_were_alone(bits: int, symmetric: bool, granularity: str, seed: int) -> None:
    form = ActivationFormat(bits, symmetric, "dynamic", granularity)  # type: ignore[arg-type]
    values = randn(4, 6, 10, seed=seed) * torch.tensor([0.1, 1, 10, 100])[:, None, None]
    whole = fake_quantize(values, dynamic_grid(values, form))
    alone = [fake_quantize(part, dynamic_grid(part, form)) for part in values.split(1)]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_of_zeros_leaves_the_others_alone(symmetric: bool) -> None:
    form = ActivationFormat(8, symmetric)
    values = randn(2, 5, 12)
    padded = torch.cat([values, torch.zeros(2, 1, 12)], dim=1)
    found = fake_quantize(padded, dynamic_grid(padded, form))
    assert torch.equal(found[:, :5], fake_quantize(values, dynamic_grid(values, form)))
    assert torch.equal(found[:, 5], torch.zeros(2, 12))


def test_one_range_for_all_depends_on_the_batch_and_a_static_one_does_not() -> None:
    values = randn(3, 4, 8) * torch.tensor([1, 1, 50.0])[:, None, None]
    dynamic = ActivationFormat(8, mode="dynamic", granularity="tensor")
    first = fake_quantize(values, activation_grid(values, dynamic))[:1]
    assert not torch.equal(first, fake_quantize(values[:1], activation_grid(values[:1], dynamic)))
    static, ranges = ActivationFormat(8, False, "static", "tensor"), torch.tensor([[[-3.0, 3.0]]])
    first = fake_quantize(values, activation_grid(values, static, ranges))[:1]
    assert torch.equal(first, fake_quantize(values[:1], activation_grid(values[:1], static, ranges)))


STATIC = ActivationFormat(8, False, "static", "tensor")


def test_the_context_chooses_the_range_of_step_and_branch() -> None:
    ranges = torch.stack([torch.zeros(2, 5), torch.arange(1.0, 11).reshape(2, 5)], dim=-1)
    values = randn(4, 3, 6)
    with sampling_context(SamplingContext(step=3, num_steps=5, branches=(1, 0))):
        grid = activation_grid(values, STATIC, ranges)
    assert (grid.scale.flatten() * 255).tolist() == pytest.approx([9, 9, 4, 4])
    with sampling_context(SamplingContext(step=2, num_steps=5, branches=(1,))):
        grid = activation_grid(values, STATIC, ranges)
    assert grid.scale.shape == (1, 1, 1) and float(grid.scale) * 255 == pytest.approx(8)
    assert current_context() == SamplingContext()


def test_batched_branches_are_rounded_as_separate_passes() -> None:
    ranges = torch.tensor([[[-1.0, 2.0]], [[-5.0, 4.0]]])
    values = randn(6, 3, 6) * 2
    with sampling_context(SamplingContext(branches=(0, 1))):
        both = quantize(values, activation_grid(values, STATIC, ranges))
    for branch, part in enumerate(values.split(3)):
        with sampling_context(SamplingContext(branches=(branch,))):
            alone = quantize(part, activation_grid(part, STATIC, ranges))
        assert torch.equal(alone, both[3 * branch : 3 * branch + 3])


def test_tables_of_another_sampling_are_refused() -> None:
    values = randn(4, 6)
    with pytest.raises(ValueError, match="20 steps and the sampling has 1"):
        activation_grid(values, STATIC, torch.zeros(1, 20, 2))
    with (
        sampling_context(SamplingContext(branches=(0, 2))),
        pytest.raises(ValueError, match="2 guidance branches"),
    ):
        activation_grid(values, STATIC, torch.zeros(2, 1, 2))
    with (
        sampling_context(SamplingContext(branches=(0, 1, 1))),
        pytest.raises(ValueError, match="batch of 4"),
    ):
        activation_grid(values, STATIC, torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="ranges must be given"):
        activation_grid(values, STATIC)


def test_contexts_end_and_nest() -> None:
    outer, inner = SamplingContext(1, 4), SamplingContext(2, 4)
    with sampling_context(outer):
        with pytest.raises(RuntimeError), sampling_context(inner):
            raise RuntimeError
        assert current_context() == outer
    with pytest.raises(ValueError, match="step = 4"):
        SamplingContext(4, 4)
    with pytest.raises(ValueError, match="branches"):
        SamplingContext(branches=())
