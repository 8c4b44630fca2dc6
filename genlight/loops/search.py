"""One search under the trainer: candidates measured, progress shown, curves logged, stopped and resumed in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from genlight import io
from genlight.callbacks.signals import RunInterrupted, SignalGuard
from genlight.callbacks.timing import print_line
from genlight.errors import UserError
from genlight.loops.evaluation import CandidateTrainer
from genlight.predictors.gaussian_process import GaussianProcessPredictor
from genlight.predictors.ranking import RankingPredictor
from genlight.reports.environment import machine, source_digest, versions
from genlight.run_folder import RUN_FILE, config_fingerprint, read_run
from genlight.search.codec import canonical_key
from genlight.search.dele import DelePredictor, require_indicators
from genlight.search.engine import Budget, FailureLimits, Progress, Search, SearchResult, open_archive
from genlight.search.evaluation import Evaluator
from genlight.search.plan import SearchPlan, with_predictor
from genlight.search.records import Problem, Record
from genlight.search.shared import Known, keep_score, known_first, read_scores

PREDICTORS: Mapping[str, Callable[[], Any]] = {
    "dele": DelePredictor,
    "gp": GaussianProcessPredictor,
    "ranking": RankingPredictor,
}
# set in the environment where a run measures all by itself, and what it starts too
OWN_SCORES = "GENLIGHT_OWN_SCORES"
_BUDGET_FILE = "budget.json"
_KIND, _VERSION = "search_budget", 1
# of a config, what scores may depend on; what they depend on of the method stands in the fingerprint of its task
_MEASURE = ("seed", "ckpt_path", "data", "module", "metrics", "trainer", "strategy", "callbacks")


class Planner(Protocol):
    """How the candidates of a search are chosen: makes the plan for one space and one set of initial candidates."""

    def plan(self, space: Any, evaluations: int, initial: Any) -> SearchPlan:
        """Strategy, initial candidates and the budget in records of the archive."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """How a search is carried out, whatever is searched: the section `search` of the config.

    Attributes:
        strategy: chooses the candidates.
        predictor: takes the place of the predictor that guides the strategy: "dele" (`DelePredictor`), "gp"
            (`GaussianProcessPredictor`) or "ranking" (`RankingPredictor`); None: the strategy's own.
        budget: candidates measured beside the initial ones. A larger one extends a finished search.
        fidelity: samples per candidate.
        seed: of the search, apart from that of the data.
        finalists: the best so many are measured again on the noise of the select draw, where the winner is chosen.
        seconds: a search ends after so many seconds of this run too; null: by its budget only.
        time_limit_s: a candidate that takes longer is failed; null: only one that hangs, see
            `genlight.search.evaluation.HANGS_TIMES`. Not where several processes measure one candidate together.
        workers: candidates measured together in one process, in shared forward passes where the method can.
        failure_limits: when a search gives up.
        shared: take scores that other runs measured, see `SearchRunner.scores_file`, and let them have this run's.
    """

    strategy: Planner
    predictor: Literal["dele", "gp", "ranking"] | None = None
    budget: int = 300
    fidelity: int = 256
    seed: int = 0
    finalists: int = 10
    seconds: float | None = None
    time_limit_s: float | None = None
    workers: int = 8
    failure_limits: FailureLimits = field(default_factory=FailureLimits)
    shared: bool = True

    def __post_init__(self) -> None:
        for name in ("budget", "fidelity", "finalists", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} = {getattr(self, name)!r} must be 1 or more")
        if self.predictor is not None:
            if self.predictor not in PREDICTORS:
                raise ValueError(f"search.predictor = {self.predictor!r} must be {', '.join(PREDICTORS)}, or null")
            object.__setattr__(self, "strategy", with_predictor(self.strategy, PREDICTORS[self.predictor]()))


@dataclass(frozen=True)
class SearchTask:
    """One search of a method.

    Attributes:
        name: of its folder and its curves, e.g. "nfe5".
        problem: space, seed, fidelity.
        plan: strategy, initial candidates, budget.
        evaluator: measures candidates in this process.
        fingerprint: what the scores depend on beside the search itself.
        check: is given each new record, on all processes; what it raises ends the search, the record is kept.
        shared: whether other runs may have its scores; False where they depend on time, or cost nothing.
    """

    name: str
    problem: Problem[Any]
    plan: SearchPlan
    evaluator: Evaluator[Any]
    fingerprint: Mapping[str, str]
    check: Callable[[Record[Any]], None] | None = None
    shared: bool = True


class SearchRunner:
    """Runs the searches of a method in a run folder; each has an archive of its own below `search/`.

    Args:
        evaluations: the trainer as searches use it.
        settings: how they are carried out.

    Attributes:
        notes: what a report has to say of the searches.

    Raises:
        UserError: a limit of time where several processes measure one candidate together: by its own clock each would
            fail others.
    """

    def __init__(self, evaluations: CandidateTrainer, settings: SearchSettings) -> None:
        self.evaluations, self.settings, self.notes = evaluations, settings, list[str]()
        trainer: Any = evaluations.trainer
        if settings.time_limit_s is not None and evaluations.sharded and trainer.world_size > 1:
            raise UserError(
                f"search.time_limit_s = {settings.time_limit_s:g}: where weights lie in shards, {trainer.world_size} "
                "processes measure each candidate together and cannot fail it by their own clocks; set it to null"
            )
        self.folder = Path(trainer.default_root_dir) / "search"
        guards = [c for c in trainer.callbacks if isinstance(c, SignalGuard)]
        self.guard = guards[0] if guards else SignalGuard()
        self.main = bool(trainer.is_global_zero)

    def remark(self, remarks: Sequence[str]) -> None:
        """Say at the terminal, and note for the report, what a person should know of the searches."""
        self.notes += remarks
        for remark in remarks if self.main else ():
            print_line(f"warning: {remark}")

    def plan(self, name: str, make: Callable[[int], SearchPlan]) -> SearchPlan:
        """The plan of a search for the budget that it was begun with; a larger one since extends its last stage.

        Args:
            name: of the search.
            make: the plan for so many evaluations.
        """
        file, budget = self.folder / name / _BUDGET_FILE, self.settings.budget
        begun = io.read_record(file, kind=_KIND, version=_VERSION)["budget"] if file.is_file() else budget
        begun = int(self.evaluations.agreed(begun))
        if self.main and not file.is_file():
            io.write_record(io.create_folder(file.parent) / file.name, {"budget": budget}, kind=_KIND, version=_VERSION)
        plan = make(begun)
        return replace(plan, budget=replace(plan.budget, evaluations=plan.budget.evaluations + budget - begun))

    def run(self, task: SearchTask, part: str | None = None) -> SearchResult[Any]:
        """Search until the budget is spent, from where an earlier run stopped.

        Args:
            task: the search.
            part: name in the account of time; None: that of the search.

        Raises:
            RunInterrupted: a signal asked to stop; the candidate at hand was finished and kept.
            SearchFailedError, UserError: as `Search.run`.
        """
        with self.evaluations.timing(part or _shown(task)):
            return self._run(task)

    def scores_file(self, task: SearchTask) -> Path | None:
        """Where this run leaves the scores of a search for others, below `paths.cache`, beside theirs; None: nowhere.

        Other searches, budgets and methods' settings share a folder; another config of model, data, metric or trainer,
        other code, packages or processors do not. Classes of the user's own (`targets.allow`) share nothing, since
        their code may change, nor does anything where the environment has `OWN_SCORES`.
        """
        folder, shared = self.folder.parent, self.settings.shared and task.shared and OWN_SCORES not in os.environ
        if not (shared and (folder / RUN_FILE).is_file()):
            return None
        record = read_run(folder)
        config, here = record["config"], machine()
        place = str(config["paths"]["cache"])
        if config["targets"]["allow"] or "${" in place:  # the record does not say what the environment says
            return None
        depends = {
            **task.fingerprint,
            "space": task.problem.space.fingerprint(),
            "config": config_fingerprint({name: config[name] for name in _MEASURE}, ("callbacks.progress",)),
            "code": [source_digest(), versions()],
            "machine": [here["system"], here["cpu"], here["gpus"], torch.get_num_threads()],
        }
        own = canonical_key([str(folder.resolve()), record["created"]])
        return Path(place) / "scores" / canonical_key(depends) / f"{own}.jsonl"

    def _run(self, task: SearchTask) -> SearchResult[Any]:
        plan, evaluations, trainer = task.plan, self.evaluations, self.evaluations.trainer
        if self.settings.predictor == "dele":
            require_indicators(task.problem.space)
        archive = open_archive(
            self.folder / task.name,
            task.problem,
            plan.strategy,
            plan.initial,
            fingerprint=task.fingerprint,
            writable=self.main,
        )
        scores = self.scores_file(task) if self.main else None
        # which also lets all read the archive before any of them goes on
        known: Known = evaluations.agreed(read_scores(scores) if scores else {})
        taken = set[int]()

        def take(indices: list[int]) -> None:
            taken.update(indices)
            archive.share(indices)

        def progressed(progress: Progress[Any]) -> None:
            if scores and progress.record.index not in taken:
                keep_score(scores, progress.record)
            self._progress(task, progress)

        search = Search(
            task.problem,
            plan.strategy,
            archive,
            known_first(evaluations.spread(task.evaluator), known, take),
            plan.initial,
            workers=self.settings.workers * evaluations.shares,
            limits=self.settings.failure_limits,
            on_progress=progressed,
            should_stop=lambda: self.guard.requested(trainer) is not None,
            clock=evaluations.clock,
        )
        done = len(archive.records)
        evaluations.display.start(_shown(task), plan.budget.evaluations, done)
        try:
            with self.guard.listening():
                result = search.run(Budget(plan.budget.evaluations, self.settings.seconds))
                if result.stopped == "request":
                    if self.main:
                        print_line(f"{len(archive.records)} candidates of {task.name} are kept")
                    raise RunInterrupted(self.guard.requested(trainer))
        finally:
            evaluations.display.stop(_shown(task))
        if taken:
            self.notes.append(f"{len(taken)} candidates of the search {task.name} have the scores of other runs")
        return result

    def _progress(self, task: SearchTask, progress: Progress[Any]) -> None:
        self._show(task, progress)
        if task.check is not None:
            task.check(progress.record)

    def _show(self, task: SearchTask, progress: Progress[Any]) -> None:
        best = progress.best
        record = progress.record
        if self.main:
            values = {f"search/{task.name}/failed": float(progress.failed)}
            if record.score is not None:
                values[f"search/{task.name}/score@{record.fidelity}"] = record.score
            if best is not None and best.score is not None:
                values[f"search/{task.name}/best"] = best.score
            for logger in self.evaluations.trainer.loggers:
                logger.log_metrics(values, step=record.index)
                logger.save()  # a killed search keeps its curve
        note = "none yet" if best is None or best.score is None else f"best {best.score:.5g} ({best.source})"
        failed = f", {progress.failed} failed" if progress.failed else ""
        self.evaluations.display.show(_shown(task), progress.evaluated, note + failed)


def _shown(task: SearchTask) -> str:
    """The name of a search for the person who waits, and in the account of time."""
    return f"search {task.name}"
