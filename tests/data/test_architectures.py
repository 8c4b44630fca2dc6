"""Labels outside the subset and rows held out reach no training batch; the order is a function of seed and step."""

import dataclasses
import logging
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from data.toy_tables import ToyTable, toy_table

from genlight.data.architectures import TwoSteps, random_pool, single_precision
from genlight.data.sampling import BatchOrder
from genlight.errors import UserError


def batches(data: ToyTable, count: int = 12) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    return [loader.dataset.__getitems__(loader.batch_sampler.batch(number)) for number in range(count)]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return all(
        x["finetune"] == y["finetune"]
        and all(
            torch.allclose(x[k], y[k], rtol=0, atol=0, equal_nan=True) for k in ("tokens", "low_fidelity", "target")
        )
        for x, y in zip(a, b)
    )


def test_first_the_pool_then_the_labelled_and_no_label_beside() -> None:
    data, table = ToyTable(), toy_table()
    found = batches(data)
    assert [batch["finetune"] for batch in found] == [False] * 6 + [True] * 6
    assert [len(batch["tokens"]) for batch in found] == [32] * 6 + [12] * 6
    labelled = set(data.prepared.labelled.tolist())
    assert len(labelled) == 12 and max(labelled) < 120
    for batch in found:
        for tokens, cheap, target in zip(batch["tokens"], batch["low_fidelity"], batch["target"].tolist()):
            (row,) = (table.low_fidelity == cheap).all(1).nonzero()[0].tolist()
            assert torch.equal(table.tokens[row], tokens)
            assert row < 120 and (target == table.target[row] if row in labelled else math.isnan(target))
            assert row in labelled or not batch["finetune"]
    assert same(found, batches(ToyTable())) and not same(found, batches(ToyTable(seed=1)))


def test_label_sets_are_nested_and_have_a_seed_of_their_own() -> None:
    sets = [set(ToyTable(labels=n).prepared.labelled.tolist()) for n in (5, 12, 60, 120)]
    assert all(small < large for small, large in pairwise(sets))
    assert sets[1] == set(ToyTable(seed=9).prepared.labelled.tolist())
    assert sets[1] != set(ToyTable(label_seed=1).prepared.labelled.tolist())


def test_what_is_held_out_or_not_labelled_changes_no_batch() -> None:
    table = toy_table()
    labelled = ToyTable().prepared.labelled
    target, low_fidelity = table.target.clone(), table.low_fidelity.clone()
    hidden = torch.ones(200, dtype=torch.bool)
    hidden[labelled] = False
    target[hidden] = torch.randn(int(hidden.sum()))
    low_fidelity[120:] = 1e6 * torch.randn(80, 2)
    tokens = torch.cat([table.tokens[:120], table.tokens[120:].flip(0)])
    other = ToyTable(dataclasses.replace(table, target=target, low_fidelity=low_fidelity, tokens=tokens))
    assert same(batches(ToyTable()), batches(other))
    assert ToyTable().fingerprint == other.fingerprint
    low_fidelity[0] += 1
    assert ToyTable().fingerprint != ToyTable(dataclasses.replace(table, low_fidelity=low_fidelity)).fingerprint


def test_validation_is_what_is_held_out_in_order() -> None:
    table = toy_table()
    target = table.target.clone()
    target[150] = math.nan
    data = ToyTable(dataclasses.replace(table, target=target), eval_batch_size=30)
    found = list(data.val_dataloader())
    assert data.num_samples == 79 and len(found) == 3
    kept = [row for row in range(120, 200) if row != 150]
    assert torch.equal(torch.cat([batch["tokens"] for batch in found]), table.tokens[kept])
    assert torch.equal(torch.cat([batch["target"] for batch in found]), table.target[kept])


def test_where_lower_is_better_targets_are_turned() -> None:
    up, down = ToyTable().prepared, ToyTable(higher_is_better=False).prepared
    assert torch.equal(up.held_out_targets, -down.held_out_targets)
    assert torch.equal(up.targets[up.labelled], -down.targets[down.labelled])


