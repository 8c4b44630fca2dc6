"""S³: a solver schedule searched for each number of evaluations, and measured beside every hand-made one.

Liu et al. 2024, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models"
(arXiv 2312.07243): times first, then every decision of every step, by evolution that a predictor guides. Added here:
distance to a many-step teacher on the same noise as the objective, refinement of the continuous decisions by
Gauss-Newton, fine-tuning of the compiled table, and three draws of noise for searching, choosing and reporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from genlight.diffusion.solver.fitting import Adam, LevenbergMarquardt
from genlight.diffusion.solver.presets import PRESETS
from genlight.diffusion.solver.spacings import SPACINGS, End
from genlight.loops.cost import announced, first_validation
from genlight.loops.evaluation import CandidateTrainer, check_logged, checked_mode, direction
from genlight.loops.result import MethodResult
from genlight.loops.search import SearchSettings
from genlight.loops.solver_banks import BankSizes, Teacher
from genlight.loops.solver_cost import solver_cost
from genlight.loops.solver_report import solver_result
from genlight.loops.solver_work import TEACHER, SolverWork
from genlight.reports.cost import CostEstimate
from genlight.search.protocols import SettableSampler, require_capability
from genlight.search.spaces.solver_plan import CORE_SOLVERS
from genlight.search.spaces.solver_schedule import ALL_GENES, SolverScheduleSpace

_MODULES = ("DiffusionModule", "PipelineModule")


class SolverSearch:
    """The method `s3`: a diffusion or flow model in few evaluations, by a solver schedule made for it.

    Args:
        search: how candidates are chosen and how many are measured, for each number of evaluations.
        nfe: numbers of network evaluations to search a schedule for.
        objective: "teacher", the RMS distance to a many-step teacher on the same noise; or the name of a metric that
            validate logs, such as "val/fd_digits".
        mode: "min", "max", or "auto": as the metric says which way it is better.
        genes, max_order, min_gap, start_slack, end_slack, integer_times: see `SolverScheduleSpace`. start_slack null:
            3 where pure noise lies at a finite λ, else 0.
        end: "t_min", or "clean" for one step more to σ = 0.
        solvers: hand-made solvers to begin with and to compare with: "all", "core", or names.
        spacings: their times; null: all that are known.
        teacher, noise: see `Teacher`, `BankSizes`.
        refine: Gauss-Newton on times and factors of the finalists; null leaves it out. Objective "teacher" only.
        finetune: tuning of the compiled table; null leaves it out. Objective "teacher" only.
        refined, tuned: how many finalists of different structure are refined, and tuned.
        rivals: also measure times learned through the best hand-made solver, and times by dynamic programming.

    Raises:
        ValueError: a value out of range.
    """

    predicts_cost = True

    def __init__(
        self,
        search: SearchSettings,
        nfe: Sequence[int] = (4, 5, 6),
        objective: str = TEACHER,
        mode: Literal["auto", "min", "max"] = "auto",
        genes: Sequence[str] = ALL_GENES,
        max_order: int = 3,
        min_gap: float = 0.05,
        start_slack: float | None = None,
        end_slack: float = 0.0,
        integer_times: bool = False,
        end: End = "t_min",
        solvers: str | Sequence[str] = "all",
        spacings: Sequence[str] | None = None,
        teacher: Teacher | None = None,
        noise: BankSizes | None = None,
        refine: LevenbergMarquardt | None = None,
        finetune: LevenbergMarquardt | Adam | None = None,
        refined: int = 2,
        tuned: int = 1,
        rivals: bool = False,
    ) -> None:
        if not isinstance(search, SearchSettings):
            raise ValueError("method=s3 searches: choose how by search=s3 (or random, evolution, guided, cma_es)")
        self.settings, self.nfe = search, sorted({int(count) for count in nfe})
        if not self.nfe or self.nfe[0] < 1:
            raise ValueError(f"method.nfe = {list(nfe)!r} must be one or more numbers of evaluations, each 1 or more")
        if min(refined, tuned) < 1:
            raise ValueError(f"method.refined = {refined!r} and method.tuned = {tuned!r} must be 1 or more")
        self.objective, self.mode, self.end = objective, checked_mode(mode), end
        self.space: dict[str, Any] = {
            "genes": tuple(genes),
            "max_order": max_order,
            "min_gap": min_gap,
            "end_slack": end_slack,
        }
        self.space |= {"integer_times": integer_times, "end": end}
        self.start_slack = start_slack
        named = {"all": tuple(PRESETS), "core": CORE_SOLVERS}
        self.solvers = named.get(solvers, (solvers,)) if isinstance(solvers, str) else tuple(solvers)
        self.spacings = SPACINGS if spacings is None else tuple(spacings)
        self.teacher, self.noise = teacher or Teacher(), noise or BankSizes()
        if objective == TEACHER and search.fidelity > self.noise.search:
            raise ValueError(
                f"search.fidelity = {search.fidelity} must be at most method.noise.search = {self.noise.search}"
            )
        self.refine, self.finetune, self.refined, self.tuned, self.rivals = refine, finetune, refined, tuned, rivals

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Search, choose, refine and tune for each number of evaluations; then measure on the report noise.

        Raises:
            UserError: a module whose sampler cannot be set, such as a one-step student, or a metric that is not logged.
        """
        _check_target(module)
        # the number to compare with; it also starts the other processes of a strategy that has them
        first = first_validation(trainer, module, datamodule)
        self._check(first.logged, module)
        work = SolverWork(self, CandidateTrainer(trainer), module, datamodule)
        predicted = announced(trainer, lambda: solver_cost(work, first))
        return solver_result(work, [work.outcome(nfe) for nfe in self.nfe], first.logged, predicted)

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Measure three candidates and a little of the teacher, and add everything up."""
        _check_target(module)
        first = first_validation(trainer, module, datamodule, dry=True)
        self._check(first.logged, module)
        return solver_cost(SolverWork(self, CandidateTrainer(trainer), module, datamodule), first)

    def describe(self) -> dict[str, Any]:
        """What the choice after a search depends on, as plain values."""
        names = ("objective", "mode", "solvers", "spacings", "refine", "finetune", "refined", "tuned", "rivals")
        settings = {name: repr(getattr(self, name)) for name in names}
        return {**settings, "finalists": self.settings.finalists, "noise": repr(self.noise)}

    def _check(self, logged: dict[str, Any], module: Any) -> None:
        check_logged(self.objective, logged, TEACHER)
        if self.objective == TEACHER:
            self.mode = "min"
        else:
            self.mode = direction(self.mode, self.objective, getattr(module, "metrics", None))


def _check_target(module: Any) -> None:
    """UserError for a module without a sampler that can be set, or whose network is none that solvers integrate."""
    require_capability(module, SettableSampler, SolverScheduleSpace, _MODULES)
    module.prediction  # noqa: B018 - a consistency model has none
