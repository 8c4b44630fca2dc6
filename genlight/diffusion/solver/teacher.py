"""The problem of fitting a solver: what is sampled, noise, and what a teacher with many evaluations makes of it."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.blocks import Blocks
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.sample import Model, sample_many
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

    def to(self, device: torch.device | str) -> "TeacherBank":
        """The bank on a device."""
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        return TeacherBank(self.noise.to(device), self.target.to(device), conditions, self.fingerprint)

    @classmethod
    def of(
        cls,
        sampling: "Sampling",
        noise: Tensor,
        teacher: SolverTable,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        batch_rows: int = 1024,
    ) -> "TeacherBank":
        """The bank of a teacher that is the same sampling with the many evaluations of `teacher`.

        At most `batch_rows` noises [M, ...] are sampled at a time, fewer once memory has run out.
        """
        empty = cls(noise, noise, conditions or {})
        target = torch.empty_like(noise, dtype=torch.promote_types(noise.dtype, torch.float32))

        def keep(_: slice, rows: slice, x: Tensor) -> None:
            target[rows] = x[0]

        with torch.no_grad():
            Blocks(batch_rows).run(1, len(empty), lambda _, rows: sampling([teacher], empty.rows(rows)), keep)
        return replace(empty, target=target)

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
        noise, target = tensors.pop("noise"), tensors.pop("target")
        conditions = {name.removeprefix(_CONDITION): value for name, value in tensors.items()}
        return cls(noise, target, conditions, found).to(device)


class Sampling(Protocol):
    """Whatever makes samples of solver tables: a network in a loop, or a whole pipeline that is handed the table.

    An attribute `integer_timesteps` that is true says that times between integers are errors, one `rounded_timesteps`
    that the network is given times in 16 bits, which small differences do not move. `dtype` is the type of the states
    between evaluations, where that is not the type of the noise.
    """

    @property
    def prediction(self) -> Prediction:
        """What the network predicts, and the noise schedule that the tables are compiled on."""

    def __call__(self, tables: Sequence[SolverTable], bank: TeacherBank) -> Tensor:
        """Undecoded samples [S, M, ...] of S tables with one nfe and one basis, on the noise and conditions of a bank.

        They depend on the noise and the tables alone: nothing is drawn.
        """


@dataclass(frozen=True, eq=False)
class NetworkSampling:
    """Sampling with a network; where the network has gradients, samples have those of tables and times.

    Args:
        model: model(x, timestep, **conditions of the bank), in evaluation mode and without randomness.
        prediction: what it predicts.
        mean, integer_timesteps: as in `sample`.
    """

    model: ConditionalModel
    prediction: Prediction
    mean: Tensor | None = None
    integer_timesteps: bool = False

    def __call__(self, tables: Sequence[SolverTable], bank: TeacherBank) -> Tensor:
        """Samples [S, M, ...]; see `sample_many`."""
        model, integers = bank.bind(self.model), self.integer_timesteps
        return sample_many(model, bank.noise, tables, self.prediction, mean=self.mean, integer_timesteps=integers)


@dataclass(frozen=True, eq=False)
class TuningProblem:
    """What is fitted to what.

    Args:
        sampling: how tables become samples.
        train, select: disjoint noise, for fitting and for choosing what is kept. Reports need a third.
        batch_rows: rows that are sampled at a time, tables times noises; fewer once memory has run out.
    """

    sampling: Sampling
    train: TeacherBank
    select: TeacherBank
    batch_rows: int = 4096
    blocks: Blocks = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows = {self.batch_rows} must be positive")
        object.__setattr__(self, "blocks", Blocks(self.batch_rows))

    @property
    def prediction(self) -> Prediction:
        """Of the sampling."""
        return self.sampling.prediction

    @property
    def integer_timesteps(self) -> bool:
        """Whether times between integers are errors."""
        return bool(getattr(self.sampling, "integer_timesteps", False))

    @property
    def fixed_times(self) -> bool:
        """Whether times are not to be tuned: they are integers, or rounded by more than what tuning goes by."""
        return self.integer_timesteps or bool(getattr(self.sampling, "rounded_timesteps", False))

    @property
    def dtype(self) -> torch.dtype:
        """Of the states between evaluations."""
        found: torch.dtype = getattr(self.sampling, "dtype", None) or self.train.noise.dtype
        return found

    def sample(self, bank: TeacherBank, table: SolverTable) -> Tensor:
        """The result of one table for a bank at once, [M, ...], with gradients where the sampling has some."""
        return self.sampling([table], bank)[0]

    @torch.no_grad()
    def sample_many(self, bank: TeacherBank, tables: Sequence[SolverTable]) -> Tensor:
        """The results of several tables with one nfe and one basis, [S, M, ...], without gradients."""
        result: list[Tensor] = []

        def keep(here: slice, rows: slice, x: Tensor) -> None:
            if not result:
                result.append(x.new_empty((len(tables), *bank.noise.shape)))
            result[0][here, rows] = x

        self.blocks.run(len(tables), len(bank), lambda here, rows: self.sampling(tables[here], bank.rows(rows)), keep)
        return result[0]

    @torch.no_grad()
    def rms(self, table: SolverTable, bank: TeacherBank) -> float:
        """The paired RMS distance to the teacher over all elements of a bank; inf where it is not finite."""
        total = 0.0

        def add(_: slice, rows: slice, x: Tensor) -> None:
            nonlocal total
            total += (x[0] - bank.target[rows]).double().square().sum().item()

        self.blocks.run(1, len(bank), lambda _, rows: self.sampling([table], bank.rows(rows)), add)
        return math.sqrt(total / bank.target.numel()) if math.isfinite(total) else math.inf
