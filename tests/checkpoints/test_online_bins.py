"""Bins gathered one checkpoint at a time, against the checkpoints themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genlight.checkpoints.online_bins import OnlineBins


def checkpoint(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator) * 100}


def filled(count: int, max_bins: int) -> OnlineBins:
    bins = OnlineBins(max_bins)
    for step in range(1, count + 1):
        bins.add(10 * step, checkpoint(step), lr=1.0 / step)
    return bins


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(2, 20))
def test_bins_tile_the_steps_and_hold_exact_means(count: int, max_bins: int) -> None:
    bins = filled(count, max_bins)
    assert len(bins) == min(count, max_bins) and sum(bins.counts) == count
    step = 0
    for snapshot in bins.snapshots():
        inside = range(step + 1, step + snapshot.count + 1)
        assert (snapshot.first_step, snapshot.last_step) == (10 * inside[0], 10 * inside[-1])
        assert snapshot.lr == 1.0 / inside[-1]
        for name, mean in snapshot.tensors.items():
            stack = torch.stack([checkpoint(s)[name] for s in inside])
            exact = torch.tensor([math.fsum(row) / len(inside) for row in stack.flatten(1).T.tolist()])
            assert mean.dtype == torch.float32 and torch.equal(mean.flatten(), exact)
        step = inside[-1]


@pytest.mark.parametrize("max_bins", [8, 9, 12, 16, 20])
def test_size_grows_with_age_and_the_newest_stands_alone(max_bins: int) -> None:
    bins = OnlineBins(max_bins)
    for count in range(1, 401):
        bins.add(count, {"a": torch.zeros(1)})
        # bins whose size grows by this ratio from 1 on cover the steps exactly
        ratio = count ** (1.0 / max_bins)
        newer = 0
        for size in reversed(bins.counts):
            assert size <= 2.5 * ((ratio - 1.0) * (newer + 1) + 1)
            newer += size
        assert bins.counts[-1] == 1


def test_state_continues_bit_for_bit() -> None:
    whole = filled(57, 8)
    half = filled(30, 8)
    resumed = OnlineBins(8)
    resumed.load_state_dict(half.state_dict())
    for step in range(31, 58):
        resumed.add(10 * step, checkpoint(step), lr=1.0 / step)
    assert resumed.counts == whole.counts
    for one, two in zip(resumed.snapshots(), whole.snapshots(), strict=True):
        assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in two.tensors)


def test_memory_is_what_was_said_at_most() -> None:
    bins, most = OnlineBins(16), 0
    for step in range(1, 151):
        bins.add(step, {"a": torch.zeros(100)})
        held = sum(value.nbytes for bin in bins._bins for value in bin.total.values())
        assert held <= bins.most_bytes(4 * 100)
        most = max(most, held)
    assert most > 0.8 * bins.most_bytes(4 * 100)


def test_given_tensors_are_never_changed() -> None:
    given_tensors = [checkpoint(step) for step in range(1, 20)]
    bins = OnlineBins(3)
    for step, tensors in enumerate(given_tensors, start=1):
        bins.add(step, tensors)
    for step, tensors in enumerate(given_tensors, start=1):
        assert torch.equal(tensors["a"], checkpoint(step)["a"])


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="max_bins must be at least 2"):
        OnlineBins(1)
    with pytest.raises(ValueError, match="step 10 cannot follow step 20"):
        filled(2, 4).add(10, checkpoint(1))
    with pytest.raises(ValueError, match="max_bins = 4, here it is 5"):
        OnlineBins(5).load_state_dict(filled(2, 4).state_dict())
