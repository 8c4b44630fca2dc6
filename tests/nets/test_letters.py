"""The tokenizer of letters, and the random text encoder whose first token is an outlier as in CLIP."""

import pytest
import torch

from genlight.nets.letters import letter_text_encoder, letter_tokenizer
from genlight.quantization.special_inputs import constant_positions

PROMPTS = [f"a photo of a {name}" for name in ("one", "two", "three", "four", "five", "six", "seven", "eight 8")]


def tokens(*texts: str) -> torch.Tensor:
    filled = letter_tokenizer(18)(
        list(texts), padding="max_length", max_length=18, truncation=True, return_tensors="pt"
    )
    return filled.input_ids


def test_each_letter_is_a_token_and_words_are_told_apart() -> None:
    tokenizer = letter_tokenizer(18)
    assert tokenizer.tokenize("a photo 8") == ["a</w>", "p", "h", "o", "t", "o</w>", "8</w>"]
    one, other, none = tokens("to go", "tog o", "")
    assert not torch.equal(one, other) and len({tuple(row) for row in tokens(*PROMPTS).tolist()}) == len(PROMPTS)
    assert none[0] == tokenizer.bos_token_id and none[1:].unique().tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize("first_token", [240.0, 20.0])
def test_the_first_token_is_a_constant_outlier_and_no_other_shares_its_channel(first_token: float) -> None:
    torch.manual_seed(0)
    encoder = letter_text_encoder(hidden_size=16, num_hidden_layers=2, max_length=18, first_token=first_token)
    with torch.no_grad():
        texts = encoder(tokens(*PROMPTS, "")).last_hidden_state
    assert torch.equal(texts[:, 0], texts[:1, 0].expand(len(texts), -1))
    assert texts[0, 0, 0].item() == pytest.approx(first_token, rel=1e-3)
    assert texts[:, 1:, 0].abs().max() < 1e-3 * first_token
    # LayerNorm: the 15 other channels have mean 0 and the mean square 16/15
    assert texts[:, 1:, 1:].square().mean().item() == pytest.approx(16 / 15, rel=1e-3)
    assert constant_positions(texts) == (0,)
    final = texts[:-1, -1]
    assert torch.pdist(final).min() > 0.1  # prompts are told apart
