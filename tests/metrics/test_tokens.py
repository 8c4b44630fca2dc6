"""Numbers about token sequences, against sums written out."""

import torch
from nets.test_teachers import CODES, condition_of, make, random_tokens

from genlight.metrics.tokens import agreement, bigram_distance, grid_size_of, negative_log_likelihood
from genlight.nets.autoregressive import SamplingSettings


@torch.no_grad()
def test_likelihood_is_the_sum_over_places_and_ignores_filters() -> None:
    model, condition = make("llamagen"), condition_of("llamagen")
    tokens = random_tokens(model)
    logits, null = model.logits(tokens, condition), model.logits(tokens, model.null_condition(condition))
    guided = ((null + 2.0 * (logits - null)) / 0.8).double().log_softmax(-1)
    expected = torch.tensor(
        [-sum(float(guided[row, place, tokens[row, place]]) for place in range(9)) / 9 for row in range(3)]
    )
    found = negative_log_likelihood(model, tokens, condition, SamplingSettings(2.0, 0.8, top_k=2, top_p=0.5))
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-4, rtol=1e-4)


def test_agreement_of_a_part() -> None:
    first, second = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 0, 4]])
    assert agreement(first, second) == 0.75
    assert agreement(first, second, 0.5) == 1.0


def test_pairs_are_counted_along_rows_of_the_last_grid() -> None:
    # one token before a grid of 2×2: pairs are (0, 1) and (2, 3)
    first = torch.tensor([[9, 0, 1, 2, 3]])
    assert bigram_distance(first, first, 2) == 0.0
    assert bigram_distance(first, torch.tensor([[9, 1, 0, 3, 2]]), 2) == 1.0
    assert bigram_distance(first, torch.tensor([[5, 0, 1, 7, 7]]), 2) == 0.5
    # frequencies, not counts
    assert bigram_distance(first, first.repeat(3, 1), 2) == 0.0
    assert grid_size_of((1, 4, 9)) == 3 and grid_size_of((1,) * 16) == 4
    assert CODES > 9
