"""Small spaces with known optima, objectives that fail on purpose, and a search over them in one call."""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.search.codec import canonical_key
from genlight.search.engine import Budget, Search, SearchResult, open_archive
from genlight.search.evaluation import one_by_one
from genlight.search.protocols import Evaluation, Strategy
from genlight.search.records import Problem

FINGERPRINT = {"objective": "toy", "data": "none", "base_weights": "none"}


@dataclass(frozen=True)
class Word:
    letters: tuple[int, ...]


@dataclass(frozen=True)
class WordSpace:
    """All words of one length; small enough to try them all. `banned` words are not in it."""

    length: int = 4
    alphabet: int = 3
    banned: frozenset[tuple[int, ...]] = frozenset()

    candidate_type = Word

    def all(self) -> list[Word]:
        words = product(range(self.alphabet), repeat=self.length)
        return [Word(letters) for letters in words if letters not in self.banned]

    def sample(self, rng: np.random.Generator) -> Word:
        while True:
            letters = tuple(int(letter) for letter in rng.integers(self.alphabet, size=self.length))
            if letters not in self.banned:
                return Word(letters)

    def mutate(self, candidate: Word, rng: np.random.Generator, *, size: float = 1.0) -> Word:
        for _ in range(20):
            letters = list(candidate.letters)
            letters[int(rng.integers(self.length))] = int(rng.integers(self.alphabet))
            if tuple(letters) not in self.banned:
                return Word(tuple(letters))
        return candidate

    def crossover(self, a: Word, b: Word, rng: np.random.Generator) -> Word:
        cut = int(rng.integers(1, self.length))
        letters = a.letters[:cut] + b.letters[cut:]
        return a if letters in self.banned else Word(letters)

    def cost(self, candidate: Word) -> dict[str, float]:
        return {"sum": float(sum(candidate.letters))}

    def encode(self, candidate: Word) -> Tensor:
        return torch.eye(self.alphabet)[list(candidate.letters)]

    def apply(self, target: Any, candidate: Word) -> None:
        target.word = candidate

    def key(self, candidate: Word) -> str:
        return "".join(str(letter) for letter in candidate.letters)

    def fingerprint(self) -> str:
        return f"words of {self.length} out of {self.alphabet}"


def rugged(word: Word) -> float:
    """A score without any structure: the same for ever, different for every word."""
    return int(hashlib.sha256(repr(word.letters).encode()).hexdigest()[:8], 16) / 2**32


