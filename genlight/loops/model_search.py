"""OMS-DPM: which of several denoisers to call at which step, and with which solver step, under budgets of time.

Liu et al. 2023, "OMS-DPM: Optimizing the Model Schedule for Diffusion Probabilistic Models" (arXiv 2306.08860): measure
random model schedules, fit a predictor that ranks them, evolve on its scores under each budget, measure the best. Added
here: schedules by rules that people use and by an analytic allocation begin the search and stay beside its results, and
what is chosen is chosen, and reported, on noise and images that the search has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from genlight.data.prompts import PromptsDataModule
from genlight.diffusion.model_schedule import Kind
from genlight.errors import UserError
from genlight.loops.cost import FirstValidation, announced, first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged, checked_mode, direction
from genlight.loops.model_cost import model_cost
from genlight.loops.model_report import model_result
from genlight.loops.model_work import ModelWork
from genlight.loops.result import MethodResult
from genlight.loops.search import SearchSettings
from genlight.reports.cost import CostEstimate
from genlight.search.protocols import ScheduledMembers, require_capability
from genlight.search.spaces.model_schedule import ModelScheduleSpace

RULES = ("single", "small_first", "large_first", "sandwich", "analytic")


class ModelSearch:
    """The method `oms`: schedules of models for budgets of time, from a zoo of denoisers.

    Args:
        search: how schedules are chosen and how many are measured, for all budgets together.
        objective: name of a metric that validate logs, such as "val/fd_digits".
        mode: "min", "max", or "auto": as the metric says which way it is better.
        budgets: in units of one call of the dearest member, for one batch.
        unit: "ms", measured latency, or "macs", work, which is the same on every machine.
        kinds, max_evaluations, slots, max_order: see `ModelScheduleSpace`.
        rules: schedules by these rules begin the search: "single", "small_first", "large_first", "sandwich",
            "analytic".
        per_rule: so many of each rule and budget at most; twice as many sandwiches, three times as many analytic
            allocations.
        singles: so many of single models for all budgets together at most: for each budget, member and order the most
            evaluations that fit, then others evenly. None: all.
        select: samples for choosing among the best, on noise and real images of their own.
        batch_size: rows of one call whose cost is measured. None: the batches of the evaluation.
        costs: file of costs that were measured before, for these members, this batch and this machine, see
            `genlight.reports.latency`. None: measure.
        curve_images: training images on which the members' errors are measured, for "analytic".
        drop_failing: go on without a member that raises or runs out of memory while it is measured. False: stop there.

    Raises:
        ValueError: a value out of range.
    """

    predicts_cost = True

    def __init__(
        self,
        search: SearchSettings,
        objective: str,
        mode: Literal["auto", "min", "max"] = "auto",
        budgets: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
        unit: Literal["ms", "macs"] = "ms",
        kinds: Sequence[Kind] = ("singlestep",),
        max_evaluations: int = 36,
        slots: int = 100,
        max_order: int = 3,
        rules: Sequence[str] = RULES,
        per_rule: int = 8,
        singles: int | None = 64,
        select: int = 2000,
        batch_size: int | None = None,
        costs: str | None = None,
        curve_images: int = 512,
        drop_failing: bool = False,
    ) -> None:
        if not isinstance(search, SearchSettings) or not hasattr(search.strategy, "plan_budgets"):
            raise ValueError("method=oms searches for several budgets: choose how by search=oms (or oms_direct)")
        if not budgets or any(not budget > 0 for budget in budgets):
            raise ValueError(f"method.budgets = {list(budgets)!r} must be positive numbers, one or more")
        if unknown := sorted(set(rules) - set(RULES)):
            raise ValueError(f"method.rules: {', '.join(unknown)} unknown; known are {', '.join(RULES)}")
        counts = {"per_rule": per_rule, "singles": singles, "select": select, "curve_images": curve_images}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"method.{name} = {value!r} must be 1 or more")
        if unit not in ("ms", "macs"):
            raise ValueError(f"method.unit = {unit!r} must be ms or macs")
        self.settings, self.objective, self.mode, self.unit = search, objective, checked_mode(mode), unit
        self.budgets = tuple(sorted({float(budget) for budget in budgets}))
        self.space: dict[str, Any] = {
            "kinds": tuple(kinds),
            "max_evaluations": max_evaluations,
            "slots": slots,
            "max_order": max_order,
        }
        self.rules, self.per_rule, self.singles, self.select = tuple(rules), per_rule, singles, select
        self.batch_size, self.costs, self.curve_images = batch_size, costs, curve_images
        self.drop_failing = drop_failing

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Measure costs, search, choose for each budget, and report.

        Raises:
            UserError: a module without members, a metric that is not logged or goes the other way (`mode`), costs that
                were measured for something else, a budget below the cheapest schedule,
                the rule "analytic" without real images, a member that fails (see `drop_failing`).
        """
        work, first = self._work(trainer, module, datamodule)
        predicted = announced(trainer, lambda: model_cost(work, first))
        return model_result(work, first.logged, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Measure a few schedules, and multiply."""
        return model_cost(*self._work(trainer, module, datamodule, dry=True))

    def _work(
        self, trainer: Any, module: Any, datamodule: Any, *, dry: bool = False
    ) -> tuple[ModelWork, FirstValidation]:
        require_capability(module, ScheduledMembers, ModelScheduleSpace, ("ZooModule", "PipelineModule with members"))
        if not module.members:
            raise UserError("module.members is empty: name the denoisers that are to take turns")
        if "analytic" in self.rules and isinstance(datamodule, PromptsDataModule):
            raise UserError(
                "method.rules: analytic needs real images, which prompts are not; set it to "
                f"[{','.join(rule for rule in self.rules if rule != 'analytic')}]"
            )
        first = first_validation(trainer, module, datamodule, dry=dry)
        check_logged(self.objective, first.logged)
        self.mode = direction(self.mode, self.objective, getattr(module, "metrics", None))
        return ModelWork(self, CandidateTrainer(trainer), module, datamodule), first
