"""A text-conditional LlamaGen that is asked by the number of a caption, as others are by the number of a class.

So pairs, students and samples of it are made of labels like all others. Captions are features of a text encoder, which
is not needed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.nets.llamagen import LlamaGen, LlamaGenState


@dataclass(frozen=True)
class CaptionedLlamaGen(LlamaGen):
    """An `AutoregressiveModel` whose conditions are numbers of captions, [B] int64.

    -1 - i stands for none in place of caption i: what stands for no text has the padding of the text.

    Attributes:
        captions: [P, text_length, text_dim], features of texts, padded at the left with rows of zeros.

    Raises:
        ValueError: captions of another shape than the network reads, or a network of classes.
    """

    captions: Tensor

    def __post_init__(self) -> None:
        options = self.transformer.config
        wanted = [options["text_length"], options["text_dim"]]
        if self.captions.ndim != 3 or list(self.captions.shape[1:]) != wanted or not len(self.captions):
            raise ValueError(f"captions {list(self.captions.shape)} must be [P, {wanted[0]}, {wanted[1]}]")

    def null_condition(self, condition: Tensor) -> Tensor:
        return -1 - condition

    def begin(self, condition: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, LlamaGenState]:
        return super().begin(self._texts(condition), prefix)

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        return super().logits(tokens, self._texts(condition))

    def _texts(self, condition: Tensor) -> Tensor:
        is_none = condition < 0
        texts = texts_of(self.captions, torch.where(is_none, -1 - condition, condition))
        return torch.where(is_none[:, None, None], self.transformer.null_condition(texts), texts)


def texts_of(captions: Tensor, numbers: Tensor) -> Tensor:
    """Features [B, T, D] of captions [P, T, D] by number [B], on the device of the numbers; the captions stay put."""
    return captions[numbers.to(captions.device)].to(numbers.device)
