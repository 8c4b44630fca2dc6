"""Where the rows of a text task come from: a JSONL or CSV file, or a data set of the hub; never code of theirs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genlight.errors import UserError
from genlight.io import parse_json

Row = Mapping[str, Any]


def read_rows_file(path: str | Path, key: str) -> list[Row]:
    """The rows of a .jsonl or .csv file in UTF-8, by field name; every value of a .csv file is text.

    Args:
        path: of the file.
        key: of the config that names it, for messages.

    Raises:
        UserError: missing, of another kind, not UTF-8, damaged, or without rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{key}={path}: there is no such file")
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{key}={path} must be a .jsonl or .csv file")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    # split at line feeds alone: other line separators of Unicode may stand inside a JSON text
    lines = text.split("\n")
    rows = _csv_rows(path, text) if path.suffix == ".csv" else [_json_row(path, n, x) for n, x in enumerate(lines, 1)]
    found = [row for row in rows if row]
    if not found:
        raise UserError(f"{key}={path} holds no rows")
    return found


def _json_row(path: Path, number: int, line: str) -> Row:
    if not line.strip():
        return {}
    value = parse_json(line, f"{path}, line {number}")
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number} is no JSON object")
    return value


def _csv_rows(path: Path, text: str) -> list[Row]:
    rows: list[Row] = []
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num} has another number of columns than the first line")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV: {error}") from error
    return rows


def read_hub_rows(name: str, subset: str | None, split: str, key: str) -> list[Row]:
    """The rows of one split of a data set of the hub, or of a folder that `datasets` reads.

    Raises:
        UserError: `datasets` is not installed, or finds no such data set, subset or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{key}={name} needs the package datasets: pip install datasets") from error
    try:
        found: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}={name}, subset {subset}, split {split} cannot be read: {reason}") from error
    if len(found) == 0:
        raise UserError(f"{key}={name}, subset {subset}, split {split} holds no rows")
    return list(found)
