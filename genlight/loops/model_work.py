"""The work of OMS-DPM: what members cost, where schedules begin, the search, and the choice for each budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genlight.diffusion.error_curves import error_curve
from genlight.diffusion.model_schedule import ModelSchedule, half_log_snr_range
from genlight.diffusion.prediction import Prediction
from genlight.errors import UserError, in_config
from genlight.loops.draw_metrics import DrawMetrics
from genlight.loops.evaluation import CandidateTrainer, MetricObjective, in_turn
from genlight.loops.search import SearchRunner, SearchTask
from genlight.modules.exported_pipeline import network_style, predict
from genlight.reports.cost import CostEstimate, Phase, estimate
from genlight.reports.latency import MemberCosts, profile_members, read_costs, write_costs
from genlight.search.engine import SearchResult
from genlight.search.evaluation import one_by_one
from genlight.search.proposing import RANDOM
from genlight.search.records import Problem, Record
from genlight.search.spaces.model_allocation import analytic_allocation
from genlight.search.spaces.model_rules import evenly, large_first, sandwich, single_models, small_first
from genlight.search.spaces.model_schedule import ModelScheduleSpace

if TYPE_CHECKING:
    from genlight.loops.model_search import ModelSearch

COSTS = "latency.json"
SEARCHED = "searched"
# λ at which the members' errors are measured
_CURVE_POINTS = 16
_MEASURED = 3


@dataclass(frozen=True)
class Choice:
    """What was measured for one budget.

    Attributes:
        budget: in units of the dearest member's call.
        rule: "searched", "random" (the random schedules that the search began with), or the rule that made it.
        name: in words.
        schedule: the schedule.
        cost: of it, in the unit of the costs.
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
        """Of one call of each member: read from `method.costs`, or from an earlier start of this run, or measured."""
        file = self.runner.folder / COSTS
        if self.method.costs is not None:
            found = read_costs(self.method.costs)
            if missing := sorted(set(self.module.members) - set(found.members)):
                raise UserError(f"method.costs={self.method.costs} has no costs of {', '.join(missing)}")
        elif file.is_file():
            found = read_costs(file)
        else:
            found = self.evaluations.inside(self.module, self._measured_costs)
        found = self.evaluations.agreed(found)
        if self.runner.main:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_costs(file, found)
        return found  # type: ignore[no-any-return]

    def _measured_costs(self) -> MemberCosts:
        rows = self.method.batch_size or self.datamodule.eval_batch_size
        module = self.module

        def inputs(network: nn.Module, count: int) -> Mapping[str, Any]:
            x = torch.zeros(count, *module.sample_shape, device=module.device)
            labels = torch.zeros(count, dtype=torch.long, device=module.device) if module.class_conditional else None
            return {"x": x, "timestep": torch.full((count,), 500.0, device=module.device), "label": labels}

        members = {name: _Member(network) for name, network in module.members.items()}
        return profile_members(members, inputs, rows, module.device, unit=self.method.unit)

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
        """The budgets in the unit of the costs, by budget."""
        dearest, cheapest = max(self.costs.costs.values()), min(self.costs.costs.values())
        limits = {budget: budget * dearest for budget in self.method.budgets}
        for budget, limit in limits.items():
            if limit < cheapest:
                raise UserError(
                    f"method.budgets: {budget:g} calls of the dearest member are below one of the cheapest, "
                    f"{cheapest / dearest:.3g}"
                )
        return limits

    @cached_property
    def initial(self) -> dict[str, tuple[str, ModelSchedule]]:
        """(rule, schedule) by name, for all budgets."""
        found: dict[str, tuple[str, ModelSchedule]] = {}
        count = self.method.per_rule
        if "single" in self.method.rules:
            every = single_models(self.space)
            for each in evenly(every, self.method.singles or len(every)):
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

    def _allocated(self, space: ModelScheduleSpace, count: int) -> list[Any]:
        return list(analytic_allocation(space, self.curves, count=count))

    @cached_property
    def curves(self) -> dict[str, Any]:
        """Errors of the members over λ on training images; the same on all processes."""
        curves = self.evaluations.inside(self.module, self._curves)
        return self.evaluations.agreed(curves)  # type: ignore[no-any-return]

    def _curves(self) -> dict[str, Any]:
        module = self.module
        images, labels = self._images()
        lowest, highest = half_log_snr_range(module.prediction.schedule)
        grid = torch.linspace(lowest, highest, _CURVE_POINTS, dtype=torch.float64).tolist()
        found = {}
        for name, network in module.members.items():
            own = Prediction(module.zoo.predictions[name].prediction_type, module.prediction.schedule)
            conditions = {"label": labels} if module.class_conditional else None
            found[name] = error_curve(_Member(network).eval(), images, own, grid, conditions=conditions)
        return found

    def _images(self) -> tuple[Tensor, Tensor]:
        images, labels, count = [], [], 0
        for batch in self.datamodule.reference_loader("train"):
            images.append(batch["image"])
            labels.append(batch.get("label", torch.zeros(len(batch["image"]), dtype=torch.long)))
            count += len(batch["image"])
            if count >= self.method.curve_images:
                break
        device, most = self.module.device, self.method.curve_images
        x = torch.cat(images)[:most].to(device).float()
        x = x if self.module.vae is None else self.module.vae.encode(x)
        return x, torch.cat(labels)[:most].to(device)

    @cached_property
    def task(self) -> SearchTask:
        """The search over all budgets."""
        settings = self.method.settings
        planner: Any = settings.strategy
        schedules = [schedule for _, schedule in self.initial.values()]
        with in_config("search"):
            plan = planner.plan_budgets(self.space, settings.budget, schedules, tuple(self.limits.values()))
        problem = Problem(self.space, settings.seed, settings.fidelity)
        evaluator = one_by_one(self.draws.objective(self.space, "search"), settings.time_limit_s)
        depends = {**self.draws.describe(), "weights": self.evaluations.fingerprint(self.module)}
        return SearchTask("schedules", problem, plan, evaluator, depends)

    @cached_property
    def result(self) -> SearchResult[ModelSchedule]:
        """The search, from where it stopped."""
        return self.runner.run(self.task)

    def choices(self) -> list[Choice]:
        """For each budget the best of the search and of every rule by the search draw, all with their select scores.

        Raises:
            UserError: nothing could be measured within a budget.
        """
        found = [choice for budget in self.limits for choice in self._finalists(budget)]
        distinct = {self.space.key(choice.schedule): choice.schedule for choice in found}
        scores = dict(zip(distinct, self.judge(list(distinct.values())), strict=True))
        return [Choice(**{**vars(c), "select": scores[self.space.key(c.schedule)]}) for c in found]

    def _finalists(self, budget: float) -> list[Choice]:
        rules = {self.space.key(schedule): (rule, name) for name, (rule, schedule) in reversed(self.initial.items())}
        limit = self.limits[budget] * (1 + 1e-9)
        within = [r for r in self.result.records if r.score is not None and r.cost["cost"] <= limit]
        if not within:
            raise UserError(f"no schedule could be measured within {budget:g}: see {self.runner.folder}")
        ranked: Sequence[Record[ModelSchedule]] = sorted(within, key=lambda record: record.rank)
        kept: list[Choice] = []
        for record in ranked:
            made = RANDOM if record.source == RANDOM else SEARCHED
            rule, name = rules.get(record.key, (made, f"{made} {record.index}"))
            most = self.method.settings.finalists if rule == SEARCHED else 2
            if sum(choice.rule == rule for choice in kept) < most:
                score = float(record.score or 0.0)
                kept.append(Choice(budget, rule, name, record.candidate, record.cost["cost"], score))
        return kept

    def judge(self, schedules: Sequence[ModelSchedule]) -> list[float]:
        """Scores on the select draw, lower is better; infinite where a schedule fails."""
        objective = self.draws.objective(self.space, "select")

        def one(schedule: ModelSchedule) -> float:
            try:
                return objective.evaluate(schedule, self.method.select).score
            except (ValueError, FloatingPointError):
                return float("inf")

        pieces: list[Callable[[], float]] = [partial(one, each) for each in schedules]
        return in_turn(self.evaluations, pieces)

    def report(self, schedule: ModelSchedule) -> dict[str, float]:
        """Every metric on the report draw, and the seconds that one batch takes."""
        objective: MetricObjective = self.draws.objective(self.space, "report")
        facts = objective.evaluate(schedule, self.datamodule.num_samples).facts
        found = {name: float(value) for name, value in facts.items()}
        return {**found, "measured_ms": self.evaluations.inside(self.module, partial(self._batch_ms, schedule))}

    def _batch_ms(self, schedule: ModelSchedule) -> float:
        """Milliseconds of all network calls of one batch and what lies between them."""
        module, rows = self.module, self.method.batch_size or self.datamodule.eval_batch_size
        self.space.apply(module, schedule)
        noise = torch.zeros(rows, *module.sample_shape, device=module.device)
        label = torch.zeros(rows, dtype=torch.long, device=module.device) if module.class_conditional else None
        found = []
        for _ in range(_MEASURED + 1):
            _wait(noise.device)
            begun = time.perf_counter()
            module.sample_latents(noise, label)
            _wait(noise.device)
            found.append(1e3 * (time.perf_counter() - begun))
        return min(found[1:])

    def predicted(self) -> CostEstimate:
        """Time of the whole method from a few schedules that are measured."""
        method, settings = self.method, self.method.settings
        objective = self.draws.objective(self.space, "search")
        middle = list(self.limits)[len(self.limits) // 2]
        space = self.space.with_budget(self.limits[middle])
        schedules = [each.schedule for each in evenly(single_models(space), _MEASURED + 1)]
        seconds = []
        for schedule in schedules:
            begun = time.monotonic()
            objective.evaluate(schedule, settings.fidelity)
            seconds.append((time.monotonic() - begun) / self.evaluations.shares)
        per_candidate = tuple(seconds[1:] or seconds)
        share = method.select / settings.fidelity
        chosen = len(self.limits) * (settings.finalists + 2 * len(method.rules) + 2)
        phases = [
            Phase("schedules", per_candidate, self.task.plan.budget.evaluations),
            Phase("choice", tuple(value * share for value in per_candidate), chosen),
        ]
        return estimate(phases, [], self.evaluations.trainer.default_root_dir)

    def restore(self) -> None:
        """Put the module's own sampler and member back."""
        self.module.set_sampler(None)
        self.module.set_members((), ())


class _Member(nn.Module):
    """A network of a zoo as model(x, timestep, label)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.style = network, network_style(network)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        """Its prediction, float32 [B, C, H, W]."""
        return predict(self.network, self.style, x, timestep, label)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def file_of(folder: Path, budget: float) -> Path:
    """Where the schedule of a budget is written."""
    return folder / f"model_schedule_{budget:g}.json"
