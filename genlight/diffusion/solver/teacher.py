"""The problem of fitting a solver: a model, noise, and what a teacher with many evaluations makes of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.sample import Model, sample, sample_many

ConditionalModel = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class TeacherBank:
    """Noise and what the teacher makes of it.

    Args:
        noise: standard normal, [M, ...].
        target: the teacher's samples, [M, ...].
        conditions: further inputs of the model by name, each [M, ...]: model(x, timestep, **conditions).
    """

    noise: Tensor
    target: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.noise) == 0 or self.noise.shape != self.target.shape:
            raise ValueError(
                f"bank: noise {tuple(self.noise.shape)} and target {tuple(self.target.shape)} need one shape [M, ...], "
                "M at least 1"
            )
        for name, value in self.conditions.items():
            if len(value) != len(self.noise):
                raise ValueError(f"bank: condition {name!r} has {len(value)} rows for {len(self.noise)} noises")

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, index: slice | Tensor) -> "TeacherBank":
        """Some of the rows."""
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return TeacherBank(self.noise[index], self.target[index], conditions)

    def usable(self) -> "TeacherBank":
        """The bank with tensors that may meet gradients, even if it was made in inference mode."""

        def usable(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        conditions = {name: usable(value) for name, value in self.conditions.items()}
        return TeacherBank(usable(self.noise), usable(self.target), conditions)

    def chunks(self, rows: int) -> "Iterator[TeacherBank]":
        """All rows, at most `rows` at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))

    def bind(self, model: ConditionalModel) -> Model:
        """The model with the conditions of these rows, repeated for tables that are sampled together."""

        def bound(x: Tensor, timestep: Tensor) -> Tensor:
            repeats = len(x) // len(self)
            return model(
                x,
                timestep,
                **{name: value.repeat(repeats, *[1] * (value.ndim - 1)) for name, value in self.conditions.items()},
            )

        return bound

    @classmethod
    def of(
        cls,
        model: ConditionalModel,
        noise: Tensor,
        teacher: SolverTable,
        prediction: Prediction,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        batch_rows: int = 1024,
        integer_timesteps: bool = False,
    ) -> "TeacherBank":
        """The bank of a teacher that is the same model with the many evaluations of `teacher`; see `sample`."""
        empty = cls(noise, noise, conditions or {})
        with torch.no_grad():
            parts = [
                sample(part.bind(model), part.noise, teacher, prediction, integer_timesteps=integer_timesteps)
                for part in empty.chunks(batch_rows)
            ]
        return replace(empty, target=torch.cat(parts))


@dataclass(frozen=True, eq=False)
class TuningProblem:
    """What is fitted to what.

    Args:
        model: model(x, timestep, **conditions of the bank), in evaluation mode and without randomness.
        train, select: disjoint noise, for fitting and for choosing what is kept. Reports need a third.
        batch_rows: rows that go through the model at a time.
        integer_timesteps, mean: as in `sample`.
    """

    model: ConditionalModel
    prediction: Prediction
    train: TeacherBank
    select: TeacherBank
    batch_rows: int = 4096
    integer_timesteps: bool = False
    mean: Tensor | None = None

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows = {self.batch_rows} must be positive")

    def sample(self, bank: TeacherBank, table: SolverTable, wrap: Callable[[Model], Model] = lambda m: m) -> Tensor:
        """The result of one table for a bank, [M, ...]."""
        model = wrap(bank.bind(self.model))
        return sample(
            model, bank.noise, table, self.prediction, mean=self.mean, integer_timesteps=self.integer_timesteps
        )

    def sample_many(self, bank: TeacherBank, tables: list[SolverTable]) -> Tensor:
        """The results of several tables, [S, M, ...]."""
        model, integers = bank.bind(self.model), self.integer_timesteps
        return sample_many(model, bank.noise, tables, self.prediction, mean=self.mean, integer_timesteps=integers)

    @torch.no_grad()
    def rms(self, table: SolverTable, bank: TeacherBank) -> float:
        """The paired RMS distance to the teacher over all elements of a bank; inf where it is not finite."""
        total = 0.0
        for part in bank.chunks(self.batch_rows):
            total += (self.sample(part, table) - part.target).double().square().sum().item()
        return math.sqrt(total / bank.target.numel()) if math.isfinite(total) else math.inf
