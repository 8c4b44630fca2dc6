"""JSON that a run keeps for itself and reads again: of a kind, of a version, and with its own checksum."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genlight.errors import UserError
from genlight.io.errors import CorruptFileError
from genlight.io.primitives import Path_, atomic_write_json
from genlight.io.strict_json import read_json


def write_record(path: Path_, content: Mapping[str, Any], *, kind: str, version: int) -> None:
    """Write plain values that `read_record` gives back or refuses; see `atomic_file` for what is raised.

    Raises:
        ValueError: a number is not finite.
    """
    record = {"kind": kind, "version": version, **content}
    # as a reader will find it: JSON knows no tuples
    atomic_write_json(path, {**record, "sha256": _digest(json.loads(json.dumps(record, allow_nan=False)))})


def read_record(path: Path_, *, kind: str, version: int) -> dict[str, Any]:
    """The content of a file of `write_record`, with its kind and version.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptFileError: truncated or altered.
        UserError: whole, but of another kind or version.
    """
    path = Path(path)
    record = read_json(path)
    if not isinstance(record, dict) or record.pop("sha256", None) != _digest(record):
        raise CorruptFileError(f"{path} is altered: its SHA-256 differs from the one it states; delete it to go on")
    if (record.get("kind"), record.get("version")) != (kind, version):
        raise UserError(f"{path} is no {kind} of version {version}: delete it to make it again")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