@dataclass(frozen=True)
class Schedule:
    """A toy solver schedule: increasing times with one discrete choice per step."""

    times: tuple[float, ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class ScheduleSpace:
    """Schedules of one length; the box that CMA-ES sees holds the times only (kind 0 everywhere)."""

    steps: int = 6
    kinds: int = 4

    candidate_type = Schedule

    def sample(self, rng: np.random.Generator) -> Schedule:
        times = np.sort(rng.random(self.steps))
        return self._made(times, rng.integers(self.kinds, size=self.steps))

    def mutate(self, candidate: Schedule, rng: np.random.Generator, *, size: float = 1.0) -> Schedule:
        times, kinds = np.array(candidate.times), np.array(candidate.kinds)
        for _ in range(int(rng.integers(1, 4))):
            step = int(rng.integers(self.steps))
            if rng.random() < 0.5:
                times[step] += rng.normal() * 0.2 * size
            else:
                kinds[step] = rng.integers(self.kinds)
        return self._made(np.sort(times.clip(0, 1)), kinds)

    def crossover(self, a: Schedule, b: Schedule, rng: np.random.Generator) -> Schedule:
        pick = rng.random(self.steps) < 0.5
        times = np.sort(np.where(pick, a.times, b.times))
        return self._made(times, np.where(pick, a.kinds, b.kinds))

    def cost(self, candidate: Schedule) -> dict[str, float]:
        return {"nfe": float(self.steps + sum(kind == 3 for kind in candidate.kinds))}

    def encode(self, candidate: Schedule) -> Tensor:
        times = torch.tensor(candidate.times)
        gaps = torch.diff(times, prepend=torch.zeros(1))
        return torch.cat([times[:, None], gaps[:, None], torch.eye(self.kinds)[list(candidate.kinds)]], dim=1)

    def apply(self, target: Any, candidate: Schedule) -> None:
        target.schedule = candidate

    def key(self, candidate: Schedule) -> str:
        return canonical_key(candidate, digits=3)

    def fingerprint(self) -> str:
        return repr(self)

    @property
    def vector_bounds(self) -> np.ndarray:
        return np.tile([0.0, 1.0], (self.steps, 1))

    def to_vector(self, candidate: Schedule) -> np.ndarray:
        return np.array(candidate.times)

    def from_vector(self, vector: np.ndarray) -> Schedule:
        return self._made(np.sort(vector), np.zeros(self.steps, dtype=int))

    def _made(self, times: np.ndarray, kinds: np.ndarray) -> Schedule:
        return Schedule(tuple(float(t) for t in times), tuple(int(kind) for kind in kinds))


def schedule_error(schedule: Schedule) -> float:
    """Like an error of a solver: neighbouring times and choices interact, one choice is best for each gap."""
    times = np.array([0.0, *schedule.times, 1.0])
    gaps = np.diff(times)
    targets = np.array([(n + 1) ** 2 for n in range(len(gaps))], dtype=float)
    error = float(np.sum((gaps - targets / targets.sum()) ** 2 * 40))
    for step, kind in enumerate(schedule.kinds):
        wanted = (2 * step + 1) % 4 if step % 2 else 2
        error += 0.15 * abs(kind - wanted) * (0.5 + gaps[step])
        if step and kind == schedule.kinds[step - 1] == 3:
            error += 0.2
    return error


@dataclass
class Counting:
    """An objective from a function of the candidate, that counts its calls."""

    function: Any
    calls: list[tuple[Any, int]] = field(default_factory=list)

    def evaluate(self, candidate: Any, fidelity: int) -> Evaluation:
        self.calls.append((candidate, fidelity))
        return Evaluation(self.function(candidate), {"fidelity": fidelity})


FAILURES = ("raise", "nan", "inf", "out of memory", "cuda out of memory", "hang")


def failing(letters: tuple[int, ...]) -> str | None:
    """What goes wrong with a word: for a third of all words something, the same for ever."""
    draw = int(hashlib.sha256(b"fails" + repr(letters).encode()).hexdigest()[:8], 16)
    return FAILURES[draw // 3 % len(FAILURES)] if draw % 3 == 0 else None


def faulty(word: Word) -> float:
    """`rugged`, with a third of the words failing in all kinds of ways."""
    fault = failing(word.letters)
    if fault == "raise":
        raise RuntimeError(f"no {word.letters} <object at {id(word):#x}>\nsecond line")
    if fault == "out of memory":
        raise MemoryError
    if fault == "cuda out of memory":
        raise torch.OutOfMemoryError(f"tried to allocate {id(word)} bytes")
    if fault == "hang":
        try:
            time.sleep(60)
        except Exception:  # a candidate must not be able to swallow the time limit
            return -1.0
    return {"nan": math.nan, "inf": -math.inf}.get(fault or "", rugged(word))


def run_search(
    folder: Path,
    strategy: Strategy[Any],
    space: Any,
    function: Any,
    evaluations: int,
    *,
    seed: int = 0,
    fidelity: int = 1,
    initial: Sequence[Any] = (),
    cost_limits: dict[str, float] | None = None,
    time_limit_s: float | None = None,
    evaluate: Any = None,
    seconds: float | None = None,
    **options: Any,
) -> SearchResult[Any]:
    """Begin or continue a search in `folder`. `function` scores a candidate, or is an objective."""
    problem = Problem(space, seed, fidelity, cost_limits or {})
    objective = function if hasattr(function, "evaluate") else Counting(function)
    archive = open_archive(folder, problem, strategy, initial, fingerprint=FINGERPRINT)
    evaluate = evaluate or one_by_one(objective, time_limit_s)
    return Search(problem, strategy, archive, evaluate, initial, **options).run(Budget(evaluations, seconds))
