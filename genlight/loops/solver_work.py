"""The work of S³ for one number of evaluations after another: search, choose, refine, tune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.finetune import finetune
from genlight.diffusion.solver.refine import refine
from genlight.diffusion.solver.serialization import TableRecord
from genlight.diffusion.solver.teacher import TuningProblem
from genlight.diffusion.solver.trajectory import TeacherTrajectories
from genlight.errors import UserError, in_config
from genlight.loops.cost import CHOICE
from genlight.loops.draw_metrics import DrawMetrics
from genlight.loops.evaluation import CandidateTrainer, MetricObjective, in_turn
from genlight.loops.search import SearchRunner, SearchTask
from genlight.loops.solver_banks import Banks, TeacherScoring
from genlight.loops.solver_outcome import SolverOutcome, load_outcome, outcome_fingerprint, save_outcome
from genlight.loops.solver_rivals import rival_schedules
from genlight.search.engine import SearchResult
from genlight.search.evaluation import Evaluator, in_one_batch, is_lost, one_by_one
from genlight.search.plan import SearchPlan
from genlight.search.records import Problem, Record
from genlight.search.spaces.solver_continuous import ContinuousGenes
from genlight.search.spaces.solver_plan import baselines
from genlight.search.spaces.solver_schedule import SolverScheduleSpace

if TYPE_CHECKING:
    from genlight.loops.solver_search import SolverSearch

TEACHER = "teacher"
# how many hand-made schedules are looked at again on noise that did not choose them
BEST_BASELINES = 20
TEACHER_TIME, TUNING = "teacher", "tuning"  # in the account of time
# λ that the first time may rise above pure noise: the network sees next to no signal there
START_SLACK = 3.0
Schedules = dict[str, SolverSchedule]


@dataclass
class SolverWork:
    """Everything that the numbers of evaluations share.

    Attributes:
        method: the settings.
        evaluations, module, datamodule: of the run.
        results: the searches that were done, by number of evaluations.
    """

    method: SolverSearch
    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    results: dict[int, SearchResult[SolverSchedule]] = field(default_factory=dict)

    @cached_property
    def runner(self) -> SearchRunner:
        """Runs searches in the run folder."""
        return SearchRunner(self.evaluations, self.method.settings)

    @cached_property
    def banks(self) -> Banks:
        """Noise and teacher."""
        method, folder = self.method, Path(self.evaluations.trainer.default_root_dir) / "search"
        with in_config("method.teacher"):
            return Banks(
                self.evaluations,
                self.module,
                self.datamodule,
                method.teacher,
                method.noise,
                method.end,
                folder,
                self.integer_times,
            )

    @property
    def by_teacher(self) -> bool:
        """Whether candidates are measured by their distance to a teacher."""
        return self.method.objective == TEACHER

    @property
    def integer_times(self) -> bool:
        """Whether all times are whole."""
        return bool(self.method.space["integer_times"])

    def space(self, nfe: int) -> SolverScheduleSpace:
        """The space of one number of evaluations on the module's noise schedule."""
        schedule, slack = self.module.prediction.schedule, self.method.start_slack
        if slack is None:
            finite = schedule.half_log_snr(schedule.t_max) > float("-inf")
            slack = START_SLACK if finite and not self.integer_times else 0.0
        with in_config("method"):
            return SolverScheduleSpace(schedule, nfe, start_slack=slack, **self.method.space)

    @cached_property
    def trajectories(self) -> TeacherTrajectories | None:
        """What the predictor DELE reads of a teacher that candidates are measured by."""
        return self.banks.trajectories() if self.by_teacher and self.method.settings.predictor == "dele" else None

    def searched_space(self, nfe: int) -> SolverScheduleSpace:
        """The space with what the predictor reads."""
        return replace(self.space(nfe), trajectories=self.trajectories)

    def hand_made(self, nfe: int) -> list[tuple[str, SolverSchedule]]:
        """Every hand-made schedule of the settings, by name; made once, since all of them are compiled."""
        if nfe not in self._hand_made:
            method, schedule = self.method, self.space(nfe).noise_schedule
            with in_config("method"):
                made = baselines(
                    schedule,
                    nfe,
                    end=method.end,
                    solvers=method.solvers,
                    spacings=method.spacings,
                    integer_times=self.integer_times,
                )
            self._hand_made[nfe] = made
        return self._hand_made[nfe]

    @cached_property
    def _hand_made(self) -> dict[int, list[tuple[str, SolverSchedule]]]:
        return {}

    def task(self, nfe: int) -> SearchTask:
        """The search of one number of evaluations."""
        settings, space = self.method.settings, self.searched_space(nfe)
        problem = Problem(space, settings.seed, settings.fidelity)
        return SearchTask(f"nfe{nfe}", problem, self.plan(nfe, space), self._evaluator(space), self._depends_on())

    def plan(self, nfe: int, space: SolverScheduleSpace | None = None) -> SearchPlan:
        """Strategy and initial candidates: every hand-made schedule; on the plain space if none is given."""
        settings, made = self.method.settings, [schedule for _, schedule in self.hand_made(nfe)]
        chosen = space or self.space(nfe)
        return self.runner.plan(f"nfe{nfe}", lambda budget: settings.strategy.plan(chosen, budget, made))

    def outcome(self, nfe: int) -> SolverOutcome:
        """What was found for `nfe` evaluations; read from the run folder where it was found before.

        Raises:
            UserError: no schedule could be measured.
        """
        task = self.task(nfe)
        result = self.results[nfe] = self.runner.run(task)
        if result.best is None:
            raise UserError(f"no schedule of {nfe} evaluations could be measured: see {self.runner.folder / task.name}")
        last = {"count": len(result.records), "key": result.records[-1].key}
        settings = {**self.method.describe(), "select": self.scoring("select").fingerprint if self.by_teacher else ""}
        fingerprint = outcome_fingerprint({**task.fingerprint, **last, **settings})
        file = self.runner.folder / task.name / "outcome.json"
        found = self.evaluations.agreed(load_outcome(file, fingerprint))
        if found is None:
            found = self._choose(task, result)
            if self.runner.main:
                save_outcome(file, found, fingerprint)
        return found  # type: ignore[no-any-return]

    def scoring(self, draw: str) -> TeacherScoring:
        """Distances to the teacher on the bank of a draw."""
        if draw not in self._scorings:
            with self.evaluations.timing(TEACHER_TIME):
                bank = self.banks.bank(draw)
            self._scorings[draw] = TeacherScoring(self.module, self.banks.sampling, bank, self.evaluations)
        return self._scorings[draw]

    @cached_property
    def _scorings(self) -> dict[str, TeacherScoring]:
        return {}

    def _evaluator(self, space: SolverScheduleSpace) -> Evaluator[SolverSchedule]:
        limit = self.method.settings.time_limit_s
        if self.by_teacher:
            scoring = self.scoring("search")
            return in_one_batch(scoring, limit)
        return one_by_one(self.metric(space, "search"), limit)

    @cached_property
    def draws(self) -> DrawMetrics:
        """The metric on each draw."""
        method = self.method
        return DrawMetrics(
            self.evaluations, self.module, self.datamodule, method.objective, method.mode, self.runner.folder
        )

    def metric(self, space: SolverScheduleSpace, draw: str) -> MetricObjective:
        """The objective that is a metric of validate, on the noise and against the real images of a draw."""
        return self.draws.objective(space, draw)

    def _depends_on(self) -> dict[str, str]:
        """What scores depend on beside the search itself."""
        if self.by_teacher:
            return {"objective": TEACHER, "bank": self.scoring("search").fingerprint}
        return {**self.draws.describe(), "weights": self.banks.model_fingerprint}

    def judge(self, space: SolverScheduleSpace, schedules: Sequence[Any], draw: str) -> list[float]:
        """Scores on the noise of a draw, lower is better; infinite where a schedule fails."""
        if self.by_teacher:
            scoring = self.scoring(draw)
            count = getattr(self.method.noise, draw)
            starts = self.evaluations.display.counted(range(0, len(schedules), 16))
            found = [scoring.evaluate_many(schedules[i : i + 16], count) for i in starts]
            return [e.score if e.score == e.score else float("inf") for part in found for e in part]
        metric, count = self.metric(space, draw), getattr(self.method.noise, draw)

        def one(schedule: Any) -> float:
            try:
                score = metric.evaluate(schedule, count).score
            except (ValueError, FloatingPointError, RuntimeError) as error:
                if is_lost(error):
                    raise
                return math.inf
            return score if math.isfinite(score) else math.inf

        return in_turn(self.evaluations, [partial(one, each) for each in schedules])

    def _choose(self, task: SearchTask, result: SearchResult[SolverSchedule]) -> SolverOutcome:
        """The winner on the select noise, after refinement and tuning; UserError if the search ended too early."""
        space: SolverScheduleSpace = task.problem.space  # type: ignore[assignment]
        names = {space.key(schedule): name for name, schedule in reversed(self.hand_made(space.nfe))}
        full = [r for r in result.records if r.fidelity == task.problem.fidelity and r.score is not None]
        ranked = sorted(full, key=lambda record: record.rank)
        made = [r for r in ranked if r.key in names][:BEST_BASELINES]
        if not made:
            raise UserError(
                f"no hand-made schedule of {space.nfe} evaluations was measured on {task.problem.fidelity} samples: "
                "raise search.seconds or search.budget, and go on with resume=true"
            )
        finalists = _named(ranked[: self.method.settings.finalists])
        hand_made = {names[r.key]: r.candidate for r in made}
        everyone = {**hand_made, **finalists}
        with self.evaluations.timing(CHOICE):
            scores = dict(zip(everyone, self.judge(space, list(everyone.values()), "select"), strict=True))
        baseline = min(hand_made, key=lambda name: scores[name])
        order = sorted(finalists, key=lambda name: scores[name])
        for kind, name in (("hand-made schedule", baseline), ("finalist", order[0])):
            if not math.isfinite(scores[name]):
                raise UserError(f"no {kind} of {space.nfe} evaluations could be measured on the select noise")
        evolved = finalists[order[0]]
        select = {"baseline": scores[baseline], "evolved": scores[order[0]]}
        outcome = SolverOutcome(space.nfe, baseline, hand_made[baseline], hand_made, evolved, evolved, select=select)
        if not self.by_teacher:
            return outcome
        with self.evaluations.timing(TUNING):
            return self._improve(space, outcome, [finalists[name] for name in order])

    def _improve(
        self, space: SolverScheduleSpace, outcome: SolverOutcome, finalists: Sequence[SolverSchedule]
    ) -> SolverOutcome:
        """Refined times and factors, a tuned table, and rivals; what is kept is the best on the select noise."""
        method, evaluations = self.method, self.evaluations
        problem = TuningProblem(self.banks.sampling, self.scoring("search").bank, self.scoring("select").bank)
        candidates = _distinct(finalists)[: method.refined]
        inside = partial(evaluations.inside, self.module)
        if method.refine is not None:
            work = [partial(_refined, problem, space, schedule, method.refine) for schedule in candidates]
            candidates = in_turn(evaluations, [partial(inside, piece) for piece in work])
        schedules = [outcome.evolved, *candidates]
        scores = self.judge(space, schedules, "select")
        order = sorted(range(len(schedules)), key=lambda i: scores[i])
        best, select = schedules[order[0]], {**outcome.select, "schedule": scores[order[0]]}
        table = None
        if method.finetune is not None:
            starts = _distinct([schedules[i] for i in order])[: method.tuned]
            tune = [partial(_tuned, problem, schedule, method.finetune) for schedule in starts]
            found = in_turn(evaluations, [partial(inside, piece) for piece in tune])
            select["table"], table = min(found, key=lambda pair: pair[0])
        rivals: Schedules = {}
        if method.rivals:
            rival = partial(rival_schedules, problem, outcome.baseline_name, outcome.baseline, method.end)
            rivals = in_turn(evaluations, [partial(inside, rival)])[0]
        values = {**vars(outcome), "schedule": best, "table": table, "rivals": rivals, "select": select}
        return SolverOutcome(**values)


