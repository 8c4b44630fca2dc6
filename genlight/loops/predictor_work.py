"""The work of DELE: every predictor on every set of labels, and the searches of the table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genlight import io
from genlight.data.cache import fingerprint_of
from genlight.errors import UserError, in_config
from genlight.loops.evaluation import CandidateTrainer, in_turn
from genlight.loops.search import SearchRunner, SearchTask
from genlight.metrics.ranking import ranking_scores
from genlight.modules.described import add_weights
from genlight.predictors.contenders import Contenders
from genlight.predictors.expert_doubts import expert_doubts
from genlight.predictors.expert_training import ExpertTraining
from genlight.predictors.experts import ExpertEnsemble
from genlight.predictors.losses import kendall_tau
from genlight.predictors.pool import cleaned
from genlight.predictors.predictor_file import TrainedExperts
from genlight.search.acquisition import expected_improvement
from genlight.search.evaluation import one_by_one
from genlight.search.plan import PlainPlan, with_predictor
from genlight.search.proposing import RANDOM
from genlight.search.random_search import RandomSearch
from genlight.search.records import Problem
from genlight.search.spaces.table import TableSpace
from genlight.search.spaces.table_scores import TableObjective, TablePredictor

if TYPE_CHECKING:
    from genlight.loops.predictor_search import PredictorSearch

# a strategy that knows no predictor
UNGUIDED = "search"
_KIND, _VERSION = "predictor_scores", 2

# of an expert to the score that it learned
EXPERT_TAU = "expert_tau"

# kendall_tau and so on, by name of the predictor
Scores = Mapping[str, Mapping[str, float]]


@dataclass
class PredictorWork:
    """Everything that the steps of the method share.

    Attributes:
        method: the settings.
        evaluations, datamodule: of the run.
        network: the experts as the first step left them, on the CPU.
    """

    method: PredictorSearch
    evaluations: CandidateTrainer
    datamodule: Any
    network: ExpertEnsemble

    @cached_property
    def runner(self) -> SearchRunner:
        """Runs searches in the run folder."""
        return SearchRunner(self.evaluations, self.method.settings)

    @cached_property
    def table(self) -> Any:
        """All that the file holds, the true scores turned so that higher is better."""
        table = self.datamodule.read_table()
        target = cleaned(table.target)
        return replace(table, target=target if self.datamodule.higher_is_better else -target)

    @cached_property
    def held_out(self) -> Tensor:
        """Rows that predictors are compared on, int64 [M]."""
        return (~self.table.in_pool & self.table.target.isfinite()).nonzero().squeeze(1)  # type: ignore[no-any-return]

    @cached_property
    def contenders(self) -> Contenders:
        """Every predictor of the table."""
        pool, data = self.datamodule.prepared.pool, self.datamodule
        columns = [data.low_fidelity.index(name) for name in pool.names]
        low_fidelity = cleaned(self.table.low_fidelity[:, columns])
        method = self.method
        training = ExpertTraining(finetune_steps=method.finetune_steps, batch_size=data.batch_size, lr=method.lr)
        return Contenders(self.network, pool, self.table.tokens, low_fidelity, training)

    @property
    def numbers(self) -> list[int]:
        """Numbers of labels, from few to many, that of the data among them."""
        return sorted({*(self.method.labels or ()), self.datamodule.labels})

    @property
    def label_seeds(self) -> range:
        """Choices of labelled candidates."""
        first = self.datamodule.label_seed
        return range(first, first + self.method.label_seeds)

    def check(self) -> None:
        """UserError where the table has too few labels, or no candidate of the cost that is asked for."""
        known = int((self.table.in_pool & self.table.target.isfinite()).sum())
        if self.numbers[-1] > known:
            raise UserError(f"method.labels = {self.numbers[-1]} must be at most {known}, what is known of the pool")
        self.space  # noqa: B018

    def labelled(self, labels: int, label_seed: int) -> tuple[Tensor, Tensor]:
        """Rows of the table whose true scores may be used, and these, [n] each."""
        chosen = self.datamodule.relabelled(labels, label_seed).prepared.labelled
        rows = self.table.in_pool.nonzero().squeeze(1)[chosen]
        return rows, self.table.target[rows]

    @cached_property
    def weights(self) -> str:
        """SHA-256 of the experts."""
        digest = hashlib.sha256()
        for name, value in self.network.experts.state_dict().items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def scores(self) -> str:
        """SHA-256 of every score of the table, those held out among them."""
        digest = hashlib.sha256()
        add_weights(digest, {"target": self.table.target, "low_fidelity": self.table.low_fidelity})
        return digest.hexdigest()

    def compared(self) -> dict[tuple[int, int], Scores]:
        """Scores of every predictor by number and seed of the labels; what an earlier run measured is read."""
        wanted = [(labels, seed) for labels in self.numbers for seed in self.label_seeds]
        found = in_turn(self.evaluations, [partial(self.cell, *each) for each in wanted])
        return dict(zip(wanted, found, strict=True))

    def cell(self, labels: int, label_seed: int, again: bool = False) -> Scores:
        """Scores on the candidates held out after one choice of labels; kept in the run folder."""
        method = self.method
        path = Path(self.evaluations.trainer.default_root_dir) / "comparison" / f"{labels}-{label_seed}.json"
        facts = [self.datamodule.fingerprint, self.scores, self.weights, method.predictors]
        facts += [method.finetune_steps, method.lr]
        key = fingerprint_of([*facts, labels, label_seed, self.datamodule.batch_size])
        if path.is_file() and not again:
            kept = io.read_record(path, kind=_KIND, version=_VERSION)
            if kept.get("fingerprint") == key:
                return kept["scores"]  # type: ignore[no-any-return]
        rows, targets = self.labelled(labels, label_seed)
        truth, scores = self.table.target[self.held_out], {}
        for name in method.predictors:
            predict = self.contenders.fit(name, rows, targets, label_seed)
            scores[name] = ranking_scores(predict(self.held_out)[0], truth)
        io.write_record(path, {"fingerprint": key, "scores": scores}, kind=_KIND, version=_VERSION)
        return scores

    def indicators(self) -> Scores:
        """Scores of each low-fidelity score by itself, without any label.

        "expert_tau" is Kendall's tau of its expert to it, NaN where fewer than two candidates held out have it.
        """
        rows, features = self.held_out, self.contenders.score_features
        truth, found = self.table.target[rows], {}
        for number, name in enumerate(self.contenders.pool.names):
            own = self.contenders.low_fidelity[rows, number]
            known = own.isfinite()
            tau = kendall_tau(self.contenders.expert_features[rows, number][known], own[known])
            found[name] = {
                **ranking_scores(features[rows, number], truth),
                EXPERT_TAU: tau if known.sum() > 1 else math.nan,
            }
        return found

    def doubts(self) -> list[str]:
        """What is doubtful of experts and gate before the labels of the data train them."""
        rows, targets = self.labelled(self.datamodule.labels, self.datamodule.label_seed)
        network = self.contenders.begun(rows, targets, self.datamodule.label_seed)
        return expert_doubts(network, self.contenders.pool.names, self.table.tokens[rows], targets)

    def trained(self, name: str) -> TrainedExperts:
        """A predictor after the labels of the data."""
        rows, targets = self.labelled(self.datamodule.labels, self.datamodule.label_seed)
        return self.contenders.trained(name, rows, targets, self.datamodule.label_seed)

    @cached_property
    def _cost(self) -> Tensor | None:
        """What each candidate costs, float [N], NaN where that is not known; None where nothing is limited.

        A measurement that is negative failed.
        """
        name, known = self.method.cost, self.datamodule.low_fidelity
        if name is None:
            return None
        if name not in known:
            raise UserError(f"method.cost: data.low_fidelity has no {name}: {', '.join(known)}")
        cost = cleaned(self.table.low_fidelity[:, known.index(name)])
        return torch.where(cost < 0, torch.nan, cost)

    def _affordable(self) -> Tensor:
        """Which rows cost no more than is allowed, bool [N]."""
        cost, limit = self._cost, self.method.cost_limit
        if cost is None or limit is None:
            return torch.ones(len(self.table.tokens), dtype=torch.bool)
        return cost <= limit

    @cached_property
    def searched(self) -> Tensor:
        """Rows that a search may choose: their true score is known, and they cost no more than is allowed; int64."""
        rows: Tensor = (self._affordable() & self.table.target.isfinite()).nonzero().squeeze(1)
        if not len(rows):
            raise UserError(f"method.cost_limit = {self.method.cost_limit}: every candidate costs more; {self._costs}")
        return rows

    def cost_doubts(self) -> list[str]:
        """What to think twice about in the limit of the costs."""
        if self._cost is None or not bool((self._affordable() == self._cost.isfinite()).all()):
            return []
        return [f"method.cost_limit = {self.method.cost_limit} leaves no candidate out: {self._costs}"]

    @property
    def _costs(self) -> str:
        """The range of the costs, which shows whether a limit is in their unit."""
        known = self._cost[self._cost.isfinite()] if self._cost is not None else torch.zeros(0)
        span = f"goes from {float(known.min()):.4g} to {float(known.max()):.4g}" if len(known) else "is never known"
        return f"{self.method.cost} {span}"

    @cached_property
    def space(self) -> TableSpace:
        """Of these rows."""
        cost, rows = self._cost, self.searched
        costs = {} if cost is None else {str(self.method.cost): cost[rows]}
        return TableSpace(self.table.tokens[rows], self.table.vocabulary, costs)

    @property
    def searches(self) -> tuple[str, ...]:
        """What is searched with, random search first."""
        if not self.method.searches:
            return ()
        return (RANDOM, *self.method.searches) if self._takes_predictor else (RANDOM, UNGUIDED)

    @property
    def _takes_predictor(self) -> bool:
        planner = self.method.settings.strategy
        return hasattr(getattr(planner, "strategy", planner), "predictor")

    def task(self, name: str, seed: int) -> SearchTask:
        """One search."""
        settings, planner = self.method.settings, self.method.settings.strategy
        if name == RANDOM:
            planner = PlainPlan(RandomSearch())
        elif name != UNGUIDED:
            predictor = TablePredictor(name, self.contenders, self.space, self.searched)
            planner = with_predictor(planner, predictor)
        with in_config("search"):
            plan = self.runner.plan(f"{name}-{seed}", lambda budget: planner.plan(self.space, budget, None))
            problem = Problem(self.space, seed, settings.fidelity)
        targets = self.table.target[self.searched]
        evaluator = one_by_one(TableObjective(self.space, targets), settings.time_limit_s)
        depends = {
            "objective": self.datamodule.target,
            "data": fingerprint_of([self.datamodule.fingerprint, targets.tolist()]),
            "weights": self.weights,
            "finetune_steps": str(self.method.finetune_steps),
            "lr": str(self.method.lr),
        }
        return SearchTask(f"{name}-{seed}", problem, plan, evaluator, depends, shared=False)

    def regrets(self) -> dict[str, list[list[float]]]:
        """By search and seed: how far the best so far stays behind the best of all, after each evaluation."""
        settings, best = self.method.settings, float(self.table.target[self.searched].max())
        seeds = range(settings.seed, settings.seed + self.method.search_seeds)
        found: dict[str, list[list[float]]] = {name: [] for name in self.searches}
        for seed in seeds:
            for name in self.searches:
                result = self.runner.run(self.task(name, seed), part=f"search {name}")
                scores = torch.tensor([math.inf if each.score is None else each.score for each in result.records])
                found[name].append((best + scores.double().cummin(0).values).tolist())
        return found

    def proposals(self) -> list[dict[str, Any]]:
        """Rows whose true score is not known and is most worth knowing, after all that are known."""
        known, unknown = self.table.target.isfinite(), ~self.table.target.isfinite() & self._affordable()
        rows = unknown.nonzero().squeeze(1)
        if not len(rows) or not self.method.propose:
            return []
        measured = known.nonzero().squeeze(1)
        predict = self.contenders.fit(self.method.predictor, measured, self.table.target[measured])
        mean, deviation = predict(rows)
        worth = expected_improvement(-mean, deviation, -float(predict(measured)[0].max()))
        order = torch.argsort(worth, descending=True, stable=True)[: self.method.propose].tolist()
        return [
            {
                "row": int(rows[place]),
                "tokens": self.table.tokens[rows[place]].tolist(),
                "mean": float(mean[place]),
                "deviation": float(deviation[place]),
            }
            for place in order
        ]
