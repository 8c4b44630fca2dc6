"""Every candidate is a row of the table, whatever made it, and goes to features and back."""

import itertools

import numpy as np
import pytest
import torch

from genlight.search.codec import CandidateCodec
from genlight.search.spaces.table import TableCandidate, TableSpace

VOCABULARY = (3, 4, 2)
EVERY = torch.tensor(list(itertools.product(*map(range, VOCABULARY))))


def space(share: float = 0.5, **costs: torch.Tensor) -> TableSpace:
    """A random part of all rows."""
    kept = torch.rand(len(EVERY), generator=torch.Generator().manual_seed(0)) < share
    return TableSpace(EVERY[kept], VOCABULARY, {name: values[kept] for name, values in costs.items()})


@pytest.mark.parametrize("share", [0.15, 0.5, 1.1])
def test_whatever_is_made_is_a_row(share: float) -> None:
    table, rng = space(share), np.random.default_rng(1)
    assert len(table.candidates) == len(set(table.candidates))
    near = 0
    for _ in range(200):
        a, b = table.sample(rng), table.sample(rng)
        mutant, child = table.mutate(a, rng), table.crossover(a, b, rng)
        assert mutant in table.rows and child in table.rows
        assert all(token in pair for token, *pair in zip(child.tokens, a.tokens, b.tokens))
        near += sum(x != y for x, y in zip(mutant.tokens, a.tokens)) == 1
    # in the whole product of categories there is always a neighbour
    assert near == 200 or share < 1


def test_sampling_is_uniform() -> None:
    table, rng = space(), np.random.default_rng(0)
    counts = np.zeros(len(table.candidates))
    for _ in range(4000):
        counts[table.rows[table.sample(rng)]] += 1
    expected = 4000 / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 2 * len(counts)


def test_features_lead_back_to_the_row() -> None:
    table = space()
    features = [table.encode(each) for each in table.candidates]
    assert features[0].shape == (3, 4) and all(bool((each.sum(1) == 1).all()) for each in features)
    assert table.rows_of(features[::-1]).tolist() == list(range(len(features)))[::-1]


def test_candidates_are_archived_and_told_apart() -> None:
    table, codec = space(), CandidateCodec(TableCandidate)
    keys = {table.key(each) for each in table.candidates}
    assert len(keys) == len(table.candidates)
    assert all(codec.from_plain(codec.to_plain(each)) == each for each in table.candidates)
    # 1,12 and 11,2 are different
    assert table.key(TableCandidate((1, 12))) != table.key(TableCandidate((11, 2)))


def test_costs_and_fingerprints_are_of_the_rows() -> None:
    cost = EVERY.sum(1).float()
    table = space(size=cost)
    assert all(table.cost(each) == {"size": sum(each.tokens)} for each in table.candidates)
    assert space().cost(table.candidates[0]) == {}
    prints = {space().fingerprint(), table.fingerprint(), space(0.4).fingerprint(), space(size=cost + 1).fingerprint()}
    assert len(prints) == 4 and table.fingerprint() == space(size=cost).fingerprint()
    with pytest.raises(ValueError, match="the cost size is not known"):
        space(size=cost.masked_fill(cost > 3, torch.nan))
    with pytest.raises(ValueError, match="no row"):
        TableSpace(EVERY[:0], VOCABULARY)


def test_of_equal_rows_the_first_counts() -> None:
    table = TableSpace(torch.tensor([[1, 0], [0, 1], [1, 0]]), (2, 2), {"price": torch.tensor([5.0, 6.0, 7.0])})
    assert [each.tokens for each in table.candidates] == [(1, 0), (0, 1)]
    assert table.cost(TableCandidate((1, 0))) == {"price": 5.0}
