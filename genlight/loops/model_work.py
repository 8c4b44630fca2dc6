"""The work of OMS-DPM: what members cost, where schedules begin, the search, and the choice for each budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.callbacks.timing import print_line
from genlight.diffusion.error_curves import ErrorCurve
from genlight.diffusion.model_schedule import ModelSchedule
from genlight.errors import UserError, in_config
from genlight.loops.cost import CHOICE
from genlight.loops.draw_metrics import DrawMetrics
from genlight.loops.evaluation import CandidateTrainer, MetricObjective, in_turn
from genlight.loops.model_costs import member_costs, reason_of, times_of, wanted_key
from genlight.loops.model_curves import member_curves, read_curves, write_curves
from genlight.loops.search import SearchRunner, SearchTask
from genlight.reports.member_costs import MemberCosts, Unit, check_work, read_begun_costs, read_costs, write_costs
from genlight.search.engine import Budget, SearchResult
from genlight.search.evaluation import one_by_one
from genlight.search.member_failures import WithoutFailed, failed_member, failed_members, naming_members
from genlight.search.proposing import RANDOM
from genlight.search.protocols import Evaluation
from genlight.search.records import Problem, Record, fits
from genlight.search.spaces.model_allocation import analytic_allocation
from genlight.search.spaces.model_rules import chosen_singles, large_first, sandwich, single_models, small_first
from genlight.search.spaces.model_schedule import ModelScheduleSpace

if TYPE_CHECKING:
    from genlight.loops.model_search import ModelSearch

COSTS, CURVES = "latency.json", "curves.json"
SEARCHED = "searched"
SCHEDULES = "schedules"
# of each rule, and of what was drawn at random, these are judged for each budget
RULE_FINALISTS = 2
# of one batch, as `ModelWork.times` names them
TIMES = ("measured_ms", "predicted_ms")
FailedMember = tuple[str, str]  # its name, and the reason


@dataclass(frozen=True)
class Choice:
    """What was measured for one budget.

    Attributes:
        budget: in units of the dearest member's call.
        rule: "searched", "random" (the random schedules that the search began with), or the rule that made it.
        name: in words.
        schedule: the schedule.
        cost: of it, in the unit of the costs, that of a batch beside its evaluations included.
        search, select: scores on these draws, lower is better.
    """

    budget: float
    rule: str
    name: str
    schedule: ModelSchedule
    cost: float
    search: float
    select: float = float("nan")


@dataclass
class ModelWork:
    """Everything that the steps of the method share.

    Attributes:
        method: the settings.
        evaluations, module, datamodule: of the run.
    """

    method: ModelSearch
    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    _told: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def runner(self) -> SearchRunner:
        """Runs the search in the run folder."""
        return SearchRunner(self.evaluations, self.method.settings)

    @cached_property
    def draws(self) -> DrawMetrics:
        """The metric on each draw."""
        method = self.method
        return DrawMetrics(
            self.evaluations, self.module, self.datamodule, method.objective, method.mode, self.runner.folder
        )

    @cached_property
    def costs(self) -> MemberCosts:
        """Of one evaluation by each member: read from `method.costs` or an earlier start of this run, or measured.

        Raises:
            UserError: `method.costs` was measured for something else, or in another unit; a member without costs, or
                one that fails, unless the user agreed to leave it out.
        """
        method, file = self.method, self.runner.folder / COSTS
        # what a search began with is what it goes on with
        begun = self.evaluations.agreed(file.is_file())
        wanted = partial(wanted_key, self.module, self.rows, self.evaluations.trainer.strategy.root_device)
        known = read_begun_costs(file, wanted()) if begun else self._given(method.costs) if method.costs else None
        found = self.evaluations.agreed(known)
        if found is not None and not begun:
            check_work(found, self._measured("macs")[0])
        if found is None:
            found, failed = self._measured(method.unit)
            for name, reason in failed.items():
                self.leave_out(name, reason)
            found = replace(found, notes=(*found.notes, *(_note(*each) for each in failed.items())))
        missing = sorted(set(self.module.members) - set(found.members))
        if missing and not method.drop_failing:
            raise UserError(f"{file} has no costs of {', '.join(missing)}")
        if self.runner.main:
            write_costs(file, found)
        return found  # type: ignore[no-any-return]

    def _measured(self, unit: Unit) -> tuple[MemberCosts, dict[str, str]]:
        """`member_costs`, the same on all processes."""
        measure = partial(member_costs, self.module, self.rows, unit)
        with self.evaluations.display.phase("costs of members"):
            return self.evaluations.agreed(self.evaluations.inside(self.module, measure))  # type: ignore[no-any-return]

    def _given(self, file: str) -> MemberCosts:
        """Costs that were measured before, if they are those of this run."""
        found = read_costs(file, wanted_key(self.module, self.rows, self.evaluations.trainer.strategy.root_device))
        if found.unit != self.method.unit:
            raise UserError(f"method.costs: {file} is in {found.unit}, but method.unit = {self.method.unit}")
        if set(found.members) != set(self.module.members):
            raise UserError(
                f"method.costs: {file} has costs of {', '.join(found.members)}, but the members are "
                f"{', '.join(self.module.members)}"
            )
        return found

    @property
    def rows(self) -> int:
        """Samples of one call whose time is measured."""
        most = getattr(self.module, "batch_size", None) or self.datamodule.eval_batch_size
        return self.method.batch_size or min(most, self.datamodule.eval_batch_size)

    def leave_out(self, name: str, reason: str) -> None:
        """Say, once, that a member fails and is left out; UserError where the user has not agreed to that."""
        if not self.method.drop_failing:
            raise UserError(
                f"the member {name} fails: {reason}; mend it, or take it out of module.members, or let resume=true "
                "method.drop_failing=true go on without members that fail"
            )
        if self.runner.main and name not in self._told:
            print_line(_note(name, reason))
        self._told.setdefault(name, reason)

    def notes(self) -> list[str]:
        """What makes the costs doubtful, and which members were left out."""
        # costs that were read again say it too
        return list(dict.fromkeys([*self.costs.notes, *(_note(*each) for each in self._told.items())]))

    @cached_property
    def space(self) -> ModelScheduleSpace:
        """Model schedules up to the largest budget."""
        found = self.costs
        with in_config("method"):
            return ModelScheduleSpace(
                self.module.prediction.schedule,
                found.costs,
                self.limits[self.method.budgets[-1]],
                switch=found.switch,
                **self.method.space,
            )

    @cached_property
    def limits(self) -> dict[float, float]:
        """What all evaluations of a schedule may cost, in the unit of the costs, by budget; a batch costs more by
        `costs.batch`, whatever the schedule. UserError for one that no schedule keeps or none exceeds.
        """
        dearest, cheapest = max(self.costs.costs.values()), min(self.costs.costs.values())
        limits = {budget: budget * dearest for budget in self.method.budgets}
        most = self.method.space["max_evaluations"]
        highest = most * dearest + (most - 1) * self.costs.switch
        for budget, limit in limits.items():
            said = f"method.budgets: {budget:g} calls of the dearest member are"
            if limit < cheapest:
                raise UserError(f"{said} below one of the cheapest, {cheapest / dearest:.3g}")
            if not fits(limit, highest):
                raise UserError(
                    f"{said} more than any schedule costs, {highest / dearest:.4g} with method.max_evaluations = {most}"
                )
        return limits

    @cached_property
    def initial(self) -> dict[str, tuple[str, ModelSchedule]]:
        """(rule, schedule) by name, for all budgets."""
        found: dict[str, tuple[str, ModelSchedule]] = {}
        count = self.method.per_rule
        if "single" in self.method.rules:
            for each in chosen_singles(self.space, self.limits.values(), self.method.singles or self.all_singles):
                found[f"single {each.name}"] = "single", each.schedule
        for budget, limit in self.limits.items():
            space = self.space.with_budget(limit)
            made: dict[str, Callable[[], list[Any]]] = {
                "small_first": partial(small_first, space, count),
                "large_first": partial(large_first, space, count),
                "sandwich": partial(sandwich, space, 2 * count),
                # it says which members, not which layout: several are measured
                "analytic": partial(self._allocated, space, 3 * count),
            }
            for rule in [rule for rule in self.method.rules if rule in made]:
                for each in made[rule]():
                    found.setdefault(f"{rule} @{budget:g} {each.name}", (rule, each.schedule))
        return found

    @cached_property
    def all_singles(self) -> int:
        """How many single models there are within the largest budget."""
        return len(single_models(self.space))

    def _allocated(self, space: ModelScheduleSpace, count: int) -> list[Any]:
        missing = self.space.costs.keys() - self.curves.keys()
        return list(analytic_allocation(space.without(missing), self.curves, count=count))

    @cached_property
    def curves(self) -> dict[str, ErrorCurve]:
        """Errors of the members that work over λ on training images; the same on all processes.

        Read from an earlier start of this run, or measured: what a search begins with depends on their last digits.
        """
        file = self.runner.folder / CURVES
        found, failed = self.evaluations.agreed(read_curves(file) if file.is_file() else (None, {}))
        if found is None:
            count = self.method.curve_images
            measure = partial(member_curves, self.module, self.datamodule, tuple(self.costs.costs), count)
            with self.evaluations.display.phase("errors of members"):
                found, failed = self.evaluations.agreed(self.evaluations.inside(self.module, measure))
        for name, reason in failed.items():
            self.leave_out(name, reason)
        if self.runner.main:
            write_curves(file, found, failed)
        return found  # type: ignore[no-any-return]

    @cached_property
    def informed(self) -> ModelScheduleSpace:
        """The space with the errors of its members, where all of them are measured for "analytic" anyhow."""
        known = "analytic" in self.method.rules and not self.space.costs.keys() - self.curves.keys()
        return replace(self.space, curves=self.curves) if known else self.space

    @cached_property
    def task(self) -> SearchTask:
        """The search over all budgets."""
        settings = self.method.settings
        planner: Any = settings.strategy
        schedules = [schedule for _, schedule in self.initial.values()]
        with in_config("search"):
            limits = tuple(self.limits.values())
            make = partial(planner.plan_budgets, self.space, initial=schedules, budgets=limits)
            plan = self.runner.plan(SCHEDULES, lambda budget: make(evaluations=budget))
        plan = replace(plan, strategy=WithoutFailed(plan.strategy, min(self.limits.values())))
        problem = Problem(self.informed, settings.seed, settings.fidelity)
        measure = one_by_one(self.draws.objective(self.space, "search"), settings.time_limit_s)
        evaluator = naming_members(measure, self.module.scheduled)
        depends = {**self.draws.describe(), "weights": self.evaluations.fingerprint(self.module)}
        # costs that were timed here are those of this run alone
        shared = self.costs.unit != "ms" or self.method.costs is not None
        return SearchTask(SCHEDULES, problem, plan, evaluator, depends, self._check, shared)

    def _check(self, record: Record[ModelSchedule]) -> None:
        """Leave out the member for which a candidate failed, if one did."""
        if found := failed_member(record):
            self.leave_out(*found)

    @cached_property
    def result(self) -> SearchResult[ModelSchedule]:
        """The search, from where it stopped; as many others are measured as there are schedules of failed members."""
        task = self.task
        while True:
            found = self.runner.run(task)
            for record in found.records:
                self._check(record)
            count = self.task.plan.budget.evaluations + len(found.records) - len(_working(found.records))
            if count == task.plan.budget.evaluations or found.stopped != "budget":
                return found
            task = replace(task, plan=replace(task.plan, budget=Budget(count)))

    def choices(self) -> list[Choice]:
        """For each budget the best of the search and of every rule by the search draw, all with their select scores.

        Raises:
            UserError: nothing could be measured within a budget.
        """
        found = [choice for budget in self.limits for choice in self._finalists(budget)]
        distinct = {self.space.key(choice.schedule): choice.schedule for choice in found}
        with self.evaluations.timing(CHOICE):
            scores = dict(zip(distinct, self.judge(list(distinct.values())), strict=True))
        found = [replace(choice, select=scores[self.space.key(choice.schedule)]) for choice in found]
        # one that fails now is nobody's choice, unless all do
        working = {choice.budget for choice in found if choice.select < float("inf")}
        return [choice for choice in found if choice.select < float("inf") or choice.budget not in working]

    def _finalists(self, budget: float) -> list[Choice]:
        # by rule: a schedule that several rules make stands for each of them
        rules: dict[str, dict[str, str]] = {}
        for name, (rule, schedule) in self.initial.items():
            rules.setdefault(self.space.key(schedule), {}).setdefault(rule, name)
        limit, measured = self.limits[budget], [r for r in _working(self.result.records) if r.score is not None]
        within = [record for record in measured if fits(record.cost["cost"], limit)]
        if not within:
            raise UserError(f"no schedule could be measured within {budget:g}: see {self.runner.folder}")
        ranked: Sequence[Record[ModelSchedule]] = sorted(within, key=lambda record: record.rank)
        kept: list[Choice] = []
        for record in ranked:
            made = RANDOM if record.source == RANDOM else SEARCHED
            score, cost = float(record.score or 0.0), record.cost["cost"] + self.costs.batch
            for rule, name in rules.get(record.key, {made: f"{made} {record.index}"}).items():
                most = self.method.settings.finalists if rule == SEARCHED else RULE_FINALISTS
                if sum(choice.rule == rule for choice in kept) < most:
                    kept.append(Choice(budget, rule, name, record.candidate, cost, score))
        return kept

    def judge(self, schedules: Sequence[ModelSchedule]) -> list[float]:
        """Scores on the select draw, lower is better; infinite where a schedule fails."""
        objective = self.draws.objective(self.space, "select")

        def one(schedule: ModelSchedule) -> float | FailedMember:
            try:
                found = self.evaluated(objective, schedule, self.method.select)
            except (ValueError, FloatingPointError):
                return float("inf")
            return found.score if isinstance(found, Evaluation) else found

        pieces: list[Callable[[], float | FailedMember]] = [partial(one, each) for each in schedules]
        scores: list[float] = []
        for found in in_turn(self.evaluations, pieces):
            if isinstance(found, tuple):
                self.leave_out(*found)  # on all processes, whichever of them measured it
                found = float("inf")
            scores.append(found)
        return scores

    def evaluated(self, objective: MetricObjective, schedule: ModelSchedule, samples: int) -> Evaluation | FailedMember:
        """The score and the metrics of a schedule, or the member that fails in it."""
        scheduled = self.module.scheduled
        scheduled.failed = None
        try:
            return objective.evaluate(schedule, samples)
        except Exception as error:
            if scheduled.failed is None:
                raise
            return scheduled.failed, reason_of(error)

    def report(self, schedule: ModelSchedule) -> dict[str, float]:
        """Every metric on the report draw. UserError where a member fails."""
        objective = self.draws.objective(self.space, "report")
        evaluation = self.evaluated(objective, schedule, self.datamodule.num_samples)
        if isinstance(evaluation, tuple):
            self.leave_out(*evaluation)
            raise UserError(
                f"{schedule} was chosen, and a member of it fails on the report draw; resume with it mended"
            )
        return {name: float(value) for name, value in evaluation.facts.items()}

    def times(self, schedules: Sequence[ModelSchedule]) -> list[dict[str, float]]:
        """ "measured_ms" of one batch by each schedule; for costs in milliseconds also "predicted_ms", by costs of the
        members that were measured again by turns with the schedules.
        """
        measure = partial(times_of, self.module, self.space, schedules, self.rows, self.costs)
        found, costs = self.evaluations.agreed(self.evaluations.inside(self.module, measure))
        if costs.unit == "macs":
            return [{"measured_ms": ms} for ms in found]
        space = replace(self.space, costs=costs.costs, budget=None)
        return [
            {"measured_ms": ms, "predicted_ms": space.cost(schedule)["cost"] + costs.batch}
            for ms, schedule in zip(found, schedules, strict=True)
        ]

    def restore(self) -> None:
        """Put the module's own sampler and member back."""
        self.module.set_sampler(None)
        self.module.set_members((), ())


def _working(records: Sequence[Record[ModelSchedule]]) -> list[Record[ModelSchedule]]:
    """Those without a member that failed, for whatever candidate."""
    failed = failed_members(records).keys()
    return [record for record in records if not failed & set(record.candidate.members)]


def _note(name: str, reason: str) -> str:
    return f"the member {name} fails and is left out: {reason}"


def file_of(folder: Path, budget: float) -> Path:
    """Where the schedule of a budget is written."""
    return folder / f"model_schedule_{budget:g}.json"
