"""Captions by number: what the network of texts says of their features, guided or not."""

import pytest
import torch
from modules.tiny_token_teacher import CLASSES, CODES, tiny_captions, tiny_teacher

from genlight.nets.autoregressive import SamplingSettings, decode, parallel_probabilities
from genlight.nets.captions import CaptionedLlamaGen
from genlight.nets.llamagen import LlamaGen


def likeliest(probabilities: torch.Tensor, group: int) -> torch.Tensor:
    return probabilities.argmax(-1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_a_number_stands_for_its_text(scale: float) -> None:
    model = tiny_teacher("captioned").model
    assert isinstance(model, CaptionedLlamaGen)
    plain = LlamaGen(model.transformer, model.quantizer)
    numbers, settings = torch.tensor([7, 0, 3]), SamplingSettings(guidance_scale=scale)
    texts = tiny_captions()[numbers]
    tokens = decode(model, numbers, settings, likeliest)
    assert torch.equal(tokens, decode(plain, texts, settings, likeliest))
    found = parallel_probabilities(model, tokens, numbers, settings)
    torch.testing.assert_close(found, parallel_probabilities(plain, tokens, texts, settings))
    assert not torch.equal(tokens, decode(model, numbers.flip(0), settings, likeliest))
    # none in place of a text has the padding of that text
    torch.testing.assert_close(
        model.logits(tokens, model.null_condition(numbers)), plain.logits(tokens, plain.null_condition(texts))
    )


def test_captions_of_another_shape_are_named() -> None:
    model = tiny_teacher("captioned").model
    for wrong in (torch.zeros(2, 4, 6), torch.zeros(5, 6), torch.zeros(0, 5, 6)):
        with pytest.raises(ValueError, match=r"must be \[P, 5, 6\]"):
            CaptionedLlamaGen(model.transformer, model.quantizer, wrong)
    classes = tiny_teacher("llamagen").model
    with pytest.raises(ValueError, match="captions"):
        CaptionedLlamaGen(classes.transformer, classes.quantizer, tiny_captions())
    assert model.codebook.shape == (CODES, 4) and len(tiny_captions()) == CLASSES
