"""Distance to a many-step teacher on the same noise: an objective for solver schedules without sampling noise.

The teacher's samples are made once. A score depends on the schedule, the network and the bank alone.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import named_schedule
from genlight.diffusion.solver.sample import Model, sample_many
from genlight.diffusion.solver.serialization import fingerprint, schedule_to_json
from genlight.diffusion.solver.spacings import End
from genlight.diffusion.solver.teacher import ConditionalModel, TeacherBank
from genlight.search.protocols import Evaluation

TEACHER_STEPS = 100
MAX_ROWS = 1024
# the size of a batch shows in the last bits of float32 networks; a score must not depend on it
SCORE_DIGITS = 6


def teacher_schedule(
    noise_schedule: NoiseSchedule, steps: int = TEACHER_STEPS, *, solver: str = "dpmpp_3m_exact", end: End = "t_min"
) -> SolverSchedule:
    """A schedule of many steps, even in λ, that stands for the exact solution. `end` is that of the search space."""
    return named_schedule(solver, noise_schedule, steps, end=end)


def bank_fingerprint(
    prediction: Prediction,
    noise: Tensor,
    schedule: SolverSchedule,
    conditions: Mapping[str, Tensor] | None = None,
    model_fingerprint: str = "",
) -> str:
    """SHA-256 (hex) of what a teacher's target depends on; `model_fingerprint` names the weights and the guidance."""
    digest = hashlib.sha256(f"{fingerprint(prediction)}/{schedule_to_json(schedule)}/{model_fingerprint}".encode())
    for name, tensor in (("", noise), *sorted((conditions or {}).items())):
        digest.update(f"{name}/{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_teacher_bank(
    model: ConditionalModel,
    prediction: Prediction,
    noise: Tensor,
    *,
    schedule: SolverSchedule | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    model_fingerprint: str = "",
    max_rows: int = MAX_ROWS,
    mean: Tensor | None = None,
    integer_timesteps: bool = False,
) -> TeacherBank:
    """Sample the teacher, in smaller chunks where memory runs out; the bank has the fingerprint of `bank_fingerprint`.

    `schedule` is `teacher_schedule` of the noise schedule if None.
    """
    chosen = teacher_schedule(prediction.schedule) if schedule is None else schedule
    runner = _Runner(model, prediction, max_rows, mean, integer_timesteps)
    table = compile_schedule(chosen, prediction.schedule)
    empty = TeacherBank(noise, noise, conditions or {})
    target = torch.empty_like(noise, dtype=torch.promote_types(noise.dtype, torch.float32))

    def keep(_: slice, rows: slice, x: Tensor) -> None:
        target[rows] = x[0]

    runner.run([table], empty, keep)
    found = bank_fingerprint(prediction, noise, chosen, conditions, model_fingerprint)
    return replace(empty, target=target, fingerprint=found)


class TeacherObjective:
    """Scores a schedule, or a compiled table, by the RMS distance of its samples to the teacher's.

    Args:
        model: model(x, timestep, **conditions of the bank); called without gradients.
        prediction: what it predicts, and the noise schedule.
        bank: noise and target. `fidelity` of an evaluation is how many of its noises are used, from the first.
        max_rows: rows of one forward pass at most; halved for good whenever memory runs out.
        mean: mean image of analytical first steps.
        integer_timesteps: the network looks its timesteps up.

    The first evaluation, which all schedules from one starting time share, is made once for the whole bank.
    """

    def __init__(
        self,
        model: ConditionalModel,
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
        count = len(self.bank) if fidelity is None else fidelity
        if not 1 <= count <= len(self.bank):
            raise ValueError(f"fidelity = {count}: the bank has {len(self.bank)} noises")
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
        bank = self.bank.rows(slice(0, result.shape[1]))
        first = None if start is None else self._first_output(start, tables[0], bank)
        where = torch.tensor(members)

        def keep(here: slice, rows: slice, x: Tensor) -> None:
            squared = (x.double() - bank.target[rows].double()).square().flatten(2).mean(2)
            result[where[here], rows] = squared.cpu()

        self._runner.run(tables, bank, keep, first)

    def _first_output(self, start: tuple[float, float], table: SolverTable, bank: TeacherBank) -> Tensor:
        """What the network says at the start, for these first rows of the whole bank or for more."""
        known = self._first_outputs.get(start)
        if known is None or len(known) < len(bank):
            known = self._runner.first_output(table, bank)
            self._first_outputs[start] = known
        return known


class _Runner:
    """Samples tables in blocks of `max_rows` rows at most, in smaller ones once memory has run out."""

    def __init__(
        self,
        model: ConditionalModel,
        prediction: Prediction,
        max_rows: int,
        mean: Tensor | None,
        integer_timesteps: bool,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows = {max_rows} must be 1 or more")
        self.model, self.prediction, self.max_rows = model, prediction, max_rows
        self.mean, self.integer_timesteps = mean, integer_timesteps

    def run(
        self,
        tables: Sequence[SolverTable],
        bank: TeacherBank,
        keep: Callable[[slice, slice, Tensor], None],
        first: Tensor | None = None,
    ) -> None:
        """Call keep(tables, rows, x [tables, rows, ...]) for every block of tables and noises.

        Args:
            first: what the network says at the first evaluation of all tables, [n, ...]; None: ask it.
        """
        blocks = [(slice(0, len(tables)), slice(0, len(bank)))]
        while blocks:
            block = blocks.pop()
            parts = _split(*block, self.max_rows)
            if len(parts) > 1:
                blocks.extend(reversed(parts))
                continue
            here, rows = block
            chunk = bank.rows(rows)
            model = _Remembering(chunk.bind(self.model), None if first is None else first[rows])
            try:
                x = self._sample(tables[here], chunk.noise, model)
            except torch.OutOfMemoryError:
                self.max_rows = (here.stop - here.start) * len(chunk) // 2
                if self.max_rows < 1:
                    self.max_rows = 1
                    raise
                blocks.append(block)
                continue
            keep(here, rows, x)

    def first_output(self, table: SolverTable, bank: TeacherBank) -> Tensor:
        """The network's first answer [n, ...] when a table is sampled."""
        # the table cut to one evaluation: sampling it asks the network once
        one = SolverTable(
            table.weights[:2, :2], table.mean_weights[:2], table.times[:1], table.basis, table.initial_scale
        )
        heard: list[Tensor] = []
        outputs: list[Tensor] = []

        def listening(x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            heard[:] = [self.model(x, timestep, **conditions)]
            return heard[0]

        runner = _Runner(listening, self.prediction, self.max_rows, self.mean, self.integer_timesteps)
        runner.run([one], bank, lambda here, rows, x: outputs.append(heard[0]))
        self.max_rows = runner.max_rows
        return torch.cat(outputs)

    def _sample(self, tables: Sequence[SolverTable], noise: Tensor, model: Model) -> Tensor:
        with torch.inference_mode():
            return sample_many(
                model, noise, tables, self.prediction, mean=self.mean, integer_timesteps=self.integer_timesteps
            )


class _Remembering:
    """The network bound to a chunk, with its first answer where that is known."""

    def __init__(self, model: Model, first: Tensor | None) -> None:
        self.model, self.first = model, first

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self.first is None:
            return self.model(x, timestep)
        # one evaluation for all tables, or for each its own copy
        answer, self.first = self.first, None
        return answer.repeat(len(x) // len(answer), *[1] * (answer.ndim - 1))


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
