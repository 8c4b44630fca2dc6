"""A trajectory in memory with the reading side of one on disk, and searches over combinations without an archive."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genlight.search.records import History, Problem, Record, Trial


@dataclass(frozen=True)
class MemoryMember:
    first_step: int
    last_step: int
    count: int = 1
    lr: float | None = 1e-3


@dataclass(frozen=True, eq=False)
class MemoryTrajectory:
    tensors: Sequence[dict[str, Tensor]]
    counts: Sequence[int] | None = None
    every: int = 10
    fingerprint: str = "memory"
    members: tuple[MemoryMember, ...] = field(init=False)

    def __post_init__(self) -> None:
        members, step = [], 0
        for count in self.counts or [1] * len(self.tensors):
            members.append(MemoryMember(step + self.every, step + count * self.every, count))
            step += count * self.every
        object.__setattr__(self, "members", tuple(members))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.tensors[0]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.tensors[0][name].shape) for name in self.names}

    @property
    def steps(self) -> list[int]:
        return [member.last_step for member in self.members]

    def read(self, index: int, name: str) -> Tensor:
        return self.tensors[index][name].float()

    def read_difference(self, index: int, name: str) -> Tensor:
        return self.read(index, name) - self.read(len(self.tensors) - 1, name)


SHAPES = {"down.weight": (5, 3), "down.bias": (5,), "up.weight": (2, 4, 3, 3), "up.scale": ()}


def random_trajectory(members: int, seed: int = 0, *, noise: float = 1.0, **options: Any) -> MemoryTrajectory:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = [
        {name: base[name] + noise * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(members)
    ]
    return MemoryTrajectory(tensors, **options)


def live_weights(trajectory: Any, value: float = 7.25) -> dict[str, Tensor]:
    return {name: torch.full(tuple(trajectory.shapes[name]), value) for name in trajectory.names}


class Target:
    """What a space applies candidates to."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def live_weights(self) -> dict[str, Tensor]:
        return self.weights


def search(
    space: Any,
    strategy: Any,
    score: Callable[[Any], float],
    evaluations: int,
    *,
    initial: Sequence[Any] = (),
    seed: int = 0,
    stop_below: float = -1.0,
) -> list[Record[Any]]:
    """Records of a search, one strategy, all in memory; it may stop early at a score."""
    problem = Problem(space, seed)
    records: list[Record[Any]] = []

    def measure(generation: int, candidates: Sequence[tuple[Any, str]]) -> None:
        for candidate, source in candidates:
            key, cost = space.key(candidate), space.cost(candidate)
            trial = Trial(len(records), generation, key, candidate, 1, source, cost, (0, 0))
            records.append(Record(trial, score(candidate), {}, None))

    measure(0, [(candidate, "initial") for candidate in initial])
    while len(records) < evaluations and (not records or min(r.score or 0.0 for r in records) > stop_below):
        history = History(records)
        proposals = strategy.ask(problem, history)
        if not proposals:
            break
        measure(history.generation, [(proposal.candidate, proposal.source) for proposal in proposals])
    return records
