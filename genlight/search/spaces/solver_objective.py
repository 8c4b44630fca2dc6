"""Distance to a many-step teacher on the same noise: an objective for solver schedules without sampling noise.

The teacher's samples are made once. A score depends on the schedule, the network and the bank alone.
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import sample_many
from genlight.diffusion.solver.serialization import fingerprint, schedule_to_json
from genlight.diffusion.solver.spacings import End
from genlight.errors import UserError
from genlight.io import load_tensors, save_tensors
from genlight.search.protocols import Evaluation

TEACHER_STEPS = 100
MAX_ROWS = 1024
# the size of a batch shows in the last bits of float32 networks; a score must not depend on it
SCORE_DIGITS = 6

# model(x, timestep), or with labels model(x, timestep, labels); guidance is the callable's own affair
Model = Callable[..., Tensor]


def teacher_schedule(
    noise_schedule: NoiseSchedule, steps: int = TEACHER_STEPS, *, solver: str = "dpmpp_3m_exact", end: End = "t_min"
) -> SolverSchedule:
    """A schedule of many steps, even in λ, that stands for the exact solution. `end` is that of the search space."""
    return named_schedule(solver, noise_schedule, steps, end=end)


@dataclass(frozen=True, eq=False)
class TeacherBank:
    """Noise with the samples that a teacher makes of it.

    Attributes:
        noise: standard normal [n, ...], in the type and on the device that candidates are sampled with.
        samples: the teacher's [n, ...].
        labels: int64 [n], or None.
        fingerprint: SHA-256 (hex) of all that the samples depend on.
    """

    noise: Tensor
    samples: Tensor
    labels: Tensor | None
    fingerprint: str

    def __post_init__(self) -> None:
        if self.samples.shape != self.noise.shape or len(self.noise) < 1:
            raise ValueError(
                f"teacher samples {tuple(self.samples.shape)} must have the shape of the noise "
                f"{tuple(self.noise.shape)}, one row or more"
            )
        if self.labels is not None and self.labels.shape != self.noise.shape[:1]:
            raise ValueError(f"labels {tuple(self.labels.shape)} must be [{len(self.noise)}], one for each noise")
        if not bool(self.samples.isfinite().all()):
            raise ValueError("the teacher's samples are not finite: its schedule or the network is at fault")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file."""
        labels = {} if self.labels is None else {"labels": self.labels}
        tensors = {"noise": self.noise, "samples": self.samples, **labels}
        save_tensors(path, tensors, {"kind": "genlight.teacher_bank", "fingerprint": self.fingerprint})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], expected_fingerprint: str, device: torch.device | str = "cpu"
    ) -> "TeacherBank":
        """Read what `save` wrote.

        Args:
            expected_fingerprint: from `bank_fingerprint`.

        Raises:
            CorruptFileError: damaged.
            UserError: no teacher bank, or made for something else.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "genlight.teacher_bank":
            raise UserError(f"{path} is no teacher bank")
        found = metadata.get("fingerprint", "")
        if found != expected_fingerprint:
            raise UserError(
                f"{path} holds a teacher of other weights, noise, schedule or labels (fingerprint {found[:12]}, needed "
                f"{expected_fingerprint[:12]}): delete it to make it again"
            )
        on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
        return cls(on_device["noise"], on_device["samples"], on_device.get("labels"), found)


def bank_fingerprint(
    prediction: Prediction,
    noise: Tensor,
    schedule: SolverSchedule,
    labels: Tensor | None = None,
    model_fingerprint: str = "",
) -> str:
    """SHA-256 (hex) of what teacher samples depend on; `model_fingerprint` names the weights and the guidance."""
    digest = hashlib.sha256(f"{fingerprint(prediction)}/{schedule_to_json(schedule)}/{model_fingerprint}".encode())
    for tensor in (noise, labels):
        if tensor is not None:
            digest.update(f"/{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_teacher_bank(
    model: Model,
    prediction: Prediction,
    noise: Tensor,
    *,
    schedule: SolverSchedule | None = None,
    labels: Tensor | None = None,
    model_fingerprint: str = "",
    max_rows: int = MAX_ROWS,
    mean: Tensor | None = None,
    integer_timesteps: bool = False,
) -> TeacherBank:
    """Sample the teacher; `schedule` is `teacher_schedule` of the noise schedule if None."""
    chosen = teacher_schedule(prediction.schedule) if schedule is None else schedule
    runner = _Runner(model, prediction, max_rows, mean, integer_timesteps)
    table = compile_schedule(chosen, prediction.schedule)
    samples = torch.empty_like(noise, dtype=torch.promote_types(noise.dtype, torch.float32))

    def keep(_: slice, rows: slice, x: Tensor) -> None:
        samples[rows] = x[0]

    runner.run([table], noise, labels, keep)
    return TeacherBank(noise, samples, labels, bank_fingerprint(prediction, noise, chosen, labels, model_fingerprint))


class TeacherObjective:
    """Scores a schedule, or a compiled table, by the RMS distance of its samples to the teacher's.

    Args:
        model: see `Model`; called without gradients.
        prediction: what it predicts, and the noise schedule.
        bank: noise and teacher samples. `fidelity` of an evaluation is how many of its noises are used, from the first.
        max_rows: rows of one forward pass at most; halved for good whenever memory runs out.
        mean: mean image of analytical first steps.
        integer_timesteps: the network looks its timesteps up.

    The first evaluation, which all schedules from one starting time share, is made once for the whole bank.
    """

    def __init__(
        self,
        model: Model,
        prediction: Prediction,
        bank: TeacherBank,
        *,
        max_rows: int = MAX_ROWS,
        mean: Tensor | None = None,
        integer_timesteps: bool = False,
    ) -> None:
        self.prediction, self.bank = prediction, bank
        self._runner = _Runner(model, prediction, max_rows, mean, integer_timesteps)
        self._first_outputs: dict[tuple[float, float], Tensor] = {}

    @property
    def max_rows(self) -> int:
        """Rows of one forward pass at most, by now."""
        return self._runner.max_rows

    def evaluate(self, candidate: SolverSchedule | SolverTable, fidelity: int) -> Evaluation:
        """The RMS distance over `fidelity` noises; NaN or infinite where the samples are."""
        return self.evaluate_many([candidate], fidelity)[0]

    def evaluate_many(self, candidates: Sequence[SolverSchedule | SolverTable], fidelity: int) -> list[Evaluation]:
        """One evaluation for each candidate, in shared forward passes."""
        errors = self.errors(candidates, fidelity)
        return [Evaluation(_rounded(math.sqrt(value))) for value in errors.mean(dim=1).tolist()]

    def errors(self, candidates: Sequence[SolverSchedule | SolverTable], fidelity: int | None = None) -> Tensor:
        """Mean squared error of each candidate on each noise, float64 [candidates, fidelity] on the CPU.

        Raises ValueError for a fidelity beyond the bank, or a schedule with no meaning on the noise schedule.
        """
        count = len(self.bank.noise) if fidelity is None else fidelity
        if not 1 <= count <= len(self.bank.noise):
            raise ValueError(f"fidelity = {count}: the bank has {len(self.bank.noise)} noises")
        tables = [
            candidate if isinstance(candidate, SolverTable) else compile_schedule(candidate, self.prediction.schedule)
            for candidate in candidates
        ]
        result = torch.empty(len(tables), count, dtype=torch.float64)
        # schedules are sampled together if they have as many evaluations, in one basis, from one start
        groups: dict[tuple[int, str, tuple[float, float] | None], list[int]] = {}
        for index, table in enumerate(tables):
            groups.setdefault((table.nfe, table.basis, _common_start(table)), []).append(index)
        for (_, _, start), members in groups.items():
            self._measure([tables[index] for index in members], members, start, result)
        return result

    def _measure(
        self, tables: list[SolverTable], members: list[int], start: tuple[float, float] | None, result: Tensor
    ) -> None:
        bank, count = self.bank, result.shape[1]
        first = None if start is None else self._first_output(start, tables[0], count)
        labels = None if bank.labels is None else bank.labels[:count]
        where = torch.tensor(members)

        def keep(here: slice, rows: slice, x: Tensor) -> None:
            squared = (x.double() - bank.samples[rows].double()).square().flatten(2).mean(2)
            result[where[here], rows] = squared.cpu()

        self._runner.run(tables, bank.noise[:count], labels, keep, first)

    def _first_output(self, start: tuple[float, float], table: SolverTable, count: int) -> Tensor:
        """What the network says at the start, for the first `count` noises or more."""
        known = self._first_outputs.get(start)
        if known is None or len(known) < count:
            labels = None if self.bank.labels is None else self.bank.labels[:count]
            known = self._runner.first_output(table, self.bank.noise[:count], labels)
            self._first_outputs[start] = known
        return known


class _Runner:
    """Samples tables in blocks of `max_rows` rows at most, in smaller ones once memory has run out."""

    def __init__(
        self, model: Model, prediction: Prediction, max_rows: int, mean: Tensor | None, integer_timesteps: bool
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows = {max_rows} must be 1 or more")
        self.model, self.prediction, self.max_rows = model, prediction, max_rows
        self.mean, self.integer_timesteps = mean, integer_timesteps

    def run(
        self,
        tables: Sequence[SolverTable],
        noise: Tensor,
        labels: Tensor | None,
        keep: Callable[[slice, slice, Tensor], None],
        first: Tensor | None = None,
    ) -> None:
        """Call keep(tables, rows, x [tables, rows, ...]) for every block of tables and noises.

        Args:
            first: what the network says at the first evaluation of all tables, [n, ...]; None: ask it.
        """
        blocks = [(slice(0, len(tables)), slice(0, len(noise)))]
        while blocks:
            block = blocks.pop()
            parts = _split(*block, self.max_rows)
            if len(parts) > 1:
                blocks.extend(reversed(parts))
                continue
            here, rows = block
            chunk = noise[rows]
            model = _Conditioned(
                self.model,
                len(chunk),
                None if labels is None else labels[rows],
                None if first is None else first[rows],
            )
            try:
                x = self._sample(tables[here], chunk, model)
            except torch.OutOfMemoryError:
                self.max_rows = (here.stop - here.start) * len(chunk) // 2
                if self.max_rows < 1:
                    self.max_rows = 1
                    raise
                blocks.append(block)
                continue
            keep(here, rows, x)

    def first_output(self, table: SolverTable, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The network's first answer [n, ...] when a table is sampled."""
        # the table cut to one evaluation: sampling it asks the network once
        one = SolverTable(
            table.weights[:2, :2], table.mean_weights[:2], table.times[:1], table.basis, table.initial_scale
        )
        heard: list[Tensor] = []
        outputs: list[Tensor] = []

        def listening(x: Tensor, timestep: Tensor, *labels: Tensor) -> Tensor:
            heard[:] = [self.model(x, timestep, *labels)]
            return heard[0]

        runner = _Runner(listening, self.prediction, self.max_rows, self.mean, self.integer_timesteps)
        runner.run([one], noise, labels, lambda here, rows, x: outputs.append(heard[0]))
        self.max_rows = runner.max_rows
        return torch.cat(outputs)

    def _sample(self, tables: Sequence[SolverTable], noise: Tensor, model: "_Conditioned") -> Tensor:
        with torch.inference_mode():
            return sample_many(
                model, noise, tables, self.prediction, mean=self.mean, integer_timesteps=self.integer_timesteps
            )


