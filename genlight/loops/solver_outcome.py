"""What a search of solver schedules found for one number of evaluations, kept so that a resumed run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from genlight import io
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.serialization import TableRecord

_KIND = "solver_outcome"
_VERSION = 2


@dataclass(frozen=True)
class SolverOutcome:
    """Schedules and tables for one number of evaluations, by the step of the method that gave them.

    Attributes:
        nfe: network evaluations.
        baseline_name, baseline: the hand-made schedule that is best on the select noise.
        best_baselines: further hand-made ones that came near, by name.
        evolved: the best schedule of the search, chosen on the select noise.
        schedule: after its times and factors were refined; the result in decisions.
        table: after its weights were tuned; None without tuning.
        rivals: what other methods gave, by name.
        select: the scores on the select noise, by what was measured.
    """

    nfe: int
    baseline_name: str
    baseline: SolverSchedule
    best_baselines: dict[str, SolverSchedule]
    evolved: SolverSchedule
    schedule: SolverSchedule
    table: TableRecord | None = None
    rivals: dict[str, SolverSchedule] = field(default_factory=dict)
    select: dict[str, float] = field(default_factory=dict)
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def solver_table(self) -> SolverTable | None:
        """The tuned table."""
        return None if self.table is None else self.table.table()


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(SolverOutcome)


def outcome_fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def save_outcome(path: Path, outcome: SolverOutcome, fingerprint: str) -> None:
    """Write it, with the fingerprint of what it depends on."""
    io.write_record(path, {"fingerprint": fingerprint, "outcome": asdict(outcome)}, kind=_KIND, version=_VERSION)


def load_outcome(path: Path, fingerprint: str) -> SolverOutcome | None:
    """What `save_outcome` wrote; None if there is none, or the search went further since.

    Raises:
        CorruptFileError: damaged.
        UserError: of an unknown version.
    """
    if not path.is_file():
        return None
    content = io.read_record(path, kind=_KIND, version=_VERSION)
    if content.get("fingerprint") != fingerprint:
        return None
    found: SolverOutcome = _adapter().validate_json(json.dumps(content["outcome"]))
    return found
