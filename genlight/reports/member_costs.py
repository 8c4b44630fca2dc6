"""What one call of each member of a zoo costs, as `latency.json` keeps it: what was measured, and the numbers."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from genlight.errors import UserError
from genlight.io import CorruptFileError, atomic_write_json, read_json

Unit = Literal["ms", "macs"]
KIND: Literal["genlight.member_costs"] = "genlight.member_costs"
VERSION = 2
# share by which the work of a sample may differ between batches of different size
_SAME_WORK = 0.01
_STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call.

    Attributes:
        median_ms, iqr_ms: median and interquartile range.
        repeats: calls measured.
        threads: of torch on a CPU, None on a GPU.
    """

    median_ms: float
    iqr_ms: float
    repeats: int
    threads: int | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT


@dataclass(frozen=True)
class MemberCost:
    """What one member costs: `macs` are multiply-accumulates for a sample, `bytes` those of parameters and buffers."""

    macs: int
    parameters: int
    bytes: int
    latency: Latency | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT


@dataclass(frozen=True)
class CostKey:
    """What costs were measured for: `shape` and `dtype` are those of the network's input without its batch."""

    batch_size: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    torch: str
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT


@dataclass(frozen=True)
class MemberCosts:
    """Costs of all members of a zoo, by name, in the order of the zoo.

    Attributes:
        unit: "ms" for latency, "macs" for work in units of the member with the most.
        members: by name.
        switch_ms: milliseconds that a change of member adds, 0 where the measurement does not show any.
        key: what was measured.
        evaluation_ms: milliseconds that an evaluation takes beside its network, for the solver and the loop around it.
        batch_ms: milliseconds that a batch takes beside its evaluations.
        notes: what makes the numbers doubtful, in words.
    """

    unit: Unit
    members: dict[str, MemberCost]
    switch_ms: float
    key: CostKey
    evaluation_ms: float = 0.0
    batch_ms: float = 0.0
    notes: tuple[str, ...] = ()
    kind: Literal["genlight.member_costs"] = KIND
    version: int = VERSION
    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"version = {self.version}; this release reads version {VERSION}")
        if not self.members:
            raise ValueError("members: at least one is needed")
        for name, member in self.members.items():
            if self.unit == "ms" and member.latency is None:
                raise ValueError(f"members.{name}.latency: unit = 'ms' needs it")

    @property
    def costs(self) -> dict[str, float]:
        """Cost of one evaluation by name: milliseconds, or multiply-accumulates as shares of the largest member's."""
        if self.unit == "macs":
            most = max(member.macs for member in self.members.values())
            return {name: member.macs / most for name, member in self.members.items()}
        beside = self.evaluation_ms
        return {name: member.latency.median_ms + beside for name, member in self.members.items() if member.latency}

    @property
    def switch(self) -> float:
        """Cost of a change of member, in the unit of `costs`; work knows none."""
        return self.switch_ms if self.unit == "ms" else 0.0

    @property
    def batch(self) -> float:
        """Cost of a batch beside its evaluations, in the unit of `costs`; it is the same for all schedules."""
        return self.batch_ms if self.unit == "ms" else 0.0

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything in it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, wanted: CostKey) -> None:
        """Refuse costs that were measured for something else; another version of torch is only a warning.

        Raises:
            UserError: another batch size, shape, type or device; for unit "macs" another shape only.
        """
        for name in ("shape",) if self.unit == "macs" else ("batch_size", "shape", "dtype", "device"):
            mine, theirs = getattr(self.key, name), getattr(wanted, name)
            if mine != theirs:
                raise UserError(
                    f"costs of members: measured for {name} = {mine!r}, but this run has {theirs!r}; measure them again"
                )
        if self.unit == "ms" and self.key.torch != wanted.torch:
            warnings.warn(f"costs of members: measured with torch {self.key.torch}, not {wanted.torch}", stacklevel=2)


def check_work(given: MemberCosts, now: MemberCosts) -> None:
    """Refuse costs of other networks under the names of these, or of these with another guidance.

    Args:
        given: what was measured before.
        now: the work of the members as they are; a member that fails is not in it.

    Raises:
        UserError: another number of parameters, or work for a sample that differs by more than 1 %.
    """
    for name, own in now.members.items():
        before = given.members[name]
        if before.parameters != own.parameters or abs(before.macs - own.macs) > _SAME_WORK * own.macs:
            raise UserError(
                f"costs of members: measured for a {name} of {before.parameters} parameters and {before.macs} "
                f"multiply-accumulates, but this one has {own.parameters} and {own.macs}; measure them again"
            )


def write_costs(path: str | Path, costs: MemberCosts) -> None:
    """Write `latency.json`: everything with its fingerprint."""
    atomic_write_json(path, {**asdict(costs), "fingerprint": costs.fingerprint})


def read_costs(path: str | Path, wanted: CostKey | None = None) -> MemberCosts:
    """What `write_costs` wrote.

    Args:
        wanted: what the costs are to be used for, see `MemberCosts.check`.

    Raises:
        UserError: no such file, not of this kind or version, changed since, or measured for something else.
    """
    try:
        content = read_json(path)
        fingerprint = content.pop("fingerprint", None) if isinstance(content, dict) else None
        costs = _parsed(content)
    except (OSError, CorruptFileError, ValueError) as error:
        raise UserError(f"costs of members: {path}: {error}") from None
    if fingerprint != costs.fingerprint:
        raise UserError(
            f"costs of members: {path} has fingerprint {fingerprint}, its content {costs.fingerprint}: the file was "
            "changed; measure them again"
        )
    if wanted is not None:
        costs.check(wanted)
    return costs


def read_begun_costs(path: Path, wanted: CostKey) -> MemberCosts:
    """What an earlier start of a search left, to go on with; torch may be another version.

    Raises:
        UserError: as `read_costs`; latencies were measured for something else.
    """
    found = read_costs(path)
    if found.unit == "ms":
        try:
            found.check(replace(wanted, torch=found.key.torch))
        except UserError as error:
            raise UserError(
                f"the search began with the latencies in {path}, {error}: go on where it began, or choose another "
                "run.name"
            ) from error
    return found


def _parsed(content: Any) -> MemberCosts:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(MemberCosts).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}") from None
