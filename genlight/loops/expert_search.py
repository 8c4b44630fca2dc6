"""EEP: fewer experts for one task, chosen and merged by a search on the task's own metric.

Liu et al. 2024, "Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models" (arXiv:2407.00945): evolve
which experts each layer keeps, then matrices that merge them, by inference only. Added here: the search begins with
every usual baseline, scores by the log-likelihood of the right answers, never measures a candidate twice, and what is
chosen is chosen, and reported, on questions that the search has not seen, beside the tasks it was not made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from genlight.data.text_tasks import repeated
from genlight.errors import UserError, in_config
from genlight.experts.baselines import BASELINES
from genlight.experts.prefix_cache import PrefixCache
from genlight.loops.cost import FirstValidation, announced, first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged, checked_mode, direction
from genlight.loops.expert_calibration import WholeModel
from genlight.loops.expert_cost import expert_cost
from genlight.loops.expert_numbers import LIMITS, numbers_of, within_limits
from genlight.loops.expert_remarks import remarks_before
from genlight.loops.expert_report import expert_result
from genlight.loops.expert_work import ExpertWork
from genlight.loops.result import MethodResult
from genlight.loops.search import SearchSettings
from genlight.reports.cost import CostEstimate
from genlight.search.protocols import ReadableExperts, require_capability
from genlight.search.spaces.expert_maps import ExpertMapSpace

# what is measured of tasks with choices alone; the first is the default
_OF_CHOICES = ("val/choice_log_likelihood", "val/choice_probability")


class ExpertSearch:
    """The method `eep`: a mixture of experts with fewer of them, for some of the tasks it can do.

    Args:
        search: how candidates are chosen and how many are measured.
        num_experts: experts that each layer keeps; several numbers: a search for each; None: the most that `limits`
            allow.
        limits: the most "parameters", "bytes" (of all weights) and "ms_per_token" (milliseconds of scoring, measured
            here) that a model may have; numbers of experts beyond are left out.
        num_experts_per_tok: of them for each token; None: as the model has, at most those that are left.
        tasks: names of the tasks to search for; None: all that the data measures. The report is on all of these.
        objective: name of a metric that validate logs, such as "val/accuracy"; None: "val/choice_log_likelihood" where
            every task of the search has choices, else "val/log_likelihood".
        mode: "min", "max", or "auto": as the metric says which way it is better.
        groups: of layers with the same maps, evenly by depth; None: each layer has its own.
        router_mapping: "logits": what is merged can be saved; "post_softmax": mix probabilities, as published.
        baselines: what is compared with, and begins a warm search; names of `genlight.experts.baselines`.
        random_draws: random choices of experts that are measured beside them.
        calibration: questions of the search draw from which baselines know the experts.
        max_subsets: most sets that NAEE tries a layer.
        select: questions for choosing among the best, which the search has not seen.
        cache_bytes: for hidden states kept between candidates, on the device; 0: none. Scores are the same.

    Raises:
        ValueError: a value out of range.
    """

    predicts_cost = True

    def __init__(
        self,
        search: SearchSettings,
        num_experts: int | Sequence[int] | None,
        num_experts_per_tok: int | None = None,
        tasks: Sequence[str] | None = None,
        objective: str | None = None,
        mode: Literal["auto", "min", "max"] = "auto",
        groups: int | None = None,
        router_mapping: Literal["logits", "post_softmax"] = "logits",
        baselines: Sequence[str] = BASELINES[1:],
        random_draws: int = 10,
        calibration: int = 512,
        max_subsets: int = 2000,
        select: int = 512,
        cache_bytes: int = 0,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(search, SearchSettings):
            raise ValueError("method=eep searches: choose how by search=eep (or eep_paper, evolution, random)")
        if router_mapping not in ("logits", "post_softmax"):
            raise ValueError(f"method.router_mapping = {router_mapping!r} must be logits or post_softmax")
        if unknown := sorted(set(baselines) - set(BASELINES[1:])):
            raise ValueError(f"method.baselines: {', '.join(unknown)} unknown; known are {', '.join(BASELINES[1:])}")
        if twice := repeated(tasks or ()):
            raise ValueError(f"method.tasks names {', '.join(twice)} twice: name each task once")
        numbers = [num_experts] if isinstance(num_experts, int) else list(num_experts or ())
        limits = dict(limits or {})
        if unknown := sorted(limits.keys() - set(LIMITS)):
            raise ValueError(f"method.limits: {', '.join(unknown)} unknown; known are {', '.join(LIMITS)}")
        if (not numbers and not limits) or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"method.num_experts = {num_experts!r} must be different numbers, or null with method.limits"
            )
        counts = {"calibration": calibration, "select": select, "max_subsets": max_subsets}
        for name, value in [*(("num_experts", number) for number in numbers), *counts.items()]:
            if value < 1:
                raise ValueError(f"method.{name} = {value!r} must be 1 or more")
        if min(random_draws, cache_bytes) < 0 or (num_experts_per_tok is not None and num_experts_per_tok < 1):
            raise ValueError(
                f"method.random_draws = {random_draws!r} and method.cache_bytes = {cache_bytes!r} must not be "
                f"negative, and method.num_experts_per_tok = {num_experts_per_tok!r} 1 or more"
            )
        self.settings, self.objective, self.mode = search, objective, checked_mode(mode)
        self.router_mapping = router_mapping
        self.num_experts, self.num_experts_per_tok, self.groups = tuple(numbers), num_experts_per_tok, groups
        self.limits = limits
        self.tasks, self.baselines, self.random_draws = tasks, tuple(baselines), random_draws
        self.calibration, self.max_subsets, self.select = calibration, max_subsets, select
        self.cache_bytes = cache_bytes

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Measure the whole model and every baseline, search, choose, and report on questions that nothing chose by.

        Raises:
            UserError: a model without experts, a task or metric that is not there, a number of experts that cannot
                route, weights that are sharded.
        """
        works, first = self._works(trainer, module, datamodule)
        cost = announced(trainer, lambda: expert_cost(works, first))
        return expert_result(works, first.logged, cost)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Calibrate, measure three candidates, and multiply."""
        return expert_cost(*self._works(trainer, module, datamodule, dry=True))

    def _works(
        self, trainer: Any, module: Any, datamodule: Any, *, dry: bool = False
    ) -> tuple[list[ExpertWork], FirstValidation]:
        require_capability(module, ReadableExperts, ExpertMapSpace, ("module=causal_lm",))
        evaluations = CandidateTrainer(trainer)
        if evaluations.sharded:
            raise UserError("method=eep edits whole experts: use strategy=auto or strategy=ddp")
        editor, names = module.expert_editor(), list(self.tasks or datamodule.evaluate)
        if unknown := sorted(set(names) - set(datamodule.evaluate)):
            raise UserError(
                f"method.tasks names {', '.join(unknown)}; data measures {', '.join(datamodule.evaluate) or 'none'}"
            )
        editor.restore()
        editor.router_mapping = self.router_mapping
        with in_config("method"):
            numbers = numbers_of(editor, self.num_experts, lambda number: self.experts_per_token(editor, number))
            if self.groups is not None and not 1 <= self.groups <= len(editor.layers):
                raise ValueError(
                    f"groups = {self.groups} must lie in 1 .. {len(editor.layers)}, the layers with experts"
                )
            cache = PrefixCache(editor, self.cache_bytes) if self.cache_bytes else None
        data = datamodule.measuring(names)
        metric = self.metric_of({name: data.tasks[name].kind for name in names})
        first = first_validation(trainer, module, datamodule, dry=dry)
        check_logged(metric, first.logged)
        self.mode = direction(self.mode, metric, module.metrics)
        asked = min(self.settings.fidelity, len(data.examples("search")))
        whole = WholeModel(self, numbers, evaluations, module, data)
        works = [ExpertWork(self, number, whole, datamodule, metric, cache) for number in numbers]
        works = within_limits(works, self.limits, most_only=not self.num_experts)
        whole.numbers = [work.num_experts for work in works]
        works[0].runner.remark(remarks_before(metric, names, asked, first.logged))
        return works, first

    def metric_of(self, kinds: Mapping[str, str]) -> str:
        """The objective: what was asked for, else the log-likelihood of what decides the answers.

        Args:
            kinds: of the tasks of the search, by name.

        Raises:
            UserError: the objective is about choices, and a task has none.
        """
        written = [name for name, kind in kinds.items() if kind == "generation"]
        if written and self.objective in _OF_CHOICES:
            raise UserError(
                f"method.objective={self.objective} says nothing of {', '.join(written)}, whose answers are written: "
                "leave it null, or name the tasks with choices in method.tasks"
            )
        return self.objective or ("val/log_likelihood" if written else _OF_CHOICES[0])

    def experts_per_token(self, editor: Any, num_experts: int) -> int:
        """k of candidates: what was asked for, else the model's own, at most the experts that are left."""
        own = int(editor.own_routing.num_experts_per_tok)
        return self.num_experts_per_tok or min(own, num_experts)
