"""Distance to a many-step teacher on the same noise: an objective for solver schedules without sampling noise.

The teacher's samples are made once. A score depends on the schedule, the network and the bank alone.
"""

import hashlib
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.blocks import Blocks
from genlight.diffusion.solver.compile import SolverTable, compile_schedule
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.presets import named_schedule, preset
from genlight.diffusion.solver.serialization import fingerprint, schedule_to_json
from genlight.diffusion.solver.spacings import End, on_integers
from genlight.diffusion.solver.teacher import ConditionalModel, NetworkSampling, Sampling, TeacherBank
from genlight.search.protocols import Evaluation

TEACHER_STEPS = 100
MAX_ROWS = 1024
# the size of a batch shows in the last bits of float32 networks; a score must not depend on it
SCORE_DIGITS = 6
# starts whose first evaluation is kept, and starts that are remembered: searched ones are new without end
_KEPT_STARTS, _SEEN_STARTS = 4, 32


def teacher_schedule(
    noise_schedule: NoiseSchedule,
    steps: int = TEACHER_STEPS,
    *,
    solver: str = "dpmpp_3m_exact",
    end: End = "t_min",
    integer_times: bool = False,
) -> SolverSchedule:
    """A schedule of many steps, even in λ, that stands for the exact solution.

    Args:
        end, integer_times: those of the search space. Integer times that fall together are one, so that there may be
            fewer evaluations.
    """
    schedule = named_schedule(solver, noise_schedule, steps, end=end)
    if not integer_times:
        return schedule
    return preset(solver, noise_schedule, on_integers(schedule.times, merged=True), integer_times=True)


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
    sampling: Sampling,
    noise: Tensor,
    *,
    schedule: SolverSchedule | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    model_fingerprint: str = "",
    max_rows: int = MAX_ROWS,
) -> TeacherBank:
    """Sample the teacher, in smaller chunks where memory runs out; the bank has the fingerprint of `bank_fingerprint`.

    `schedule` is `teacher_schedule` of the noise schedule if None.
    """
    prediction = sampling.prediction
    chosen = teacher_schedule(prediction.schedule) if schedule is None else schedule
    table = compile_schedule(chosen, prediction.schedule)
    bank = TeacherBank.of(sampling, noise, table, conditions=conditions, batch_rows=max_rows)
    return replace(bank, fingerprint=bank_fingerprint(prediction, noise, chosen, conditions, model_fingerprint))


def rms_evaluation(mean_squared_error: float) -> Evaluation:
    """The score of a candidate: the root, in as many digits as do not depend on how noises were batched."""
    return Evaluation(_rounded(math.sqrt(mean_squared_error)))


