import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genlight.data.sampling import DRAWS, TRAIN_ORDER, BatchOrder, even_batches, generator


def epoch_of(order: BatchOrder, epoch: int) -> np.ndarray:
    first = epoch * order.batches_per_epoch
    return np.concatenate([order.batch(first + step) for step in range(order.batches_per_epoch)])


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_is_a_permutation_shared_by_the_ranks_without_duplicates(n, batch_size, world_size, seed, epoch):
    if n < batch_size * world_size:
        with pytest.raises(ValueError, match=rf"needs at least \d+ training images, there are {n}$"):
            BatchOrder(n, batch_size, seed, 0, world_size)
        return
    ranks = [BatchOrder(n, batch_size, seed, rank, world_size) for rank in range(world_size)]
    seen = np.concatenate([epoch_of(order, epoch) for order in ranks])
    assert len(seen) == n // (batch_size * world_size) * batch_size * world_size
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(n))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_a_batch_depends_on_its_position_only_not_on_what_was_asked_before(positions):
    used = BatchOrder(23, 4, seed=9)
    for position in positions:
        assert used.batch(position).tolist() == BatchOrder(23, 4, seed=9).batch(position).tolist()


def test_several_ranks_see_the_global_batch_of_one_rank():
    whole = BatchOrder(50, 8, seed=1)
    halves = [BatchOrder(50, 4, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for position in range(20):
        joined = np.concatenate([half.batch(position) for half in halves])
        assert joined.tolist() == whole.batch(position).tolist()


def test_epochs_and_seeds_differ():
    orders = [epoch_of(BatchOrder(40, 4, seed), epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_mirror_adds_a_fair_coin_to_the_same_order():
    plain, mirrored = BatchOrder(4000, 10, 3), BatchOrder(4000, 10, 3, mirror=True)
    indices = epoch_of(mirrored, 1)
    assert (indices % 4000).tolist() == epoch_of(plain, 1).tolist()
    assert abs((indices >= 4000).mean() - 0.5) < 0.05
    assert not np.array_equal(np.sort(epoch_of(mirrored, 0)), np.sort(indices))


def test_the_streams_of_order_and_draws_differ():
    keys = [(TRAIN_ORDER, 0), *((draw, 0) for draw in DRAWS.values())]
    assert len({generator(7, *key).integers(2**62) for key in keys}) == 4


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 6))
def test_even_batches_share_without_duplicates_and_in_equal_number(n, batch_size, world_size):
    if n < world_size:
        with pytest.raises(ValueError, match=rf"{n} evaluation samples cannot be shared among {world_size} devices"):
            even_batches(n, batch_size, 0, world_size)
        return
    shares = [even_batches(n, batch_size, rank, world_size) for rank in range(world_size)]
    assert np.concatenate([np.concatenate(share) for share in shares]).tolist() == list(range(n))
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch) for share in shares for batch in share]
    assert min(sizes) >= 1 and max(sizes) <= batch_size + (world_size > 1)
