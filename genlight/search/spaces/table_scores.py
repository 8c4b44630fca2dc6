"""A table in a search: true scores that are read where others are measured, and predictors that know its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.predictors.contenders import Contenders, Predict
from genlight.search.protocols import Evaluation
from genlight.search.spaces.table import TableCandidate, TableSpace


@dataclass(frozen=True)
class TableObjective:
    """Reads the true score of a row.

    Attributes:
        space: of the rows.
        targets: float [N], higher is better.
    """

    space: TableSpace
    targets: Tensor

    def evaluate(self, candidate: TableCandidate, fidelity: int) -> Evaluation:
        """The true score, negated because searches minimise."""
        return Evaluation(-float(self.targets[self.space.rows[candidate]]))


@dataclass(frozen=True)
class TablePredictor:
    """A contender as the predictor of a search, whose scores are minimised.

    Attributes:
        name: of the contender.
        contenders: on the table of which the space has some rows.
        space: of those rows.
        rows: their numbers in the table, int64.
    """

    name: str
    contenders: Contenders
    space: TableSpace
    rows: Tensor

    def __repr__(self) -> str:  # part of the fingerprint of a search, which has weights and data elsewhere
        return f"TablePredictor({self.name})"

    def fit(self, candidates: Sequence[Tensor], targets: Sequence[float], seed: int) -> FittedTable:
        """Fit on features as `TableSpace.encode` makes them, and what was measured."""
        predict = self.contenders.fit(self.name, self.rows_of(candidates), -torch.tensor(targets), seed)
        return FittedTable(self, predict)

    def rows_of(self, candidates: Sequence[Tensor]) -> Tensor:
        """Their numbers in the whole table, int64 [n]."""
        return self.rows[self.space.rows_of(candidates)]


@dataclass(frozen=True)
class FittedTable:
    """A fitted `TablePredictor`."""

    predictor: TablePredictor
    predict_rows: Predict

    def predict(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and deviation [n]; lower is better."""
        mean, deviation = self.predict_rows(self.predictor.rows_of(candidates))
        return -mean, deviation
