"""JSON that others may have written: checked for size, depth, duplicate keys and numbers that are not finite."""

import json
import math
import os
import re
from array import array
from itertools import accumulate
from pathlib import Path
from typing import Any

from genlight.io.errors import CorruptFileError

MAX_BYTES = 8 * 1024 * 1024
MAX_DEPTH = 64
MAX_ENTRIES = 200_000
# A text that never ends is taken to the end of the file: one pass, whatever the input.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
# An opening bracket becomes the byte 1, a closing one -1; all other bytes are deleted.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AT_ONCE = 10_000


def read_json(
    path: str | os.PathLike[str],
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_entries: int = MAX_ENTRIES,
) -> Any:
    """Read one JSON file, strictly; hostile input is refused before it costs memory.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: too large or too deep, not JSON, a duplicate key, or a number that is not finite.
    """
    path = Path(path)
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    return parse_json(data, str(path), max_bytes=max_bytes, max_depth=max_depth, max_entries=max_entries)


def parse_json(
    data: bytes | str,
    name: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_entries: int = MAX_ENTRIES,
) -> Any:
    """Parse JSON text under the rules of `read_json`; `name` is what the errors call it."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > max_bytes:
        raise CorruptFileError(f"{name} is longer than {max_bytes:,} bytes, the limit for JSON here")
    # Commas inside texts count too: an upper bound that needs no parsing.
    if raw.count(b",") > max_entries:
        raise CorruptFileError(f"{name} has more than {max_entries:,} entries, the limit for JSON here")
    _check_depth(raw, name, max_depth)
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{name} is not valid JSON: {error}") from None


def _check_depth(raw: bytes, name: str, max_depth: int) -> None:
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    bare = _STRING.sub(b"", raw)
    # passes in C: a loop over the brackets of a wide text would take a tenth of a second
    steps, depth = array("b", bare.translate(_STEPS, _NO_BRACKETS)), 0
    for start in range(0, len(steps), _AT_ONCE):
        depths = list(accumulate(steps[start : start + _AT_ONCE], initial=depth))
        if max(depths) > max_depth:
            raise CorruptFileError(f"{name} is nested deeper than {max_depth} levels, the limit for JSON here")
        depth = depths[-1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value
