"""Filling a generation with new candidates, each from its own generator."""

from collections.abc import Callable, Mapping

import numpy as np

from genlight.search.protocols import Candidate
from genlight.search.records import History, Problem, Proposal

TRIES = 100
RANDOM_TRIES = 1000
RANDOM = "random"
Made = tuple[Candidate, str]


def propose(
    problem: Problem[Candidate],
    history: History[Candidate],
    count: int,
    make: Callable[[np.random.Generator, int], Made[Candidate]],
    before: Mapping[str, Proposal[Candidate]] | None = None,
) -> list[Proposal[Candidate]]:
    """`count` new candidates within the cost limits, made by `make(rng, index)`, after those of `before`.

    A made candidate that is not new, or costs too much, is made again from the same generator. Where that keeps
    failing, a random candidate takes its place; where that fails too, the space is taken to be exhausted and the
    generation ends there. `before` holds what the generation begins with, by key.
    """
    proposals = dict(before or {})
    taken = history.keys() | proposals.keys()
    for _ in range(count):
        index = history.next_index + len(proposals)
        rng = problem.rng(index)
        found = new_candidate(problem, taken, TRIES, lambda: make(rng, index))  # noqa: B023
        if found is None:
            found = new_candidate(problem, taken, RANDOM_TRIES, lambda: (problem.space.sample(rng), RANDOM))  # noqa: B023
        if found is None:
            break
        key, candidate, source = found
        taken.add(key)
        proposals[key] = Proposal(candidate, problem.fidelity, source)
    return list(proposals.values())


def new_candidate(
    problem: Problem[Candidate], taken: set[str], tries: int, make: Callable[[], Made[Candidate]]
) -> tuple[str, Candidate, str] | None:
    """Key, candidate and source of the first of `tries` that is not taken and keeps the cost limits."""
    for _ in range(tries):
        candidate, source = make()
        key = problem.space.key(candidate)
        if key not in taken and problem.within_limits(problem.space.cost(candidate)):
            return key, candidate, source
    return None
