"""Proofs: the record of an experiment that shows a claim on real data."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from genlight.errors import UserError
from genlight.io import atomic_write_json, read_json
from genlight.reports.environment import environment
from genlight.reports.report import STRICT

_ID = re.compile(r"[a-z0-9][a-z0-9.\-]*")


@dataclass(frozen=True)
class Bar:
    """One claim: what was measured, its value, the bar it had to reach in words ("≤ 1.5"), and whether it holds."""

    __pydantic_config__ = STRICT
    id: str
    what: str
    value: float | str
    bar: str
    holds: bool


@dataclass(frozen=True)
class Proof:
    """The content of docs/results/<name>.json. A bar that fails stays in the file as it fell."""

    __pydantic_config__ = STRICT
    command: str
    date: str
    git_revision: str | None
    machine: dict[str, JsonValue]
    versions: dict[str, str]
    seeds: list[int]
    wall_seconds: float
    bars: list[Bar]
    table: list[dict[str, JsonValue]]


@cache
def _adapter() -> TypeAdapter[Proof]:
    return TypeAdapter(Proof)


def bar_at_most(id: str, what: str, value: float, limit: float) -> Bar:
    """A bar that holds when ``value`` ≤ ``limit``; a value that is not a number never holds."""
    return Bar(id, what, value, f"≤ {limit:g}", value <= limit)


def bar_at_least(id: str, what: str, value: float, limit: float) -> Bar:
    """A bar that holds when ``value`` ≥ ``limit``."""
    return Bar(id, what, value, f"≥ {limit:g}", value >= limit)


def write_proof(
    path: str | Path,
    *,
    bars: Sequence[Bar],
    seeds: Sequence[int],
    wall_seconds: float,
    table: Sequence[dict[str, Any]] = (),
    command: Sequence[str] | None = None,
) -> Proof:
    """Writes a proof with the environment of this process.

    Args:
        path: docs/results/<name>.json.
        bars: the claims.
        seeds: of the runs behind them.
        wall_seconds: of all of it, on a monotonic clock.
        table: rows of equal keys, shown as they are.
        command: the words that repeat it; this process's own by default.

    Raises:
        ValueError: two bars of one id, an id that is no plain name, or a number that is not finite.
    """
    ids = [bar.id for bar in bars]
    if len(set(ids)) != len(ids) or not all(_ID.fullmatch(name) for name in ids):
        raise ValueError(f"{path}: bars need different ids of small letters, digits, dots and dashes, got {ids}")
    record = environment(command if command is not None else _own_command())
    del record["git_dirty"]
    proof = Proof(**record, seeds=list(seeds), wall_seconds=wall_seconds, bars=list(bars), table=list(table))
    atomic_write_json(path, asdict(_checked(asdict(proof), path)))
    return proof


def read_proof(path: str | Path) -> Proof:
    """Reads one file of docs/results.

    Raises:
        UserError: it is not a proof.
    """
    try:
        return _checked(read_json(path), path)
    except ValueError as error:
        raise UserError(str(error)) from None


def _checked(record: Any, path: str | Path) -> Proof:
    try:
        return _adapter().validate_python(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _own_command() -> list[str]:
    return ["python", *sys.argv]
