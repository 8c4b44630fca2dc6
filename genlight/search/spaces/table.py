"""Candidates that are rows of a table: sequences of categories, of which only those that the table has are valid."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

_TRIES = 20


@dataclass(frozen=True)
class TableCandidate:
    """A row of the table, by its categories."""

    tokens: tuple[int, ...]


class TableSpace:
    """The rows of a table; of rows with the same categories the first counts.

    Args:
        tokens: int64 [N, T].
        vocabulary: number of values of each token.
        costs: float [N] by name, finite.

    Attributes:
        candidates: all of them, in the order of the table.
        rows: number of the row in the table of each candidate.

    Raises:
        ValueError: no rows, or a cost that is not finite.
    """

    candidate_type = TableCandidate

    def __init__(self, tokens: Tensor, vocabulary: Sequence[int], costs: Mapping[str, Tensor] | None = None) -> None:
        self.costs = dict(costs or {})
        if not len(tokens):
            raise ValueError("there is no row to choose from")
        if unknown := [name for name, values in self.costs.items() if not bool(values.isfinite().all())]:
            raise ValueError(f"the cost {', '.join(unknown)} is not known for every row")
        self.vocabulary = tuple(int(size) for size in vocabulary)
        self.rows: dict[TableCandidate, int] = {}
        for row, values in enumerate(tokens.tolist()):
            self.rows.setdefault(TableCandidate(tuple(values)), row)
        self.candidates = tuple(self.rows)
        self._features = one_hot(tokens, max(self.vocabulary)).float()

    def sample(self, rng: np.random.Generator) -> TableCandidate:
        """Any row, all with the same chance."""
        return self.candidates[int(rng.integers(len(self.candidates)))]

    def mutate(self, candidate: TableCandidate, rng: np.random.Generator, *, size: float = 1.0) -> TableCandidate:
        """A row that differs in one category; where the few that are tried are not in the table, any row.

        Categories have no near and far: `size` does not count.
        """
        for _ in range(_TRIES):
            tokens = list(candidate.tokens)
            place = int(rng.integers(len(tokens)))
            tokens[place] = int(rng.integers(self.vocabulary[place]))
            made = TableCandidate(tuple(tokens))
            if made != candidate and made in self.rows:
                return made
        return self.sample(rng)

    def crossover(self, a: TableCandidate, b: TableCandidate, rng: np.random.Generator) -> TableCandidate:
        """Each category from either parent; where no such row is found, the first parent."""
        for _ in range(_TRIES):
            first = rng.random(len(a.tokens)) < 0.5
            made = TableCandidate(tuple(x if mine else y for x, y, mine in zip(a.tokens, b.tokens, first)))
            if made in self.rows and made not in (a, b):
                return made
        return a

    def cost(self, candidate: TableCandidate) -> dict[str, float]:
        """What the table says."""
        row = self.rows[candidate]
        return {name: float(values[row]) for name, values in self.costs.items()}

    def encode(self, candidate: TableCandidate) -> Tensor:
        """One-hot categories, float [T, largest vocabulary]."""
        return self._features[self.rows[candidate]]

    def rows_of(self, features: Sequence[Tensor]) -> Tensor:
        """Rows in the table, int64 [n], of candidates that `encode` encoded."""
        tokens = torch.stack(list(features)).argmax(-1).tolist()
        return torch.tensor([self.rows[TableCandidate(tuple(values))] for values in tokens])

    def apply(self, target: Any, candidate: TableCandidate) -> None:
        """Nothing: a row is read, not run."""

    def key(self, candidate: TableCandidate) -> str:
        return "-".join(map(str, candidate.tokens))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.vocabulary, [each.tokens for each in self.candidates])).encode())
        for name in sorted(self.costs):
            digest.update(name.encode() + self.costs[name].double().contiguous().numpy().tobytes())
        return f"{len(self.candidates)} rows of a table, {digest.hexdigest()[:16]}"