class _Conditioned:
    """The network with the labels of a chunk, repeated for each table, and its first answer where that is known."""

    def __init__(self, model: Model, rows: int, labels: Tensor | None, first: Tensor | None) -> None:
        self.model, self.rows, self.labels, self.first = model, rows, labels, first

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self.first is not None:
            # one evaluation for all tables, or for each its own copy
            answer, self.first = self.first, None
            return answer.repeat(len(x) // self.rows, *[1] * (answer.ndim - 1))
        if self.labels is None:
            return self.model(x, timestep)
        return self.model(x, timestep, self.labels.repeat(len(x) // self.rows))


def _split(here: slice, rows: slice, limit: int) -> list[tuple[slice, slice]]:
    """The block itself, or two parts of one that is larger than `limit`: first tables are parted, then noises."""
    tables, count = here.stop - here.start, rows.stop - rows.start
    if tables * count <= limit:
        return [(here, rows)]
    if tables > 1:
        middle = here.start + max(1, limit // count)
        return [(slice(here.start, middle), rows), (slice(middle, here.stop), rows)]
    middle = rows.start + limit
    return [(here, slice(rows.start, middle)), (here, slice(middle, rows.stop))]


def _common_start(table: SolverTable) -> tuple[float, float] | None:
    """Where the first evaluation is, if it is made on the noise itself; None after an analytical first step."""
    if float(table.weights[0, 0]) != 1.0 or float(table.mean_weights[0]) != 0.0:
        return None
    return float(table.times[0]), table.initial_scale


def _rounded(value: float) -> float:
    return float(f"{value:.{SCORE_DIGITS}g}") if math.isfinite(value) else value
