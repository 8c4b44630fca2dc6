"""From trials to outcomes: whatever a candidate does, one outcome comes back and the search goes on."""

import gc
import math
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch

from genlight.io import DiskFullError
from genlight.search.protocols import Candidate, CandidateIn, Evaluation, Objective
from genlight.search.records import Failure, Outcome, Trial

Evaluator = Callable[[Sequence[Trial[Candidate]]], Sequence[Outcome]]
_REASON_LENGTH = 300
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class CandidateTimeout(BaseException):
    """A candidate ran over its time. No `Exception`, so that the candidate's own handlers do not swallow it."""


class BatchObjective(Protocol[CandidateIn]):
    """An objective that scores several candidates in one go, all at one fidelity."""

    def evaluate_many(self, candidates: Sequence[CandidateIn], fidelity: int) -> Sequence[Evaluation]:
        """One evaluation per candidate, each the same as if it were alone."""
        ...


def one_by_one(objective: Objective[Candidate], time_limit_s: float | None = None) -> Evaluator[Candidate]:
    """Evaluate the trials in turn.

    Args:
        objective: scores one candidate.
        time_limit_s: seconds after which a candidate is failed. A candidate that runs Python code in the main thread
            is interrupted; one that does not return from native code is failed when it does.

    A full disk is no candidate's fault and is raised.
    """
    if time_limit_s is not None and not 0 < time_limit_s < math.inf:
        raise ValueError(f"search.time_limit_s = {time_limit_s!r} must be a positive number of seconds, or null")

    def evaluate(trials: Sequence[Trial[Candidate]]) -> list[Outcome]:
        return [_evaluate_one(objective, trial, time_limit_s) for trial in trials]

    return evaluate


def in_one_batch(objective: BatchObjective[Candidate], alone: Evaluator[Candidate]) -> Evaluator[Candidate]:
    """Evaluate all trials of one fidelity in one call; if that raises, each alone: only the guilty one fails."""

    def evaluate(trials: Sequence[Trial[Candidate]]) -> Sequence[Outcome]:
        if len(trials) < 2 or len({trial.fidelity for trial in trials}) > 1:
            return alone(trials)
        try:
            found = objective.evaluate_many([trial.candidate for trial in trials], trials[0].fidelity)
            outcomes = [_outcome_of(evaluation) for evaluation in found]
        except DiskFullError:
            raise
        except Exception:
            _free_memory()
            return alone(trials)
        if len(outcomes) != len(trials):
            raise RuntimeError(f"the objective gave {len(outcomes)} evaluations for {len(trials)} candidates")
        return outcomes

    return evaluate


def over_ranks(
    evaluator: Evaluator[Candidate],
    rank: int,
    world_size: int,
    gather: Callable[[list[Outcome]], Sequence[Sequence[Outcome]]],
) -> Evaluator[Candidate]:
    """Evaluate every `world_size`-th trial here and collect the others from their ranks, in the order of the trials.

    `gather` is collective: it gives every rank the lists of all ranks, in the order of the ranks.
    """

    def evaluate(trials: Sequence[Trial[Candidate]]) -> list[Outcome]:
        shares = gather(list(evaluator(trials[rank::world_size])))
        found, expected = [len(share) for share in shares], [len(trials[r::world_size]) for r in range(world_size)]
        if found != expected:
            raise RuntimeError(f"the ranks are not in step: they gave {found} outcomes where {expected} were due")
        return [shares[position % world_size][position // world_size] for position in range(len(trials))]

    return evaluate


def _evaluate_one(objective: Objective[Candidate], trial: Trial[Candidate], time_limit_s: float | None) -> Outcome:
    try:
        begun = time.monotonic()
        with _time_limit(time_limit_s):
            evaluation = objective.evaluate(trial.candidate, trial.fidelity)
        if time_limit_s is not None and time.monotonic() - begun > time_limit_s:
            raise CandidateTimeout
        return _outcome_of(evaluation)
    except DiskFullError:
        raise
    except CandidateTimeout:
        failure, text = Failure("timeout", f"took longer than {time_limit_s:g} s"), traceback.format_exc()
    except (MemoryError, torch.OutOfMemoryError) as error:
        # The message holds addresses and free bytes, which differ from run to run
        failure, text = Failure("out_of_memory", type(error).__name__), traceback.format_exc()
        error.__traceback__ = None
        _free_memory()
    except Exception as error:
        failure, text = Failure("exception", _one_line(error)), traceback.format_exc()
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


def _one_line(error: Exception) -> str:
    """The kind of exception and the first line of its message, without addresses, which differ from run to run."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return _ADDRESS.sub("0x…", text)[:_REASON_LENGTH]


def _free_memory() -> None:
    """Let go of what a failed candidate left behind."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not in use


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
