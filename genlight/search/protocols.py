"""What a search is made of: a space of candidates, an objective, a strategy, and what a target must offer.

A candidate is a frozen dataclass of plain values. A score is a finite number, lower is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from torch import Tensor

from genlight.errors import UserError

if TYPE_CHECKING:
    from genlight.experts.editor import ExpertEditor
    from genlight.search.records import History, Problem, Proposal

Candidate = TypeVar("Candidate")
CandidateIn = TypeVar("CandidateIn", contravariant=True)
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


class SearchSpace(Protocol[Candidate]):
    """All candidates of one kind, and how to draw, vary, price, describe and apply one.

    Every random choice comes from the generator handed in; `mutate` and `crossover` leave their parents as they were.
    """

    @property
    def candidate_type(self) -> type[Candidate]:
        """The frozen dataclass; its JSON is read and written by pydantic."""
        ...

    def sample(self, rng: np.random.Generator) -> Candidate:
        """A random valid candidate."""
        ...

    def mutate(self, candidate: Candidate, rng: np.random.Generator, *, size: float = 1.0) -> Candidate:
        """A valid neighbour. `size` in (0, 1] scales continuous edits, so that a search can anneal them."""
        ...

    def crossover(self, a: Candidate, b: Candidate, rng: np.random.Generator) -> Candidate:
        """A valid candidate with parts of both."""
        ...

    def cost(self, candidate: Candidate) -> dict[str, float]:
        """What it costs to use (nfe, latency_ms, parameters, bits …): for constraints and the Pareto front."""
        ...

    def encode(self, candidate: Candidate) -> Tensor:
        """Features for predictors, float [steps, features]; the number of steps may differ between candidates."""
        ...

    def apply(self, target: Any, candidate: Candidate) -> None:
        """Make `target` behave as the candidate says: in place, cheap, undone by applying another."""
        ...

    def key(self, candidate: Candidate) -> str:
        """Canonical key: equal for candidates that behave alike (see `codec.canonical_key`)."""
        ...

    def fingerprint(self) -> str:
        """Text that differs for spaces whose candidates mean something else."""
        ...


@runtime_checkable
class VectorView(Protocol[Candidate]):
    """A space that can also be walked as a box of real numbers, as CMA-ES does."""

    @property
    def vector_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Lower and upper ends, float64 [n, 2]; infinite where there is none."""
        ...

    def to_vector(self, candidate: Candidate) -> Vector:
        """Coordinates of a candidate, float64 [n]."""
        ...

    def from_vector(self, vector: Vector) -> Candidate:
        """The valid candidate at (or nearest to) a point of the box."""
        ...


@runtime_checkable
class CheapIndicators(Protocol[CandidateIn]):
    """A space that knows something of how good a candidate is before it is measured."""

    @property
    def indicator_names(self) -> tuple[str, ...]:
        """What the indicators are, one name each."""
        ...

    def indicators(self, candidate: CandidateIn) -> Vector:
        """Float64 [names], lower where a candidate promises to be better, NaN where there is no value.

        A function of the space and the candidate: nothing is drawn, and no network is called.
        """
        ...


@runtime_checkable
class LiveWeights(Protocol):
    """A target whose weights a space writes in place."""

    def live_weights(self) -> Mapping[str, Tensor]:
        """The tensors that the next forward pass reads, by name; not copies."""
        ...


@runtime_checkable
class SettableSampler(Protocol):
    """A target whose sampler a space replaces."""

    def set_sampler(self, sampler: Any) -> None:
        """Sample with `sampler` from now on; None puts the target's own back."""
        ...


@runtime_checkable
class ScheduledMembers(Protocol):
    """A target that holds several networks, of which a space says who makes each evaluation."""

    def set_members(self, timesteps: Sequence[float], names: Sequence[str]) -> None:
        """Let names[i] answer at timesteps[i], as the network sees them; empty: as the target itself chooses."""
        ...


@runtime_checkable
class ReadableExperts(Protocol):
    """A target whose mixture-of-experts layers a space reads, prunes and merges."""

    def expert_editor(self) -> ExpertEditor:
        """The editor of its experts: the same one each time, because it knows which edits are on."""
        ...


def require_capability(target: object, capability: type, space: object, offered_by: Sequence[str] = ()) -> None:
    """Check at the start that a space can be applied to a target.

    Args:
        target: what candidates will be applied to.
        capability: one of the protocols of this file.
        space: who needs it, for the message.
        offered_by: names of modules that offer it, for the message.

    Raises:
        UserError: the target lacks it.
    """
    if not isinstance(target, capability):
        known = f"; it is offered by {', '.join(offered_by)}" if offered_by else ""
        raise UserError(
            f"{type(space).__name__} needs a target with {capability.__name__}, which {type(target).__name__} "
            f"does not offer{known}"
        )


@dataclass(frozen=True)
class Evaluation:
    """What an objective found.

    Attributes:
        score: lower is better.
        facts: further numbers or texts, kept in the archive. They must be functions of the candidate, not of the clock.
    """

    score: float
    facts: Mapping[str, float | int | str] = field(default_factory=dict)


class Objective(Protocol[CandidateIn]):
    """Scores candidates on common random numbers, so that equal candidates get equal scores."""

    def evaluate(self, candidate: CandidateIn, fidelity: int) -> Evaluation:
        """Score a candidate on `fidelity` samples. Whatever it raises fails this candidate only."""
        ...


class Strategy(Protocol[Candidate]):
    """Proposes candidates: ask is a pure function of the problem (with its seed) and of what was measured so far.

    Telling is handing over the longer history. A strategy may keep a cache, but a fresh copy must answer the same.
    The driver calls `ask` at the end of a generation only, with all of it measured. An empty answer ends the search.
    Strategies are frozen dataclasses: their `repr` is part of the archive's fingerprint.
    """

    def ask(self, problem: Problem[Candidate], history: History[Candidate]) -> list[Proposal[Candidate]]:
        """The next generation; its p-th candidate draws from `problem.rng(history.next_index + p)`."""
        ...
