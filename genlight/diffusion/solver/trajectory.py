"""The error of a solver schedule along known trajectories of a teacher: without further calls of the network.

A table is linear in the network's outputs x̂_0. Put the outputs of a many-step teacher at the same times in their place,
and what is left is what the solver's own steps do wrong. A state that is off the trajectory also changes the output,
by Jacobian times deviation; that of Gaussian data stands for it, α s² / (α² s² + σ²) in directions of spread s. All of
this lies in the span of the noise and the teacher's outputs, so an error is a quadratic form of their Gram matrix, for
any size of samples.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.levels import PURE_NOISE_HALF_LOG_SNR
from genlight.diffusion.solver.sample import sample
from genlight.diffusion.solver.teacher import NetworkSampling, TeacherBank
from genlight.errors import UserError
from genlight.io import load_tensors, save_tensors

Array = np.ndarray[Any, np.dtype[np.float64]]

ROWS, GROUPS = 16, 4
_FILE_KIND = "genlight.teacher_trajectories"
_NODES = 4  # of the interpolation in λ
_SMALLEST = 1e-9


@dataclass(frozen=True, eq=False)
class TeacherTrajectories:
    """What is kept of a teacher's trajectories, over the principal directions of its samples in G groups.

    Attributes:
        noise_schedule: of the tables.
        table: the teacher's, with K evaluations, in the basis "data".
        gram: float64 [G, K + 1, K + 1]: products of the noise and the K outputs, summed over the directions of a group,
            in the mean over noises and per element.
        spreads: float64 [G], standard deviation of the teacher's samples in a direction of each group, falling.
        fingerprint: names all that they depend on.
    """

    noise_schedule: NoiseSchedule
    table: SolverTable
    gram: Tensor
    spreads: Tensor
    fingerprint: str = ""

    @classmethod
    def of(
        cls, sampling: NetworkSampling, bank: TeacherBank, table: SolverTable, rows: int = ROWS, groups: int = GROUPS
    ) -> TeacherTrajectories:
        """Sample the first `rows` noises of a bank once more, and hear what the network says: K calls."""
        some, said = bank.rows(slice(rows)), list[Tensor]()
        model = some.bind(sampling.model)

        def heard(x: Tensor, timestep: Tensor) -> Tensor:
            said.append(model(x, timestep))
            return said[-1]

        integers = sampling.integer_timesteps
        with torch.no_grad():
            sample(heard, some.noise, table, sampling.prediction, mean=sampling.mean, integer_timesteps=integers)
        known = [table.initial_scale * some.noise.double().cpu()]
        for number, answer in enumerate(said):
            x = torch.tensordot(table.weights[number, : len(known)], torch.stack(known), dims=1)
            time = table.times[number].expand(len(x))
            known.append(sampling.prediction.convert(answer.double().cpu(), x, time, to="sample"))
        basis = torch.stack(known).flatten(2)
        centred = bank.target.double().cpu().flatten(1)
        centred = centred - centred.mean(0)
        _, values, directions = torch.linalg.svd(centred, full_matrices=False)
        parts = [part for part in torch.arange(len(values)).tensor_split(groups) if len(part)]
        projected = [basis @ directions[part].T for part in parts]
        # directions in which no sample of the bank lies count to the narrowest group
        rest = basis - sum(part @ directions[number] for part, number in zip(projected, parts))
        gram = [torch.einsum("ibd,jbd->ij", part, part) for part in projected]
        gram[-1] = gram[-1] + torch.einsum("ibd,jbd->ij", rest, rest)
        spreads = [(values[part].square().mean() / len(centred)).sqrt() for part in parts]
        elements = basis.shape[1] * basis.shape[2]
        return cls(
            sampling.prediction.schedule, table, torch.stack(gram) / elements, torch.stack(spreads), bank.fingerprint
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The error of all directions, and of each group."""
        return ("trajectory", *(f"trajectory, group {number + 1}" for number in range(len(self.spreads))))

    def log_errors(self, table: SolverTable) -> Array:
        """Natural logarithms of predicted RMS distances to the teacher, float64 [1 + G].

        The table is in the basis "data"; the mean image of an analytical first step is left out.
        """
        weights, half_log_snrs = table.weights.detach().numpy(), self._half_log_snrs(table)
        alphas, sigmas = self._signal(table)
        count, size = len(self.spreads), self.gram.shape[1]
        known = np.zeros((table.nfe + 1, count, size))
        known[0, :, 0] = table.initial_scale / self.table.initial_scale
        for number in range(table.nfe):
            x = np.tensordot(weights[number, : number + 1], known[: number + 1], axes=1)
            begin, factors = self._interpolation(float(half_log_snrs[number]))
            nodes = slice(begin, begin + len(factors))
            on_trajectory = factors @ self._states[nodes] * np.hypot(alphas[number], sigmas[number])
            known[number + 1] = self._feedback(alphas[number], sigmas[number])[:, None] * (x - on_trajectory)
            known[number + 1, :, 1:][:, nodes] += factors
        error = np.tensordot(weights[-1], known, axes=1) - self.table.weights[-1].numpy()
        squares = np.einsum("gi,gij,gj->g", error, self.gram.numpy(), error).clip(min=0)
        logarithms: Array = 0.5 * np.log(np.maximum(np.concatenate([[squares.sum()], squares]), _SMALLEST**2))
        return logarithms

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file, without the teacher's table."""
        tensors = {"gram": self.gram, "spreads": self.spreads}
        save_tensors(path, tensors, {"kind": _FILE_KIND, "fingerprint": self.fingerprint})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], noise_schedule: NoiseSchedule, table: SolverTable, fingerprint: str
    ) -> TeacherTrajectories:
        """Read what `save` wrote; UserError for another file, or one of another fingerprint."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != _FILE_KIND or metadata.get("fingerprint") != fingerprint:
            raise UserError(f"{path} holds no trajectories of this teacher: delete it to make them again")
        return cls(noise_schedule, table, tensors["gram"], tensors["spreads"], fingerprint)

    def _signal(self, table: SolverTable) -> tuple[Array, Array]:
        alphas, sigmas = self.noise_schedule.alpha(table.times), self.noise_schedule.sigma(table.times)
        return alphas.detach().numpy(), sigmas.detach().numpy()

    def _half_log_snrs(self, table: SolverTable) -> Array:
        """λ of each evaluation, with a number for pure noise."""
        values: Array = self.noise_schedule.half_log_snr(table.times).detach().numpy()
        return np.maximum(values, PURE_NOISE_HALF_LOG_SNR)

    def _feedback(self, alpha: float, sigma: float) -> Array:
        """∂x̂_0/∂x of Gaussian data in each group, [G]."""
        squares = np.square(self.spreads.numpy())
        feedback: Array = alpha * squares / (alpha**2 * squares + sigma**2)
        return feedback

    def _interpolation(self, half_log_snr: float) -> tuple[int, Array]:
        """The first of the teacher's evaluations around λ, and Lagrange's factors of it and those that follow."""
        nodes = self._teacher_half_log_snrs
        count = min(_NODES, len(nodes))
        begin = int(np.clip(np.searchsorted(nodes, half_log_snr) - count // 2, 0, len(nodes) - count))
        near = nodes[begin : begin + count]
        factors = [np.prod([(half_log_snr - other) / (own - other) for other in near if other != own]) for own in near]
        return begin, np.array(factors)

    @cached_property
    def _teacher_half_log_snrs(self) -> Array:
        return self._half_log_snrs(self.table)

    @cached_property
    def _states(self) -> Array:
        """x of the teacher at each evaluation in units of √(α² + σ²), which changes little, [K, K + 1]."""
        scale = np.hypot(*self._signal(self.table))
        states: Array = self.table.weights[:-1].numpy() / scale[:, None]
        return states