def test_sentinels_are_missing_and_constant_columns_left_out(caplog: pytest.LogCaptureFixture) -> None:
    table = toy_table(3)
    low_fidelity = table.low_fidelity.clone()
    low_fidelity[:, 1] = 4.0
    low_fidelity[130:, 1] = torch.arange(70.0)  # varies where it is held out: that does not count
    sentinels, missing = low_fidelity.clone(), low_fidelity.clone()
    sentinels[:8, 0] = torch.tensor([1e8, -1e8, math.inf, -math.inf] * 2)
    missing[:8, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        a, b = (
            ToyTable(dataclasses.replace(table, low_fidelity=x), low_fidelity=list("abc")) for x in (sentinels, missing)
        )
        assert same(batches(a), batches(b)) and a.fingerprint == b.fingerprint
    assert a.prepared.pool.names == ("a", "c") and "b is left out: it has one value" in caplog.text


def test_tables_that_do_not_fit_are_refused() -> None:
    table = toy_table()
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"labels": 121}, "data.labels = 121 must be at most 120"),
        ({}, {"higher_is_better": None}, "data.higher_is_better is null"),
        ({}, {"low_fidelity": []}, "data.pretrain_steps = 6, but data.low_fidelity is empty"),
        ({"vocabulary": (4, 4, 4, 3)}, {}, "token 3 of row .* is 3"),
        ({"tokens": torch.cat([table.tokens[:199], table.tokens[7:8]])}, {}, r"2 rows .* \[7, 199\] are one"),
        ({"low_fidelity": torch.stack([table.target.exp(), table.target], 1)}, {}, "a orders the pool exactly"),
        ({"low_fidelity": torch.stack([-table.target, table.target], 1)}, {}, "a orders the pool exactly"),
        ({"target": torch.ones(200)}, {}, "all have the same score"),
        ({"in_pool": torch.ones(200, dtype=torch.bool)}, {}, "held out"),
        ({"low_fidelity": torch.full((200, 2), math.nan)}, {}, "no column has two values"),
    ]
    for changes, options, message in cases:
        with pytest.raises(UserError, match=message):
            ToyTable(dataclasses.replace(table, **changes), **options).prepared  # noqa: B018
    for options, message in [
        ({"labels": 1}, "data.labels = 1"),
        ({"low_fidelity": ["a", "a"]}, "names a twice"),
        ({"low_fidelity": ["score"]}, "names score, which is data.target"),
        ({"batch_size": 1}, "data.batch_size = 1"),
        ({"seed": -1}, "data.seed"),
    ]:
        with pytest.raises(ValueError, match=message):
            ToyTable(**options)


def test_what_single_precision_does_not_hold_is_refused() -> None:
    values = np.array([1.0, math.inf, math.nan, -3e38])
    assert torch.equal(single_precision(values[:2], "x"), torch.tensor([1.0, math.inf]))
    with pytest.raises(UserError, match=r"x holds -1e\+67.* take its logarithm"):
        single_precision(np.array([*values, -1e67]), "x")


def test_few_labels_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ToyTable(labels=9).prepared  # noqa: B018
    assert "data.labels = 9 is very few" in caplog.text


def test_ranks_share_both_steps_without_duplicates() -> None:
    rows = np.arange(40, 60)
    orders = [TwoSteps(BatchOrder(100, 25, 0, r, 2), BatchOrder(20, 10, 0, r, 2), 3, rows) for r in (0, 1)]
    for position in range(6):
        parts = [set(order.batch(position).tolist()) for order in orders]
        assert not parts[0] & parts[1]
        if position >= 3:
            assert parts[0] | parts[1] == set(range(140, 160))


def test_the_random_pool_is_a_fixed_share_of_what_is_known() -> None:
    known = torch.arange(100) % 2 == 0
    pool = random_pool(known, 0.3)
    assert int((pool & known).sum()) == 15 and bool(pool[~known].all())
    assert torch.equal(pool, random_pool(known, 0.3))
