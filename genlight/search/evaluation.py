"""From trials to outcomes: whatever a candidate does, one outcome comes back and the search goes on."""

import math
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from types import FrameType
from typing import Any, Protocol

import torch

from genlight.io import DiskFullError
from genlight.memory import free_memory
from genlight.search.protocols import Candidate, CandidateIn, Evaluation, Objective
from genlight.search.records import Failure, Outcome, Trial

Evaluator = Callable[[Sequence[Trial[Candidate]]], Sequence[Outcome]]
Keyed = tuple[str, Outcome]  # with the key of its candidate
_REASON_LENGTH = 300
# A candidate hangs if it takes longer than so many times the median, but not before so many seconds
HANGS_TIMES = 10
HANGS_SECONDS = 60.0
_HANGS_KNOWN = 5
# a device answers nothing more after such an error
DEVICE_LOST = torch.AcceleratorError
_NO_FAULT = (DiskFullError, OSError)
# what gloo says of a process that is gone; it has no exception of its own
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class CandidateTimeout(BaseException):
    """A candidate ran over its time. No `Exception`, so that the candidate's own handlers do not swallow it."""


class BatchObjective(Objective[CandidateIn], Protocol[CandidateIn]):
    """An objective that also scores several candidates in one go, all at one fidelity."""

    def evaluate_many(self, candidates: Sequence[CandidateIn], fidelity: int) -> Sequence[Evaluation]:
        """One evaluation per candidate, each the same as if it were alone."""
        ...


def is_lost(error: BaseException) -> bool:
    """Whether the error says that a device, or another process of the run, is gone."""
    group = torch.distributed
    known = (DEVICE_LOST, group.DistError) if group.is_available() else DEVICE_LOST
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(text in str(error) for text in _GONE))


@dataclass
class _Pace:
    """How long candidates take here, by their fidelity, and from when on one is failed."""

    limit_s: float | None
    seconds: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.limit_s is not None and not 0 < self.limit_s < math.inf:
            raise ValueError(f"search.time_limit_s = {self.limit_s!r} must be a positive number of seconds, or null")

    def limit(self, fidelity: int) -> tuple[float | None, str]:
        """Seconds that a candidate may take, and the reason of its failure, which does not depend on the run."""
        known, hangs = self.seconds.get(fidelity, []), math.inf
        # where several processes measure one candidate together, one of them must not leave alone
        if len(known) >= _HANGS_KNOWN and not _has_other_processes():
            hangs = max(HANGS_TIMES * median(known), HANGS_SECONDS)
        if self.limit_s is not None and self.limit_s <= hangs:
            return self.limit_s, f"took longer than {self.limit_s:g} s"
        return (hangs if hangs < math.inf else None), f"took longer than {HANGS_TIMES} times the median candidate"

    def note(self, fidelity: int, seconds: float) -> None:
        """One more candidate that was measured."""
        self.seconds.setdefault(fidelity, []).append(seconds)


def _has_other_processes() -> bool:
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def one_by_one(objective: Objective[Candidate], time_limit_s: float | None = None) -> Evaluator[Candidate]:
    """Evaluate the trials in turn.

    Args:
        objective: scores one candidate.
        time_limit_s: seconds after which a candidate is failed. A candidate that runs Python code in the main thread
            is interrupted; one that does not return from native code is failed when it does. Without it, and in a
            single process, one that takes `HANGS_TIMES` the median of its fidelity, and `HANGS_SECONDS`, is failed.

    What fails on the machine is no candidate's fault and is raised: a disk that is full or cannot be read, a device
    that does not go on after an error, another process that is gone.
    """
    return _one_by_one(objective, _Pace(time_limit_s))


def _one_by_one(objective: Objective[Candidate], pace: _Pace) -> Evaluator[Candidate]:
    def evaluate(trials: Sequence[Trial[Candidate]]) -> list[Outcome]:
        return [_evaluate_one(objective, trial, pace) for trial in trials]

    return evaluate


