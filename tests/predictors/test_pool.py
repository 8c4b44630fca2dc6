"""What failed is not a number, and what tells nothing apart is left out."""

import logging
import math

import pytest
import torch

from genlight.predictors.pool import Pool, Standardiser, check_tokens, cleaned, useful_columns

NAN = math.nan


def test_sentinels_count_as_missing_and_large_numbers_do_not() -> None:
    values = torch.tensor([1e8, -1e8, math.inf, -math.inf, NAN, 1.1e8, -3.0])
    assert cleaned(values).isnan().tolist() == [True] * 5 + [False] * 2


def test_columns_that_tell_nothing_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    table = torch.tensor(
        [[1.0, 2.0, NAN, NAN, 5.0], [2.0, 2.0, NAN, 1.0, NAN], [3.0, NAN, NAN, NAN, NAN], [4.0, 2, NAN, NAN, 6]]
    )
    with caplog.at_level(logging.WARNING):
        assert useful_columns("abcde", table) == [0, 4]
    for text in ("b is left out: it has one value", "c is left out: it has no values", "d is left out"):
        assert text in caplog.text
    with caplog.at_level(logging.WARNING):
        assert useful_columns("x", torch.tensor([[1.0], [2.0], [NAN], [NAN], [NAN]])) == [0]
    assert "x is known for 2 of 5" in caplog.text
    with pytest.raises(ValueError, match="no column has two values"):
        useful_columns("b", table[:, 1:2])
    assert useful_columns((), torch.empty(4, 0)) == []


def test_the_scale_is_that_of_the_known_values() -> None:
    values = torch.tensor([[1.0, 7.0, NAN], [3.0, 7.0, NAN], [NAN, NAN, NAN]])
    scale = Standardiser.of(values)
    assert scale(values).tolist() == [[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert scale(torch.tensor([[5.0, 8.0, 4.0]])).tolist() == [[3.0, 1.0, 4.0]]


def test_the_scale_of_large_scores_is_finite() -> None:
    scale = Standardiser.of(torch.tensor([[1e30], [3e30]]))
    assert scale.std.tolist() == pytest.approx([1e30]) and scale.mean.dtype == scale.std.dtype == torch.float32


def test_pools_that_do_not_fit_are_refused() -> None:
    tokens = torch.tensor([[0, 2], [1, 3]])
    scores = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="token 1 of row 1 is 3; its vocabulary is 0 to 2"):
        Pool(tokens, (2, 3), scores, ("a", "b"))
    with pytest.raises(ValueError, match="token 0 of row 0 is -1"):
        check_tokens(torch.tensor([[-1]]), (2,))
    with pytest.raises(ValueError, match="names a twice"):
        Pool(tokens, (2, 4), scores, ("a", "a"))
    with pytest.raises(ValueError, match=r"shape \[2, 2\]; 2 candidates with 1 scores"):
        Pool(tokens, (2, 4), scores, ("a",))
    with pytest.raises(ValueError, match="vocabulary is of 3 places"):
        Pool(tokens, (2, 4, 5), scores, ("a", "b"))
