"""The archive of a search: `history.jsonl`, append-only, which is all the state that a search has.

Its first line says what was searched; each further line is one measured candidate, in the order of their indices,
synced before the next is asked for. The lines are a function of the search alone, not of the clock, the number of
workers or how often the process died. What does depend on that stands beside it: `attempts.jsonl` notes a candidate
before it runs, so that one which takes the process down is known, and those whose scores other runs measured;
`failures/` holds tracebacks.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

from pydantic import TypeAdapter, ValidationError

from genlight import io
from genlight.errors import UserError
from genlight.search.codec import CandidateCodec, canonical_json
from genlight.search.protocols import Candidate
from genlight.search.records import FAILURE_KINDS, Failure, History, Record, Trial

HISTORY_FILE = "history.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
FAILURES_FOLDER = "failures"
VERSION = 1
_HISTORY_KIND = "search_history"
_ATTEMPTS_KIND = "search_attempts"
_LONG = 160
# of one candidate as JSON, which may hold millions of numbers (EEP: 48 layers, 64 of 128 experts)
MAX_BYTES, MAX_ENTRIES = 1 << 28, 1 << 24
_SEAL = ',"crc":"'


@dataclass(frozen=True)
class _Header:
    kind: str
    version: int
    fingerprint: dict[str, str]


@dataclass(frozen=True)
class _FailureLine:
    kind: str
    reason: str


@dataclass(frozen=True)
class _ResultLine:
    kind: Literal["result"]
    index: int
    generation: int
    key: str
    candidate: Any
    fidelity: int
    source: str
    score: float | None
    failure: _FailureLine | None
    cost: dict[str, float]
    facts: dict[str, float | int | str | None]
    seeds: tuple[int, int]


@dataclass(frozen=True)
class _AttemptLine:
    kind: Literal["started", "released", "shared"]
    indices: list[int]


_LINES: dict[str, TypeAdapter[Any]] = {
    "header": TypeAdapter(_Header),
    "result": TypeAdapter(_ResultLine),
    "attempt": TypeAdapter(_AttemptLine),
}


def seal(content: Mapping[str, Any]) -> str:
    """One line of JSON that ends with the CRC-32 of what stands before it."""
    body = canonical_json(content)
    return f'{body[:-1]}{_SEAL}{zlib.crc32(body.encode()):08x}"}}'


def unseal(line: str, where: str) -> dict[str, Any]:
    """The content of a line made by `seal`; CorruptFileError names `where` if a bit of it has changed."""
    body, mark, checksum = line.rpartition(_SEAL)
    body += "}"
    if not mark or checksum != f'{zlib.crc32(body.encode()):08x}"}}':
        raise io.CorruptFileError(f"{where} is damaged: its checksum does not fit; restore the file from a copy")
    content = io.parse_json(body, where, max_bytes=MAX_BYTES, max_entries=MAX_ENTRIES)
    if not isinstance(content, dict):
        raise io.CorruptFileError(f"{where} holds no JSON object")
    return content


class Archive(Generic[Candidate]):
    """The measured candidates of one search in one folder. Use `open`.

    Attributes:
        folder: where its files are.
        records: all measured candidates, by index.
    """

    def __init__(self, folder: Path, codec: CandidateCodec[Candidate], writable: bool) -> None:
        self.folder = folder
        self.records: list[Record[Candidate]] = []
        self._codec = codec
        self._writable = writable
        self._attempts: dict[int, int] = {}
        self._measured: set[tuple[str, int]] = set()
        self._header_line = ""
        self._attempts_begun = False

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        codec: CandidateCodec[Candidate],
        fingerprint: Mapping[str, str],
        *,
        writable: bool = True,
    ) -> "Archive[Candidate]":
        """Continue the archive in `folder`, or begin one there. A torn last line is left out; the next write cuts it.

        Args:
            folder: created if it is missing; only one writing process may hold it at a time.
            codec: reads and writes the candidates.
            fingerprint: what the scores depend on: space, objective, data, base weights, strategy, seed.
            writable: False reads only and keeps what is appended in memory, for all ranks but the first. All ranks must
                have opened it before the search begins: what is written later is not read.

        Raises:
            UserError: it belongs to another search (the differing values are shown), or is of an unknown version.
            CorruptFileError: a line inside is damaged or does not follow the one before; the message names it.
        """
        archive = cls(Path(folder), codec, writable)
        expected = dict(fingerprint)
        archive._header_line = seal({"kind": _HISTORY_KIND, "version": VERSION, "fingerprint": expected})
        history = archive.folder / HISTORY_FILE
        lines = io.read_lines(history) if history.exists() else []
        if lines:
            _check_header(lines[0], f"line 1 of {history}", _HISTORY_KIND, expected)
            for number, line in enumerate(lines[1:], start=2):
                archive._remember(archive._read_record(line, f"line {number} of {history}"), number)
        elif writable:
            io.append_line(history, archive._header_line)
        archive._read_attempts(expected)
        return archive

    def history(self) -> History[Candidate]:
        """All records, for a strategy."""
        return History(self.records)

    def is_measured(self, key: str, fidelity: int) -> bool:
        """Whether this candidate has a record at this fidelity."""
        return (key, fidelity) in self._measured

    def append(self, record: Record[Candidate]) -> None:
        """Add the next record and make it durable.

        Raises:
            RuntimeError: it is not the next one, or was measured before.
            DiskFullError: no room; the archive is as it was.
        """
        if record.index != len(self.records) or self.is_measured(record.key, record.fidelity):
            raise RuntimeError(
                f"record {record.index} ({record.key} at fidelity {record.fidelity}) cannot follow "
                f"{len(self.records)} records of {self.folder / HISTORY_FILE}"
            )
        if self._writable:
            io.append_line(self.folder / HISTORY_FILE, seal(self._to_plain(record)))
        self._remember(record, len(self.records) + 2)

    def start(self, indices: Iterable[int]) -> None:
        """Note durably that these candidates are about to run together."""
        self._note("started", list(indices))

    def release(self, indices: Iterable[int]) -> None:
        """Take back `start`: the run is ending in order, so they are not what took the process down."""
        self._note("released", list(indices))

    def share(self, indices: Iterable[int]) -> None:
        """Note durably that these candidates have the scores of other runs."""
        self._note("shared", list(indices))

    def attempts(self, index: int) -> int:
        """How often candidate `index` was started and neither recorded nor released."""
        return self._attempts.get(index, 0)

    def save_traceback(self, index: int, text: str) -> None:
        """Keep the traceback of a failed candidate for a person to read."""
        if self._writable and text:
            io.atomic_write_text(self.folder / FAILURES_FOLDER / f"{index:06d}.txt", text)

    def _note(self, kind: str, indices: list[int]) -> None:
        if self._writable:
            path = self.folder / ATTEMPTS_FILE
            if not self._attempts_begun:
                header = {**unseal(self._header_line, "the header"), "kind": _ATTEMPTS_KIND}
                io.append_line(path, seal(header))
                self._attempts_begun = True
            io.append_line(path, seal({"kind": kind, "indices": indices}))
        self._count(kind, indices)

    def _count(self, kind: str, indices: list[int]) -> None:
        for index in indices:
            self._attempts[index] = self._attempts.get(index, 0) + {"started": 1, "released": -1, "shared": 0}[kind]

    def _read_attempts(self, fingerprint: dict[str, str]) -> None:
        path = self.folder / ATTEMPTS_FILE
        lines = io.read_lines(path) if path.exists() else []
        if not lines:
            return
        _check_header(lines[0], f"line 1 of {path}", _ATTEMPTS_KIND, fingerprint)
        self._attempts_begun = True
        for number, line in enumerate(lines[1:], start=2):
            entry = _parse("attempt", line, f"line {number} of {path}")
            self._count(entry.kind, entry.indices)

    def _remember(self, record: Record[Candidate], line_number: int) -> None:
        where = f"line {line_number} of {self.folder / HISTORY_FILE}"
        before = self.records[-1].trial.generation if self.records else 0
        if record.index != len(self.records) or record.trial.generation not in (before, before + 1):
            raise io.CorruptFileError(
                f"{where} does not follow the line before: index {record.index} where {len(self.records)} is next, "
                f"generation {record.trial.generation} after {before}"
            )
        if self.is_measured(record.key, record.fidelity):
            raise io.CorruptFileError(f"{where} measures {record.key} at fidelity {record.fidelity} a second time")
        self.records.append(record)
        self._measured.add((record.key, record.fidelity))

    def _to_plain(self, record: Record[Candidate]) -> dict[str, Any]:
        trial, failure = record.trial, record.failure
        return {
            "kind": "result",
            "index": trial.index,
            "generation": trial.generation,
            "key": trial.key,
            "candidate": self._codec.to_plain(trial.candidate),
            "fidelity": trial.fidelity,
            "source": trial.source,
            "score": record.score,
            "failure": None if failure is None else {"kind": failure.kind, "reason": failure.reason},
            "cost": dict(trial.cost),
            "facts": dict(record.facts),
            "seeds": list(trial.seeds),
        }

    def _read_record(self, line: str, where: str) -> Record[Candidate]:
        entry = _parse("result", line, where)
        if (entry.score is None) != (entry.failure is not None):
            raise io.CorruptFileError(f"{where} must hold either a score or a failure")
        if entry.failure is not None and entry.failure.kind not in FAILURE_KINDS:
            raise io.CorruptFileError(f"{where}: failure kind {entry.failure.kind!r} is none of {FAILURE_KINDS}")
        try:
            candidate = self._codec.from_plain(entry.candidate)
        except ValueError as error:
            raise io.CorruptFileError(f"{where}: {error}") from None
        trial = Trial(
            entry.index,
            entry.generation,
            entry.key,
            candidate,
            entry.fidelity,
            entry.source,
            entry.cost,
            entry.seeds,
        )
        failure = None if entry.failure is None else Failure(entry.failure.kind, entry.failure.reason)
        return Record(trial, entry.score, entry.facts, failure)


def _parse(form: str, line: str, where: str) -> Any:
    content = unseal(line, where)
    try:
        return _LINES[form].validate_json(json.dumps(content), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise io.CorruptFileError(f"{where} is no {form} of version {VERSION}: {key}: {first['msg']}") from None


def _check_header(line: str, where: str, kind: str, fingerprint: dict[str, str]) -> None:
    content = unseal(line, where)
    if content.get("kind") != kind:
        raise UserError(f"{where}: kind {content.get('kind')!r} where {kind!r} is needed")
    if content.get("version") != VERSION:
        raise UserError(f"{where}: version {content.get('version')!r}; this genlight reads version {VERSION}")
    found = _parse("header", line, where).fingerprint
    if found != fingerprint:
        keys = [key for key in sorted({*found, *fingerprint}) if found.get(key) != fingerprint.get(key)]
        parts = [_difference(key, found.get(key), fingerprint.get(key)) for key in keys]
        raise UserError(f"{where} belongs to another search: {'; '.join(parts)}; use another folder")


def _difference(key: str, there: str | None, here: str | None) -> str:
    """Both values; of long ones the piece where they begin to differ."""
    if there is not None and here is not None and max(len(there), len(here)) > _LONG:
        first = next((i for i, (one, other) in enumerate(zip(there, here)) if one != other), 0)
        piece = slice(max(0, first - _LONG // 2), first + _LONG // 2)
        there, here = there[piece], here[piece]
    return f"{key} is {there!r} there and {here!r} here"


def count_records(folder: str | os.PathLike[str]) -> int:
    """How many records the archive in a folder holds; 0 where there is none."""
    file = Path(folder) / HISTORY_FILE
    return max(0, len(io.read_lines(file)) - 1) if file.is_file() else 0
