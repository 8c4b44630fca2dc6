"""Candidates as JSON, strictly, and the canonical key that tells two of them apart."""

import dataclasses
import hashlib
import json
from typing import Any, Generic

from pydantic import TypeAdapter, ValidationError

from genlight.search.protocols import Candidate


def canonical_json(value: Any) -> str:
    """JSON text with sorted keys and nothing superfluous: equal values, equal text.

    Raises:
        ValueError: a number is not finite.
        TypeError: a value has no form in JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def canonical_key(candidate: Any, *, digits: int | None = None) -> str:
    """Sixteen hexadecimal digits that name a candidate.

    Args:
        candidate: a dataclass of plain values, or plain values.
        digits: decimals that count in real numbers; all of them if None.
    """
    plain = dataclasses.asdict(candidate) if _is_dataclass_instance(candidate) else candidate
    return hashlib.sha256(canonical_json(_rounded(plain, digits)).encode()).hexdigest()[:16]


def _is_dataclass_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _rounded(value: Any, digits: int | None) -> Any:
    if isinstance(value, float):
        # + 0.0 makes one of the two zeros
        return (value if digits is None else round(value, digits)) + 0.0
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value


class CandidateCodec(Generic[Candidate]):
    """Writes and reads the candidates of one type."""

    def __init__(self, candidate_type: type[Candidate]) -> None:
        self.candidate_type = candidate_type
        self._adapter: TypeAdapter[Candidate] = TypeAdapter(candidate_type)

    def to_plain(self, candidate: Candidate) -> Any:
        """The candidate as plain values, checked to come back as it is: what was evaluated is what is archived.

        Raises:
            TypeError: it is of another type, or does not survive the way to JSON and back.
        """
        if type(candidate) is not self.candidate_type:
            raise TypeError(f"expected a {self.candidate_type.__name__}, got {type(candidate).__name__}: {candidate!r}")
        plain = self._adapter.dump_python(candidate, mode="json")
        try:
            same = self.from_plain(plain) == candidate
        except ValueError as error:
            raise TypeError(f"{candidate!r} has no form in JSON: {error}") from None
        if not same:
            raise TypeError(f"{candidate!r} comes back from JSON as another candidate; use frozen plain values")
        return plain

    def from_plain(self, plain: Any) -> Candidate:
        """The candidate that plain values describe.

        Raises:
            ValueError: missing, unknown or wrong values; the message names them.
        """
        try:
            return self._adapter.validate_json(canonical_json(plain), strict=True, extra="forbid")
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=True)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise ValueError(
                f"not a {self.candidate_type.__name__}: {where}: {first['msg']}, got {first['input']!r}"
            ) from None