def in_one_batch(objective: BatchObjective[Candidate], time_limit_s: float | None = None) -> Evaluator[Candidate]:
    """Evaluate all trials of one fidelity in one call; if that fails, each alone: only the guilty one fails.

    Args:
        objective: scores one candidate, or several in one call.
        time_limit_s: as for `one_by_one`; a call may take so long for each of its candidates.
    """
    pace = _Pace(time_limit_s)
    alone = _one_by_one(objective, pace)

    def evaluate(trials: Sequence[Trial[Candidate]]) -> Sequence[Outcome]:
        count, fidelity = len(trials), trials[0].fidelity if trials else 0
        if count < 2 or len({trial.fidelity for trial in trials}) > 1:
            return alone(trials)
        limit, _ = pace.limit(fidelity)
        begun = time.monotonic()
        try:
            with _time_limit(None if limit is None else limit * count):
                found = objective.evaluate_many([trial.candidate for trial in trials], fidelity)
            outcomes = [_outcome_of(evaluation) for evaluation in found]
        except _NO_FAULT:
            raise
        except (Exception, CandidateTimeout) as error:
            if is_lost(error):
                raise
            free_memory()
            return alone(trials)
        if len(outcomes) != count:
            raise RuntimeError(f"the objective gave {len(outcomes)} evaluations for {count} candidates")
        pace.note(fidelity, (time.monotonic() - begun) / count)
        return outcomes

    return evaluate


def over_ranks(
    evaluator: Evaluator[Candidate],
    rank: int,
    world_size: int,
    gather: Callable[[list[Keyed]], Sequence[Sequence[Keyed]]],
) -> Evaluator[Candidate]:
    """Evaluate every `world_size`-th trial here and collect the others from their ranks, in the order of the trials.

    `gather` is collective: it gives every rank the lists of all ranks, in the order of the ranks. RuntimeError where
    they hold outcomes of other candidates than this rank's trials.
    """

    def evaluate(trials: Sequence[Trial[Candidate]]) -> list[Outcome]:
        own = trials[rank::world_size]
        shares = gather([(trial.key, outcome) for trial, outcome in zip(own, evaluator(own))])
        found = [[key for key, _ in share] for share in shares]
        expected = [[trial.key for trial in trials[r::world_size]] for r in range(world_size)]
        if found != expected:
            wrong = [r for r, keys in enumerate(expected) if found[r : r + 1] != [keys]]
            raise RuntimeError(
                f"the ranks are not in step: those of {wrong} gave outcomes of other candidates than due"
            )
        return [shares[position % world_size][position // world_size][1] for position in range(len(trials))]

    return evaluate


def _evaluate_one(objective: Objective[Candidate], trial: Trial[Candidate], pace: _Pace) -> Outcome:
    limit, late = pace.limit(trial.fidelity)
    try:
        begun = time.monotonic()
        with _time_limit(limit):
            evaluation = objective.evaluate(trial.candidate, trial.fidelity)
        seconds = time.monotonic() - begun
        if limit is not None and seconds > limit:
            raise CandidateTimeout
        pace.note(trial.fidelity, seconds)
        return _outcome_of(evaluation)
    except _NO_FAULT:
        raise
    except CandidateTimeout:
        failure, text = Failure("timeout", late), traceback.format_exc()
    except (MemoryError, torch.OutOfMemoryError) as error:
        # The message holds addresses and free bytes, which differ from run to run
        failure, text = Failure("out_of_memory", type(error).__name__), traceback.format_exc()
        error.__traceback__ = None
        free_memory()
    except Exception as error:
        if is_lost(error):
            raise
        failure, text = Failure("exception", one_line(error)), traceback.format_exc()
    return Outcome(None, failure=failure, traceback=text)


def _outcome_of(evaluation: Evaluation) -> Outcome:
    score = float(evaluation.score)
    facts = _plain_facts(evaluation.facts)
    if not math.isfinite(score):
        return Outcome(None, facts, Failure("not_finite", f"the score is {score}"))
    return Outcome(score, facts)


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON can hold them; a number that is not finite becomes a text."""
    plain: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, str):
            plain[name] = value
        elif isinstance(value, int):
            plain[name] = int(value)
        else:
            number = float(value)
            plain[name] = number if math.isfinite(number) else str(number)
    return plain


def one_line(error: Exception) -> str:
    """The kind of exception and the first line of its message, without addresses, which differ from run to run."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _ADDRESS.sub("0x…", text)[:_REASON_LENGTH]


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CandidateTimeout after `seconds`. An alarm that was set before is set again with what is left of it."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    running = True

    def ring(number: int, frame: FrameType | None) -> None:
        if running:
            raise CandidateTimeout

    begun = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    # It rings on: an exception inside a finaliser is lost
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)
