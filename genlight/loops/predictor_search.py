"""DELE: few true scores, many cheap ones. Which predictor makes most of them, and what a search finds with it.

Zhao et al., "Dynamic Ensemble of Low-fidelity Experts", AAAI 2023 (arXiv 2302.00932): experts pretrained on cheap
scores, fused by a gate that few true scores train. Added here: every ablation and rival in the same table on candidates
held out, regressions on frozen experts, which do better with few labels, and Bayesian search beside evolution.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlight.errors import UserError, in_config
from genlight.loops.cost import announced, first_validation
from genlight.loops.evaluation import CandidateTrainer
from genlight.loops.predictor_cost import predictor_cost
from genlight.loops.predictor_report import predictor_result
from genlight.loops.predictor_work import PredictorWork
from genlight.loops.result import MethodResult
from genlight.loops.search import SearchSettings
from genlight.modules.predictor import SAVED
from genlight.predictors.contenders import DELE, NAMES, SAVABLE
from genlight.predictors.experts import ExpertEnsemble
from genlight.reports.cost import CostEstimate
from genlight.trainer.checkpoint_io import load_checkpoint

_EXPERTS = "network.experts."


class PredictorSearch:
    """The method `dele`: predictors of a table's true scores side by side, and a search of the table with them.

    Args:
        search: how candidates of the search are chosen and how many are measured.
        ckpt_path: of the command: what `fit` of a predictor left.
        predictor: what is saved, and proposes what to measure next: one of SAVABLE of `genlight.predictors.contenders`.
        predictors: what is compared: of its NAMES.
        labels: true scores that they may use, each number in turn; None: data.labels alone.
        label_seeds: choices of labelled candidates for each number, from data.label_seed on.
        finetune_steps: gradient steps of the second step, by Adam.
        lr: its learning rate.
        searches: predictors to search with, beside random search; none: no search.
        search_seeds: searches with each, from search.seed on.
        cost: one of data.low_fidelity that a search limits, such as a latency; None: none.
        cost_limit: the most that a candidate may cost.
        propose: candidates without a true score that are named as the next to measure.

    Raises:
        ValueError: a value out of range, or an unknown predictor.
    """

    predicts_cost = True

    def __init__(
        self,
        search: SearchSettings,
        ckpt_path: str | None = None,
        predictor: str = "expert_gp",
        predictors: Sequence[str] = NAMES,
        labels: Sequence[int] | None = None,
        label_seeds: int = 3,
        finetune_steps: int = 200,
        lr: float = 1e-3,
        searches: Sequence[str] = ("expert_gp", DELE),
        search_seeds: int = 5,
        cost: str | None = None,
        cost_limit: float | None = None,
        propose: int = 10,
    ) -> None:
        if not isinstance(search, SearchSettings):
            raise ValueError("method=dele searches: choose how by search=dele (or guided, evolution, random)")
        for key, names, known in (
            ("predictor", [predictor], SAVABLE),
            ("predictors", predictors, NAMES),
            ("searches", searches, NAMES),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(f"method.{key}: {name} must be one of {', '.join(known)}")
        if labels is not None and (not labels or min(labels) < 2):
            raise ValueError(f"method.labels = {list(labels)} must be numbers of 2 or more, or null")
        for key, value in (
            ("label_seeds", label_seeds),
            ("finetune_steps", finetune_steps),
            ("search_seeds", search_seeds),
        ):
            if value < 1:
                raise ValueError(f"method.{key} = {value} must be 1 or more")
        if not lr > 0:
            raise ValueError(f"method.lr = {lr} must be positive")
        if propose < 0:
            raise ValueError(f"method.propose = {propose} must not be negative")
        if (cost is None) != (cost_limit is None):
            raise ValueError(f"method.cost = {cost} and method.cost_limit = {cost_limit} go together")
        self.settings, self.ckpt_path, self.predictor = search, ckpt_path, predictor
        self.predictors = tuple(dict.fromkeys([*predictors, predictor]))
        self.labels, self.label_seeds, self.finetune_steps, self.lr = labels, label_seeds, finetune_steps, lr
        self.searches, self.search_seeds = tuple(dict.fromkeys(searches)), search_seeds
        self.cost, self.cost_limit, self.propose = cost, cost_limit, propose

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Compare, search, and report on candidates held out.

        Raises:
            UserError: no checkpoint, one without the experts as the first step left them, a table with too few labels
                or without the cost, weights that are sharded.
        """
        work = self._work(trainer, module, datamodule)
        first = first_validation(trainer, module, datamodule)
        predicted = announced(trainer, lambda: predictor_cost(work, first))
        return predictor_result(work, first.logged, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Fit every predictor once, and multiply."""
        work = self._work(trainer, module, datamodule)
        return predictor_cost(work, first_validation(trainer, module, datamodule, dry=True))

    def _work(self, trainer: Any, module: Any, datamodule: Any) -> PredictorWork:
        if not hasattr(module, "trained"):
            raise UserError("method=dele compares predictors: choose module=predictor and a table of candidates")
        evaluations = CandidateTrainer(trainer)
        if evaluations.sharded:
            raise UserError("method=dele needs whole predictors: use strategy=auto or strategy=ddp")
        network = self._experts(module, datamodule.pretrain_steps)
        if not module.names:
            raise UserError("method=dele compares experts on cheap scores: name some in data.low_fidelity")
        work = PredictorWork(self, evaluations, datamodule, network)
        with in_config("method"):
            work.check()
        return work

    def _experts(self, module: Any, steps: int) -> ExpertEnsemble:
        """The network on the CPU, its experts as the first step left them: no label has touched them."""
        if self.ckpt_path is None:
            raise UserError("method=dele needs experts: give ckpt_path=<the folder of a fit>")
        network: ExpertEnsemble = copy.deepcopy(module.net).cpu().eval()
        if not module.finetuned:
            return network
        if module.pretrained_steps not in (None, steps):
            raise UserError(
                f"data.pretrain_steps = {steps}, but {module.pretrained_steps} in the fit of "
                f"ckpt_path={self.ckpt_path}: set it as there"
            )
        given = Path(self.ckpt_path)
        folder = given / "checkpoints" if given.is_dir() else given.parent
        path = folder / f"step-{steps:06d}.ckpt"
        if not path.is_file():
            raise UserError(
                f"{path} is not there, where the experts are as the first step left them: fit with "
                f"callbacks.checkpoint.save_top_k=-1 'callbacks.checkpoint.also_at=[{steps}]', or with "
                f"trainer.max_steps={steps}"
            )
        checkpoint = load_checkpoint(path)
        if checkpoint[SAVED]["finetuning"]:
            raise UserError(
                f"{path} holds experts that true scores have trained: set data.pretrain_steps as in their fit"
            )
        state = checkpoint["state_dict"]
        experts = {name.removeprefix(_EXPERTS): value for name, value in state.items() if name.startswith(_EXPERTS)}
        network.experts.load_state_dict(experts)
        return network
