"""Encoders of candidates that are rows of categories: tokens, int64 [N, T], to one vector each, [N, width].

Token t of a row lies in 0 … vocabulary[t] - 1. All are built of operations that `torch.vmap` knows, so that
`stacked.Stacked` runs many of one kind at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from genlight.predictors.encoders import TransformerEncoder


class OneHotMLP(nn.Module):
    """Tokens as one-hot vectors, and real numbers as they are, side by side, then layers of the same width with ReLU.

    Args:
        vocabulary: number of values of each token, 0 for a real number.
        width: of each layer.
        depth: number of layers.
    """

    def __init__(self, vocabulary: Sequence[int], width: int, depth: int) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        sizes = [sum(size or 1 for size in self.vocabulary)] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(sizes))

    def forward(self, tokens: Tensor) -> Tensor:
        if not any(self.vocabulary):
            hidden = tokens.float()
        else:
            columns = zip(tokens.unbind(1), self.vocabulary)
            parts = [
                functional.one_hot(column.long(), size) if size else column.unsqueeze(1) for column, size in columns
            ]
            hidden = torch.cat([part.float() for part in parts], dim=1)
        for layer in cast(Iterable[nn.Linear], self.layers):
            # in place: under vmap a linear layer would write its output twice
            hidden = (hidden @ layer.weight.T).add_(layer.bias).relu_()
        return hidden


class TokenTable(nn.Module):
    """A vector for each token: [N, T] to [N, T, width]; the places share their vectors where all have one vocabulary.

    The product with one-hot vectors has a faster gradient on a CPU than a look-up.
    """

    def __init__(self, vocabulary: Sequence[int], width: int) -> None:
        super().__init__()
        shared = len(set(vocabulary)) == 1
        starts = [0] * len(vocabulary) if shared else [sum(vocabulary[:place]) for place in range(len(vocabulary))]
        self.rows = vocabulary[0] if shared else sum(vocabulary)
        self.register_buffer("starts", torch.tensor(starts), persistent=False)
        self.weight = nn.Parameter(torch.randn(self.rows, width))

    def forward(self, tokens: Tensor, layer: nn.Linear | None = None) -> Tensor:
        """The vectors, or what a linear layer makes of them: it is applied to the table, which has fewer rows."""
        table = self.weight if layer is None else layer(self.weight)
        return functional.one_hot(tokens + cast(Tensor, self.starts), self.rows).to(table.dtype) @ table


class TokenLSTM(nn.Module):
    """Embedding and one-layer LSTM with the gates and the initial weights of `torch.nn.LSTM`; its last hidden state.

    Args:
        vocabulary: number of values of each token.
        embedding: width of a token's vector.
        width: of the hidden state.
    """

    def __init__(self, vocabulary: Sequence[int], embedding: int, width: int) -> None:
        super().__init__()
        self.table = TokenTable(vocabulary, embedding)
        self.inputs = nn.Linear(embedding, 4 * width)
        self.recurrent = nn.Linear(width, 4 * width)
        for parameter in (*self.inputs.parameters(), *self.recurrent.parameters()):
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        steps = self.table(tokens, self.inputs)  # [N, T, 4 · width]
        hidden = cell = torch.zeros_like(steps[:, 0, : self.recurrent.in_features])
        for step in steps.unbind(1):
            take, keep, new, give = (step + self.recurrent(hidden)).chunk(4, dim=-1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(take) * torch.tanh(new)
            hidden = torch.sigmoid(give) * torch.tanh(cell)
        return hidden


class TokenTransformer(nn.Module):
    """Embedding and the small transformer of the ranking predictor; the mean of its outputs over the tokens.

    Args:
        vocabulary: number of values of each token.
        embedding: width of a token's vector.
        width: of the transformer, a multiple of 4.
        depth: number of layers.
    """

    def __init__(self, vocabulary: Sequence[int], embedding: int, width: int, depth: int) -> None:
        super().__init__()
        self.table = TokenTable(vocabulary, embedding)
        self.transformer = TransformerEncoder(embedding, width, depth)

    def forward(self, tokens: Tensor) -> Tensor:
        with _plain_kernels():
            encoded: Tensor = self.transformer(self.table(tokens), torch.ones_like(tokens, dtype=torch.bool))
        return encoded


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention of plain operations: the fused ones have no batching rule, and stacked networks would run in turn."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
