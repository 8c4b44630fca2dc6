"""DELE as the predictor of a search: experts of cheap indicators know candidates before any of them is measured.

Zhao et al., "Dynamic Ensemble of Low-fidelity Experts", AAAI 2023 (arXiv 2302.00932). The space says what is cheap
(`CheapIndicators`), and a search that screened candidates on few samples has their scores. Experts learn to rank a
pool of candidates by each of these, which costs no measurement more; what was measured then fuses them. Beside the
published fusion by a gate there is a Gaussian process on what the frozen experts say, on the indicators themselves,
which a search has of every candidate, and on the features of the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.errors import UserError
from genlight.predictors.expert_heads import FusionPredictor, ScoreScale, all_scores
from genlight.predictors.expert_training import ExpertTraining, pretrain
from genlight.predictors.experts import ExpertEnsemble, ExpertSettings
from genlight.predictors.gaussian_process import FittedProcess, normal_quantiles, one_blas_thread
from genlight.predictors.pool import REAL, Pool, Standardiser, useful_columns
from genlight.predictors.ranking import checked_targets, pad, single_thread
from genlight.search.guided import Described, Fitted
from genlight.search.protocols import CheapIndicators
from genlight.search.records import History, Problem, Record

HEADS = ("gp", "fusion")
FEW_SAMPLES = "score on few samples"
# what was screened is worth an expert from so many on
_LEAST_SCREENED = 20
# the pool is drawn apart from all candidates
_PURPOSE = 3
# draws for each candidate wanted, sizes of the edits that make half of the pool, ensembles that are kept
_TRIES, _EDITS, _KEPT = 5, (0.05, 1.0), 8
# the process is fitted on the best so many
_MAX_POINTS = 400
# length scales, and weights of (features, indicators, experts), of which the evidence chooses
_LENGTHS = (0.2, 0.3, 0.45, 0.67, 1.0, 1.5)
_WEIGHTS = (*((1.0, share, expert) for share in (0.0, 0.1, 0.3, 1.0, 3.0) for expert in (0.0, 0.3)), (0.0, 1.0, 0.0))


@dataclass(frozen=True)
class DelePredictor:
    """Settings; `described` pretrains the experts for one problem.

    The pool has what was screened, and is for the rest half random candidates, half children of the first that were
    measured, by what they are and not by their scores: it does not change while a search goes on, and neither do the
    experts.

    Attributes:
        pool: candidates that the experts are pretrained on; none is measured.
        founders: so many of the first measured candidates have children in the pool.
        network: shape and loss of the experts and the gate; the encoder is "mlp".
        training: steps of both trainings.
        head: "gp": a Gaussian process on frozen experts, indicators and features. "fusion": experts and gate trained
            on what was measured, as published.
    """

    pool: int = 800
    founders: int = 40
    network: ExpertSettings = field(default_factory=ExpertSettings)
    training: ExpertTraining = field(default_factory=lambda: ExpertTraining(200, 100, 256))
    head: str = "gp"
    _kept: dict[Any, ExpertDescription] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.pool < 10 or self.founders < 1:
            raise ValueError(
                f"predictor.pool = {self.pool} must be 10 or more and founders = {self.founders} 1 or more"
            )
        if self.head not in HEADS:
            raise ValueError(f"predictor.head = {self.head!r} must be one of {', '.join(HEADS)}")
        if self.network.encoder != "mlp":
            raise ValueError(f"predictor.network.encoder = {self.network.encoder!r} must be mlp")

    def described(self, problem: Problem[Any], history: History[Any]) -> Described[Any]:
        """Experts of the problem's space; history lends its first candidates to the pool, and what is `cheaper` in it.

        Raises:
            UserError: the space has no indicators.
        """
        require_indicators(problem.space)
        founders = [record.candidate for record in history.records[: self.founders]]
        space = problem.space
        highest = max((record.fidelity for record in history.cheaper), default=None)
        screened = [record for record in history.cheaper if record.fidelity == highest and record.score is not None]
        key = (
            space.fingerprint(),
            problem.seed,
            tuple(space.key(founder) for founder in founders),
            tuple((record.key, record.fidelity, record.score) for record in screened),
        )
        if key not in self._kept:
            while len(self._kept) >= _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self._pretrained(problem, founders, screened)
        known = self._kept[key]
        if self.head == "fusion":
            return Described(known.row, _Fusion(known, self.training))
        return Described(known.groups, _Process(known))

    def _pretrained(
        self, problem: Problem[Any], founders: Sequence[Any], screened: Sequence[Record[Any]]
    ) -> ExpertDescription:
        space: Any = problem.space
        candidates = pool_of(problem, founders, self.pool, [record.candidate for record in screened])
        features = pad([space.encode(each) for each in candidates])[0]
        indicators = torch.from_numpy(np.stack([space.indicators(each) for each in candidates])).float()
        kept = useful_columns(space.indicator_names, indicators)
        flat = Standardiser.of(features.flatten(1))
        names = [space.indicator_names[column] for column in kept]
        columns = [indicators[:, kept]]
        few = {record.key: record.rank[0] for record in screened}
        if len(few) >= _LEAST_SCREENED and len(set(few.values())) > 1:
            names.append(FEW_SAMPLES)
            columns.append(torch.tensor([[few.get(space.key(each), torch.nan)] for each in candidates]))
        pool = Pool(flat(features.flatten(1)), (REAL,) * flat.mean.numel(), torch.cat(columns, dim=1), tuple(names))
        with single_thread():
            network = pretrain(self.network, self.training, pool, problem.seed)
        return ExpertDescription(space, tuple(features.shape[1:]), flat, tuple(kept), pool, network)


@dataclass(frozen=True)
class ExpertDescription:
    """Candidates of a space as pretrained experts see them.

    Attributes:
        space: of the candidates.
        shape: steps and features of the longest candidate of the pool; what lies beyond is left out.
        features: scale of the flattened features.
        columns: numbers of the indicators that tell the pool apart.
        pool: what the experts were trained on: these indicators, and scores on few samples where there are any.
        network: the experts.
    """

    space: Any
    shape: tuple[int, ...]
    features: Standardiser
    columns: tuple[int, ...]
    pool: Pool
    network: ExpertEnsemble

    def row(self, candidate: Any) -> Tensor:
        """Standardised features of a candidate, float32 [steps · features]."""
        encoded = self.space.encode(candidate).float()[: self.shape[0]]
        padded = torch.zeros(self.shape)
        padded[: len(encoded)] = encoded
        return self.features(padded.flatten())

    def groups(self, candidate: Any) -> Tensor:
        """Its row, and its indicators in units of their spread over the pool, float32 [1, steps · features + E]."""
        indicators = torch.from_numpy(self.space.indicators(candidate)).float()[list(self.columns)]
        return torch.cat([self.row(candidate), self._indicators(indicators)]).unsqueeze(0)

    def with_experts(self, described: Sequence[Tensor]) -> list[Tensor]:
        """Features, indicators and experts' scores of n candidates that `groups` gave, float64 [n, …] each."""
        rows = torch.cat(list(described))
        size = self.features.mean.numel()
        with single_thread():
            scores = self._experts(all_scores(self.network, rows[:, :size])[1].T)
        return [part.double() for part in (rows[:, :size], rows[:, size:], scores)]

    @cached_property
    def _indicators(self) -> Standardiser:
        return Standardiser.of(self.pool.low_fidelity[:, : len(self.columns)])

    @cached_property
    def _experts(self) -> Standardiser:
        with single_thread():
            return ScoreScale.of(self.network, self.pool.tokens).experts


