"""Solver schedules and tables as JSON: strict, versioned, and tied to the noise schedule they were made for."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import torch

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.decisions import (
    LinearScale,
    PredictionSpace,
    Scale,
    SolverSchedule,
    StepDecision,
)
from genlight.diffusion.solver.levels import half_log_snrs_of

KIND: Literal["genlight.solver_bank"] = "genlight.solver_bank"
VERSION = 1
# two schedules whose λ agree to this are one candidate of a search
KEY_RESOLUTION = 1e-3


def fingerprint(prediction: Prediction) -> str:
    """SHA-256 (hex) of what a schedule is made for: the noise schedule and what the network predicts."""
    text = f"{prediction.schedule.fingerprint()}/{prediction.prediction_type}"
    return hashlib.sha256(text.encode()).hexdigest()


def schedule_to_json(schedule: SolverSchedule) -> str:
    """The schedule as canonical JSON: equal schedules give equal text."""
    return _canonical(asdict(schedule))


def schedule_from_json(text: str | bytes) -> SolverSchedule:
    """The schedule in a JSON text.

    Raises ValueError, with the field, for unknown fields, numbers that are not finite and decisions that are not valid.
    """
    result: SolverSchedule = _read(SolverSchedule, text, "solver schedule")
    return result


def canonical_key(
    schedule: SolverSchedule,
    noise_schedule: NoiseSchedule,
    resolution: float = KEY_RESOLUTION,
    *,
    steps: Sequence[StepDecision] | None = None,
) -> str:
    """SHA-256 (hex) of a schedule for finding duplicates.

    Equal for schedules that differ in λ by rounding to `resolution` only, in the domain of their times, in the order of
    points, and in trailing factors of 1. `schedule_to_json` is the exact form. `steps` take the place of
    `schedule.steps`.
    """
    half_log_snrs = half_log_snrs_of(schedule, noise_schedule)
    content = {
        "times": [_rounded(value, resolution) for value in half_log_snrs],
        "afs": schedule.afs,
        "steps": [_key_content(step) for step in (schedule.steps if steps is None else steps)],
    }
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


@dataclass(frozen=True)
class TableRecord:
    """A `SolverTable` as plain numbers, for tables that no decisions describe (fine-tuned ones)."""

    weights: tuple[tuple[float, ...], ...]
    mean_weights: tuple[float, ...]
    times: tuple[float, ...]
    basis: PredictionSpace
    initial_scale: float
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False, "strict": True}

    def __post_init__(self) -> None:
        if len({len(row) for row in self.weights}) != 1:
            raise ValueError("weights: the rows differ in length")
        self.table()

    def table(self) -> SolverTable:
        """The table, checked."""
        weights, mean_weights, times = (
            torch.tensor(values, dtype=torch.float64) for values in (self.weights, self.mean_weights, self.times)
        )
        return SolverTable(weights, mean_weights, times, self.basis, self.initial_scale)

    @classmethod
    def of(cls, table: SolverTable) -> "TableRecord":
        """The record of a table, without its gradients."""
        return cls(
            tuple(tuple(row) for row in table.weights.detach().tolist()),
            tuple(table.mean_weights.detach().tolist()),
            tuple(table.times.detach().tolist()),
            table.basis,
            float(table.initial_scale),
        )


@dataclass(frozen=True)
class SolverBank:
    """Schedules for several numbers of evaluations, made for one noise schedule and prediction type.

    Args:
        family, prediction_type, noise_schedule, fingerprint: of the problem; see `SolverBank.of`.
        schedules: by number of evaluations.
        tables: fine-tuned tables by number of evaluations; where there is none the schedule is compiled.
    """

    family: Literal["vp", "edm", "flow"]
    prediction_type: str
    noise_schedule: dict[str, bool | int | float | str]
    fingerprint: str
    schedules: dict[int, SolverSchedule]
    tables: dict[int, TableRecord] = field(default_factory=dict)
    kind: Literal["genlight.solver_bank"] = KIND
    version: int = VERSION
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version = {self.version}; this release reads version {VERSION}")
        for nfe, schedule in self.schedules.items():
            if schedule.nfe != nfe:
                raise ValueError(f"schedules.{nfe}: this schedule makes {schedule.nfe} evaluations")
        for nfe, record in self.tables.items():
            if record.table().nfe != nfe:
                raise ValueError(f"tables.{nfe}: this table makes {record.table().nfe} evaluations")

    @classmethod
    def of(cls, prediction: Prediction, schedules: Mapping[int, SolverSchedule]) -> "SolverBank":
        """The bank of schedules made for `prediction`."""
        noise_schedule = prediction.schedule
        return cls(
            noise_schedule.family,
            prediction.prediction_type,
            noise_schedule.definition(),
            fingerprint(prediction),
            dict(schedules),
        )

    def schedule(self, nfe: int) -> SolverSchedule:
        """The schedule with `nfe` evaluations; ValueError lists those there are, none is resampled."""
        if nfe not in self.schedules:
            raise ValueError(f"num_inference_steps = {nfe}: the bank has schedules for {_numbers(self.schedules)} only")
        return self.schedules[nfe]

    def check(self, prediction: Prediction) -> None:
        """Raise ValueError if the bank was made for another noise schedule or prediction type, saying which."""
        wanted = SolverBank.of(prediction, {})
        for name in ("family", "prediction_type", "noise_schedule", "fingerprint"):
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine != theirs:
                raise ValueError(f"solver bank: made for {name} = {mine!r}, but the model has {theirs!r}")

    def to_json(self) -> str:
        """Canonical JSON."""
        return _canonical(asdict(self))


def bank_from_json(text: str | bytes) -> SolverBank:
    """The bank in a JSON text.

    Raises ValueError, with the field, for another kind or version and for everything that `schedule_from_json` refuses.
    """
    result: SolverBank = _read(SolverBank, text, "solver bank")
    return result


def _rounded(value: float, resolution: float) -> int | str:
    if abs(value) == float("inf"):
        return "clean" if value > 0 else "noise"
    return round(value / resolution)


def _key_content(step: StepDecision) -> dict[str, Any]:
    """The fields with sorted points and without trailing factors of 1; explicit weights stay with their points."""
    corrector = step.corrector
    content = {**vars(step), "scales": _plain_scales(step.scales)}
    if step.weights is None:
        content["points"] = _sorted(step.points)
    if corrector is not None:
        content["corrector"] = {**vars(corrector), "scales": _plain_scales(corrector.scales)}
        if corrector.weights is None:
            content["corrector"]["points"] = _sorted(step.corrector_points())
    return content


def _sorted(sets: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(points, reverse=True)) for points in sets)


def _plain_scales(scales: tuple[Scale, ...]) -> list[Any]:
    """Without trailing factors of 1, as plain values."""
    while scales and scales[-1] == 1.0:
        scales = scales[:-1]
    return [{"omega": scale.omega} if isinstance(scale, LinearScale) else scale for scale in scales]


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


@cache
def _adapter(cls: type) -> Any:
    # pydantic takes a third of a second to import; most uses of a solver read no file
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _read(cls: type, text: str | bytes, name: str) -> Any:
    from pydantic import ValidationError

    from genlight.io import CorruptFileError, parse_json

    try:
        parse_json(text, name)  # duplicate keys, size, depth
    except CorruptFileError as error:
        raise ValueError(str(error)) from None
    try:
        return _adapter(cls).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{name}{': ' + where if where else ''}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _numbers(values: Mapping[int, Any]) -> str:
    return ", ".join(str(value) for value in sorted(values)) or "no numbers"
