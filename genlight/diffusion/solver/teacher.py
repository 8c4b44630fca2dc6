"""The problem of fitting a solver: a model, noise, and what a teacher with many evaluations makes of it."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.sample import Model, sample, sample_many
from genlight.errors import UserError
from genlight.io import load_tensors, save_tensors

# model(x, timestep, **conditions), with the conditions of each row; guidance is the callable's own affair
ConditionalModel = Callable[..., Tensor]

_FILE_KIND = "genlight.teacher_bank"
_CONDITION = "condition."  # what the names of conditions begin with in a file


@dataclass(frozen=True, eq=False)
class TeacherBank:
    """Noise and what the teacher makes of it.

    Args:
        noise: standard normal, [M, ...], in the type and on the device that students are sampled with.
        target: the teacher's samples, [M, ...].
        conditions: further inputs of the model by name, each [M, ...]: model(x, timestep, **conditions).
        fingerprint: names all that the target depends on, or empty; a bank in a file needs one.

    Raises ValueError for shapes that do not fit, a target that is not finite.
    """

    noise: Tensor
    target: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if len(self.noise) == 0 or self.noise.shape != self.target.shape:
            raise ValueError(
                f"bank: noise {tuple(self.noise.shape)} and target {tuple(self.target.shape)} need one shape [M, ...], "
                "M at least 1"
            )
        for name, value in self.conditions.items():
            rows = len(value) if value.ndim else 0
            if rows != len(self.noise):
                raise ValueError(f"bank: condition {name!r} has {rows} rows for {len(self.noise)} noises")
        if not bool(self.target.isfinite().all()):
            raise ValueError("bank: the target is not finite: the teacher's schedule or the network is at fault")

    def __len__(self) -> int:
        return len(self.noise)

    def rows(self, index: slice | Tensor) -> "TeacherBank":
        """Some of the rows, without the fingerprint, which is that of all."""
        conditions = {name: value[index] for name, value in self.conditions.items()}
        return TeacherBank(self.noise[index], self.target[index], conditions)

    def usable(self) -> "TeacherBank":
        """The bank with tensors that may meet gradients, even if it was made in inference mode."""

        def usable(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        conditions = {name: usable(value) for name, value in self.conditions.items()}
        return TeacherBank(usable(self.noise), usable(self.target), conditions, self.fingerprint)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file; raises ValueError for a bank without a fingerprint."""
        if not self.fingerprint:
            raise ValueError(f"bank: {path} needs a fingerprint of what the target depends on, this bank has none")
        conditions = {_CONDITION + name: value for name, value in self.conditions.items()}
        tensors = {"noise": self.noise, "target": self.target, **conditions}
        save_tensors(path, tensors, {"kind": _FILE_KIND, "fingerprint": self.fingerprint})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], expected_fingerprint: str, device: torch.device | str = "cpu"
    ) -> "TeacherBank":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: damaged.
            UserError: no teacher bank, or one of another fingerprint.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != _FILE_KIND or not {"noise", "target"} <= tensors.keys():
            raise UserError(f"{path} is no teacher bank")
        found = metadata.get("fingerprint", "")
        if found != expected_fingerprint:
            raise UserError(
                f"{path} holds a teacher of other weights, noise, schedule or conditions (fingerprint {found[:12]}, "
                f"needed {expected_fingerprint[:12]}): delete it to make it again"
            )
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        noise, target = on_device.pop("noise"), on_device.pop("target")
        conditions = {name.removeprefix(_CONDITION): value for name, value in on_device.items()}
        return cls(noise, target, conditions, found)


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