@dataclass(frozen=True)
class _Process:
    known: ExpertDescription

    def fit(self, candidates: Sequence[Tensor], targets: Sequence[float], seed: int) -> Fitted:
        values = normal_quantiles(checked_targets(candidates, targets).numpy())
        best = np.argsort(values, kind="stable")[:_MAX_POINTS]
        groups = self.known.with_experts([candidates[number] for number in best])
        # by what was measured: a search that has come near to its end looks at a small part of the space
        scales = tuple(Standardiser.of(group) for group in groups)
        with one_blas_thread():
            fits = []
            for weights in _WEIGHTS:
                points = _weighted(groups, scales, weights).unsqueeze(1).numpy()
                process = FittedProcess(points, values[best], False, _LENGTHS)
                fits.append(_FittedProcess(self.known, scales, weights, process))
        return max(fits, key=lambda fitted: fitted.process.evidence)


def _weighted(groups: Sequence[Tensor], scales: Sequence[Standardiser], weights: Sequence[float]) -> Tensor:
    """The standardised groups side by side, [n, columns]: what weighs more counts more in distances."""
    columns, total = sum(group.shape[1] for group in groups), sum(weights)
    parts = [
        scale(group) * (columns * weight / total / group.shape[1]) ** 0.5
        for group, scale, weight in zip(groups, scales, weights)
    ]
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _FittedProcess:
    known: ExpertDescription
    scales: tuple[Standardiser, ...]
    weights: tuple[float, ...]
    process: FittedProcess

    def predict(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return self.process.predict(self._points(candidates))

    def covariance(self, candidates: Sequence[Tensor]) -> Tensor:
        return self.process.covariance(self._points(candidates))

    def _points(self, candidates: Sequence[Tensor]) -> list[Tensor]:
        return list(_weighted(self.known.with_experts(candidates), self.scales, self.weights).unsqueeze(1))


@dataclass(frozen=True)
class _Fusion:
    known: ExpertDescription
    training: ExpertTraining

    def fit(self, candidates: Sequence[Tensor], targets: Sequence[float], seed: int) -> Fitted:
        predictor = FusionPredictor((self.known.network,), self.known.pool, self.training)
        fitted = predictor.fit(torch.stack(list(candidates)), targets, seed)
        return _FittedRows(fitted)


@dataclass(frozen=True)
class _FittedRows:
    fitted: Any

    def predict(self, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        mean, deviation = self.fitted.predict(torch.stack(list(candidates)))
        return mean, deviation


def pool_of(problem: Problem[Any], founders: Sequence[Any], count: int, screened: Sequence[Any] = ()) -> list[Any]:
    """`count` different candidates: founders, those screened, random ones and descendants of founders.

    There are more where founders and screened are more, and fewer in a small space.
    """
    rng, space = problem.rng(0, _PURPOSE), problem.space
    found = {space.key(each): each for each in (*founders, *screened)}
    bred = list(founders)
    for _ in range(_TRIES * count):
        if len(found) >= count:
            break
        if bred and rng.random() < 0.5:
            size = float(np.exp(rng.uniform(*np.log(_EDITS))))
            candidate = space.mutate(bred[int(rng.integers(len(bred)))], rng, size=size)
            bred.append(candidate)
        else:
            candidate = space.sample(rng)
        found.setdefault(space.key(candidate), candidate)
    return list(found.values())


def require_indicators(space: Any) -> None:
    """UserError if a space has no `CheapIndicators`."""
    if not isinstance(space, CheapIndicators):
        raise UserError(
            f"search.predictor=dele needs a space with cheap indicators, which {type(space).__name__} does not have; "
            "SolverScheduleSpace (method=s3) and ModelScheduleSpace (method=oms) do"
        )