def _refined(problem: TuningProblem, space: SolverScheduleSpace, schedule: SolverSchedule, method: Any) -> Any:
    """The schedule itself where nothing of it can move; whole and rounded times stay, whose differences are lost."""
    kept = tuple(gene for gene in space.genes if gene != "times" or not (space.integer_times or problem.fixed_times))
    genes = ContinuousGenes(replace(space, genes=kept), schedule) if kept else None
    if genes is None or len(genes.start) == 0:
        return schedule
    return refine(problem, genes.start_tensor, genes.schedule, method)[0]


def _tuned(problem: TuningProblem, schedule: SolverSchedule, method: Any) -> tuple[float, TableRecord]:
    table, record = finetune(problem, schedule, method, times=not problem.fixed_times)
    return min(step.select_rms for step in record.steps), TableRecord.of(table)


def _named(records: Sequence[Record[SolverSchedule]]) -> Schedules:
    return {f"finalist {record.index}": record.candidate for record in records}


def _distinct(schedules: Sequence[SolverSchedule]) -> list[SolverSchedule]:
    """The first of those that make the same discrete decisions: refinement would bring the others to the same place."""
    kept: dict[Any, SolverSchedule] = {}
    for schedule in schedules:
        shape = tuple(
            (
                s.prediction,
                s.order,
                s.source,
                s.points,
                s.variable,
                s.corrector and (s.corrector.kind, s.corrector.points),
            )
            for s in schedule.steps
        )
        kept.setdefault((shape, schedule.afs), schedule)
    return list(kept.values())