class TeacherObjective:
    """Scores a schedule, or a compiled table, by the RMS distance of its samples to the teacher's.

    Args:
        sampling: what samples, without gradients.
        bank: noise and target. `fidelity` of an evaluation is how many of its noises are used, from the first.
        max_rows: rows of one forward pass at most; fewer for good whenever memory runs out.

    Where a network is sampled, the first evaluation of schedules with one starting time is made once for the whole
    bank and kept for a while.
    """

    def __init__(self, sampling: Sampling, bank: TeacherBank, *, max_rows: int = MAX_ROWS) -> None:
        self.sampling, self.bank = sampling, bank
        self._blocks = Blocks(max_rows)
        self._first_outputs: OrderedDict[_Start, Tensor] = OrderedDict()
        self._seen: deque[_Start | None] = deque(maxlen=_SEEN_STARTS)

    @property
    def prediction(self) -> Prediction:
        """Of the sampling."""
        return self.sampling.prediction

    @property
    def max_rows(self) -> int:
        """Rows of one forward pass at most, by now."""
        return self._blocks.max_rows

    def evaluate(self, candidate: SolverSchedule | SolverTable, fidelity: int) -> Evaluation:
        """The RMS distance over `fidelity` noises; NaN or infinite where the samples are."""
        return self.evaluate_many([candidate], fidelity)[0]

    def evaluate_many(self, candidates: Sequence[SolverSchedule | SolverTable], fidelity: int) -> list[Evaluation]:
        """One evaluation for each candidate, in shared forward passes."""
        return [rms_evaluation(value) for value in self.errors(candidates, fidelity).mean(dim=1).tolist()]

    @torch.inference_mode()
    def errors(self, candidates: Sequence[SolverSchedule | SolverTable], fidelity: int | None = None) -> Tensor:
        """Mean squared error of each candidate on each noise, float64 [candidates, fidelity] on the CPU.

        Raises ValueError for a fidelity beyond the bank, or a schedule with no meaning on the noise schedule.
        """
        count = len(self.bank) if fidelity is None else fidelity
        if not 1 <= count <= len(self.bank):
            raise ValueError(f"fidelity = {count}: the bank has 1 to {len(self.bank)} noises")
        tables = [
            candidate if isinstance(candidate, SolverTable) else compile_schedule(candidate, self.prediction.schedule)
            for candidate in candidates
        ]
        result = torch.empty(len(tables), count, dtype=torch.float64)
        groups: dict[tuple[object, ...], list[int]] = {}
        starts = self._shared_starts(tables)
        for index, (table, start) in enumerate(zip(tables, starts, strict=True)):
            groups.setdefault((table.nfe, table.basis, start), []).append(index)
        for members in groups.values():
            self._measure([tables[index] for index in members], members, starts[members[0]], result)
        return result

    def _shared_starts(self, tables: Sequence[SolverTable]) -> list["_Start | None"]:
        """The start of each table whose first evaluation is worth keeping: others have it, now or before."""
        if not isinstance(self.sampling, NetworkSampling):
            return [None] * len(tables)
        starts = [_start(table) for table in tables]
        count = Counter([*set(self._seen), *starts])
        self._seen.extend(dict.fromkeys(starts))
        return [start if count[start] > 1 or start in self._first_outputs else None for start in starts]

    def _measure(self, tables: list[SolverTable], members: list[int], start: "_Start | None", result: Tensor) -> None:
        bank = self.bank.rows(slice(0, result.shape[1]))
        first = None if start is None else self._first_output(start, tables[0], bank)
        where = torch.tensor(members)

        def sample(here: slice, rows: slice) -> Tensor:
            sampling = self.sampling
            if first is not None and isinstance(sampling, NetworkSampling):
                sampling = replace(sampling, model=_Remembering(sampling.model, first[rows]))
            return sampling(tables[here], bank.rows(rows))

        def keep(here: slice, rows: slice, x: Tensor) -> None:
            squared = (x.double() - bank.target[rows].double()).square().flatten(2).mean(2)
            result[where[here], rows] = squared.cpu()

        self._blocks.run(len(tables), len(bank), sample, keep)

    def _first_output(self, start: "_Start", table: SolverTable, bank: TeacherBank) -> Tensor:
        """What the network says at the start, for these first rows of the whole bank or for more."""
        known = self._first_outputs.pop(start, None)
        if known is None or len(known) < len(bank):
            known = self._ask_first(table, bank)
        self._first_outputs[start] = known
        while len(self._first_outputs) > _KEPT_STARTS:
            self._first_outputs.popitem(last=False)
        return known

    def _ask_first(self, table: SolverTable, bank: TeacherBank) -> Tensor:
        """The network's first answer [M, ...] when a table is sampled."""
        # the table cut to one evaluation: sampling it asks the network once
        one = SolverTable(
            table.weights[:2, :2], table.mean_weights[:2], table.times[:1], table.basis, table.initial_scale
        )
        outputs: list[Tensor] = []

        def sample(_: slice, rows: slice) -> Tensor:
            heard = _Listening(self.sampling.model)  # type: ignore[attr-defined]
            replace(self.sampling, model=heard)([one], bank.rows(rows))  # type: ignore[type-var]
            return heard.answer

        self._blocks.run(1, len(bank), sample, lambda here, rows, answer: outputs.append(answer))
        return torch.cat(outputs)


@dataclass(frozen=True)
class _Start:
    """A first evaluation that is made on the noise itself."""

    time: float
    scale: float


def _start(table: SolverTable) -> _Start | None:
    """None after an analytical first step."""
    if float(table.weights[0, 0]) != 1.0 or float(table.mean_weights[0]) != 0.0:
        return None
    return _Start(float(table.times[0]), table.initial_scale)


class _Remembering:
    """A network that knows its first answer."""

    def __init__(self, model: ConditionalModel, first: Tensor) -> None:
        self.model, self.first = model, [first]

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        if not self.first:
            return self.model(x, timestep, **conditions)
        # one evaluation for all tables, or for each its own copy
        answer = self.first.pop()
        return answer.repeat(len(x) // len(answer), *[1] * (answer.ndim - 1))


class _Listening:
    """A network whose last answer is kept."""

    answer: Tensor

    def __init__(self, model: ConditionalModel) -> None:
        self.model = model

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        self.answer = self.model(x, timestep, **conditions)
        return self.answer


def _rounded(value: float) -> float:
    return float(f"{value:.{SCORE_DIGITS}g}") if math.isfinite(value) else value
