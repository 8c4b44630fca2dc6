"""The driver of every search: ask, evaluate, record, until the budget is spent.

Nothing but the archive is kept. On resume the strategy is asked again for the last generation, from the records before
it; what the archive already holds of that generation must be what the strategy proposes, and the rest is evaluated.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic

from genlight.errors import UserError
from genlight.io import DiskFullError
from genlight.search.archive import FAILURES_FOLDER, Archive
from genlight.search.codec import CandidateCodec, canonical_json, canonical_key
from genlight.search.evaluation import Evaluator, is_lost
from genlight.search.protocols import Candidate, Strategy
from genlight.search.records import PART, Failure, History, Problem, Proposal, Record, Trial, best_record

INITIAL = "initial"


def open_archive(
    folder: str | os.PathLike[str],
    problem: Problem[Candidate],
    strategy: Strategy[Candidate],
    initial: Sequence[Candidate] = (),
    *,
    fingerprint: Mapping[str, str],
    writable: bool = True,
) -> Archive[Candidate]:
    """The archive of one search: begun in an empty folder, continued where it was begun before; see `Archive.open`.

    Args:
        fingerprint: what the scores depend on beside the search itself: objective, data, base weights.
    """
    space = problem.space
    search = {
        "space": space.fingerprint(),
        "strategy": repr(strategy),
        "seed": str(problem.seed),
        "fidelity": str(problem.fidelity),
        "cost_limits": canonical_json(dict(problem.cost_limits)),
        "initial": canonical_key([space.key(candidate) for candidate in initial]) if initial else "",
    }
    clash = sorted(search.keys() & fingerprint.keys())
    if clash:
        raise ValueError(f"the fingerprint of a search has its own {', '.join(clash)}")
    codec = CandidateCodec(space.candidate_type)
    return Archive.open(folder, codec, {**search, **fingerprint}, writable=writable)


@dataclass(frozen=True)
class Budget:
    """When to stop: after so many evaluations in the archive, failed ones included, or so many seconds of this run.

    A larger budget extends a finished search: what was measured is the same, whatever the budget was.
    """

    evaluations: int
    seconds: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.evaluations, bool) or not isinstance(self.evaluations, int) or self.evaluations < 1:
            raise ValueError(f"search.budget.evaluations = {self.evaluations!r} must be a whole number, 1 or more")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"search.budget.seconds = {self.seconds!r} must be positive, or null")


@dataclass(frozen=True)
class FailureLimits:
    """When a search gives up: the first `first` candidates all failed, or more than `share` of the last `window`.

    Candidates that failed for a part that is left out from then on (`records.PART`) do not count.

    Attributes:
        attempts: how often a candidate may take the process down before it is failed as poison.
    """

    first: int = 10
    window: int = 40
    share: float = 0.5
    attempts: int = 2

    def __post_init__(self) -> None:
        if min(self.first, self.window, self.attempts) < 1 or not 0 <= self.share <= 1:
            raise ValueError(f"search.failure_limits: counts must be 1 or more and share in [0, 1], got {self}")


class SearchFailedError(UserError):
    """So many candidates fail that going on makes no sense; the message holds the most frequent reason."""


@dataclass(frozen=True)
class Progress(Generic[Candidate]):
    """Where a search stands after one more record; times in seconds of this run."""

    record: Record[Candidate]
    best: Record[Candidate] | None
    evaluated: int
    failed: int
    budget: int
    elapsed_s: float
    eta_s: float


@dataclass(frozen=True)
class SearchResult(Generic[Candidate]):
    """What a search found.

    Attributes:
        best: the best record at the highest fidelity reached; None if all failed.
        records: all of them, by index.
        stopped: "budget", "time", "request", or "exhausted" where the strategy has nothing new to propose.
    """

    best: Record[Candidate] | None
    records: tuple[Record[Candidate], ...]
    stopped: str

    @property
    def failed(self) -> int:
        return sum(record.failure is not None for record in self.records)

    @property
    def samples(self) -> int:
        """Samples drawn for all evaluations: what searches of several fidelities are compared at."""
        return sum(record.fidelity for record in self.records)


@dataclass(frozen=True)
class Search(Generic[Candidate]):
    """A search over one archive; `run` starts it, resumes it or extends it.

    Attributes:
        problem, strategy: what is searched, and how.
        archive: from `open_archive`, for the same problem, strategy and initial candidates.
        evaluate: turns trials into outcomes, see `evaluation`. It gets up to `workers` trials at a time.
        initial: candidates measured first, at the problem's fidelity; the strategy sees them as history.
        workers: how many trials are handed out together; the archive does not depend on it.
        on_progress: called after each record made in this run.
        should_stop: asked between evaluations; True ends the run in order.
        clock: monotonic seconds. Where several processes run one search, all must read the same value.
    """

    problem: Problem[Candidate]
    strategy: Strategy[Candidate]
    archive: Archive[Candidate]
    evaluate: Evaluator[Candidate]
    initial: Sequence[Candidate] = ()
    workers: int = 1
    limits: FailureLimits = FailureLimits()
    on_progress: Callable[[Progress[Candidate]], None] | None = None
    should_stop: Callable[[], bool] | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"search.workers = {self.workers!r} must be 1 or more")

    def run(self, budget: Budget) -> SearchResult[Candidate]:
        """Evaluate until the budget is spent.

        Raises:
            SearchFailedError: too many candidates fail.
            UserError: no candidate keeps the cost limits, or the archive does not hold what the strategy proposes.
        """
        records = self.archive.records
        begun, done_before = self.clock(), len(records)
        for count in range(1, done_before + 1):
            self._give_up_if_hopeless(count)
        stopped = ""
        for trials in self._generations(budget):
            waiting = list(trials)
            while waiting and not (stopped := self._reason_to_stop(budget, begun)):
                chunk = self._next_chunk(waiting[: budget.evaluations - len(records)])
                waiting = waiting[len(chunk) :]
                self._measure(chunk, lambda: self._report(budget, begun, done_before))
            if stopped:
                break
        if not stopped:
            stopped = "budget" if len(records) >= budget.evaluations else "exhausted"
        return SearchResult(best_record(records), tuple(records), stopped)

    def _generations(self, budget: Budget) -> Iterator[list[Trial[Candidate]]]:
        """The trials that still have to be measured, generation by generation, until the strategy has no more."""
        records = self.archive.records
        start = len(records)
        while start and records[start - 1].trial.generation == records[-1].trial.generation:
            start -= 1
        while len(records) < budget.evaluations:
            history = History(records[:start])
            trials = numbered(self.problem, self._ask(history), history)
            if not trials:
                if not records:
                    raise UserError(self._nothing_allowed())
                return
            measured = len(records) - start
            self._check_replay(trials, records[start:])
            yield trials[measured:]
            start = len(records)

    def _ask(self, history: History[Candidate]) -> list[Proposal[Candidate]]:
        if self.initial and not len(history):
            return [Proposal(candidate, self.problem.fidelity, INITIAL) for candidate in self.initial]
        return self.strategy.ask(self.problem, history)

    def _check_replay(self, trials: Sequence[Trial[Candidate]], measured: Sequence[Record[Candidate]]) -> None:
        for position, record in enumerate(measured):
            asked = trials[position] if position < len(trials) else None
            if asked is None or (asked.key, asked.fidelity) != (record.key, record.fidelity):
                proposed = "nothing" if asked is None else f"{asked.key} at fidelity {asked.fidelity}"
                raise UserError(
                    f"candidate {record.index} in {self.archive.folder} is {record.key} at fidelity {record.fidelity}, "
                    f"where the strategy now proposes {proposed}: the code, the libraries or the machine have changed "
                    "since; use another folder"
                )

    def _next_chunk(self, waiting: Sequence[Trial[Candidate]]) -> list[Trial[Candidate]]:
        """Trials to run together. One that was running when the process died runs alone, so that it can be told."""
        if self.archive.attempts(waiting[0].index):
            return [waiting[0]]
        chunk: list[Trial[Candidate]] = []
        for trial in waiting[: self.workers]:
            if self.archive.attempts(trial.index):
                break
            chunk.append(trial)
        return chunk

    def _measure(self, chunk: list[Trial[Candidate]], report: Callable[[], None]) -> None:
        """Evaluate trials and record them, in their order."""
        attempts = self.archive.attempts(chunk[0].index)
        if attempts >= self.limits.attempts:
            failure = Failure("poison", f"took the process down {attempts} times")
            self._record(Record(chunk[0], None, {}, failure), report)
            return
        indices = [trial.index for trial in chunk]
        self.archive.start(indices)
        try:
            outcomes = self.evaluate(chunk)
            if len(outcomes) != len(chunk):
                raise RuntimeError(f"the evaluator gave {len(outcomes)} outcomes for {len(chunk)} trials")
            for trial, outcome in zip(chunk, outcomes, strict=True):
                self.archive.save_traceback(trial.index, outcome.traceback)
                self._record(Record(trial, outcome.score, outcome.facts, outcome.failure), report)
        except BaseException as error:
            if is_lost(error):
                raise  # not released: whether the candidate did it shows when it is tried again, and again
            # The process ends in order, so none of them took it down; a full disk may keep this from being noted
            with suppress(OSError, DiskFullError):
                self.archive.release(index for index in indices if index >= len(self.archive.records))
            raise

    def _record(self, record: Record[Candidate], report: Callable[[], None]) -> None:
        self.archive.append(record)
        report()
        self._give_up_if_hopeless(len(self.archive.records))

    def _give_up_if_hopeless(self, count: int) -> None:
        """Look at the first `count` records only, so that a search that gave up gives up again at the same place."""
        recent = self.archive.records[max(0, count - self.limits.window) : count]
        failures = [record.failure for record in recent if record.failure and record.failure.kind != PART]
        early = count == self.limits.first and len(failures) == count
        often = count >= self.limits.window and len(failures) > self.limits.share * self.limits.window
        if not early and not often:
            return
        reason, times = Counter(f"{failure.kind}: {failure.reason}" for failure in failures).most_common(1)[0]
        which = f"the first {count} candidates all" if early else f"{len(failures)} of {len(recent)} candidates"
        raise SearchFailedError(
            f"{which} failed, most often ({times} times) with {reason}; tracebacks are in "
            f"{self.archive.folder / FAILURES_FOLDER}"
        )

    def _reason_to_stop(self, budget: Budget, begun: float) -> str:
        if len(self.archive.records) >= budget.evaluations:
            return "budget"
        if budget.seconds is not None and self.clock() - begun >= budget.seconds:
            return "time"
        return "request" if self.should_stop is not None and self.should_stop() else ""

    def _report(self, budget: Budget, begun: float, done_before: int) -> None:
        if self.on_progress is None:
            return
        records, elapsed = self.archive.records, self.clock() - begun
        eta = elapsed / (len(records) - done_before) * (budget.evaluations - len(records))
        if budget.seconds is not None:
            eta = min(eta, max(budget.seconds - elapsed, 0.0))
        failed = sum(record.failure is not None for record in records)
        best = best_record(records)
        self.on_progress(Progress(records[-1], best, len(records), failed, budget.evaluations, elapsed, eta))

    def _nothing_allowed(self) -> str:
        if not self.problem.cost_limits:
            return f"{type(self.strategy).__name__} proposed no candidate at all"
        draws = [self.problem.space.cost(self.problem.space.sample(self.problem.rng(0, n))) for n in range(100)]
        seen = ", ".join(f"{name} from {min(cost[name] for cost in draws):g}" for name in self.problem.cost_limits)
        return f"no candidate keeps search.cost_limits = {dict(self.problem.cost_limits)}; random ones have {seen}"


def numbered(
    problem: Problem[Candidate], proposals: Sequence[Proposal[Candidate]], history: History[Candidate]
) -> list[Trial[Candidate]]:
    """Trials of the proposals that are new and keep the cost limits, with their places in the archive."""
    space = problem.space
    trials: list[Trial[Candidate]] = []
    taken = {(record.key, record.fidelity) for record in history}
    for proposal in proposals:
        key = space.key(proposal.candidate)
        cost = {name: float(value) for name, value in space.cost(proposal.candidate).items()}
        if (key, proposal.fidelity) in taken or not problem.within_limits(cost):
            continue
        taken.add((key, proposal.fidelity))
        index = history.next_index + len(trials)
        trials.append(
            Trial(
                index,
                history.generation,
                key,
                proposal.candidate,
                proposal.fidelity,
                proposal.source,
                cost,
                (problem.seed, index),
            )
        )
    return trials
