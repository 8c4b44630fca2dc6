"""One run, one folder, one process: who holds it, what it is a run of, and how it ended.

A kernel lock keeps a second process out and is freed when its holder dies. `run.json` records the command and the
resolved config with secrets masked; it is read back only to compare and to report, never to build anything.
"""

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from genlight import io
from genlight.errors import UserError
from genlight.secrets import masked, masked_override

RUN_FILE = "run.json"
OWNER_FILE = "owner.json"
LOCK_FILE = ".lock"
STATUSES = ("running", "finished", "failed", "interrupted")
_KIND = "run"
_VERSION = 1
ERROR_FILE = "error.log"
_NOT_A_RUN = {LOCK_FILE, OWNER_FILE, ".hydra"}
# where the run that another one replaces waits inside of its folder: on the way there or back, and as a whole
_ON_THE_WAY, _ASIDE, _TO_GO = ".replacing", ".replaced", ".replaced.tmp-old"
# of a config, what is written rather than read
_WRITTEN = ("run", "callbacks", "logger")
_ABSENT = "(absent)"
# A lock that is garbage collected is let go: a folder stays held until `close`, even if nobody keeps the object.
_held: dict[int, Any] = {}


class OtherConfigError(UserError):
    """A run cannot be resumed with this config."""


class RunFolder:
    """The folder of one run, held by this process. Use `open`, then `close`, or a `with` block.

    Attributes:
        path: the folder.
        resumed: whether it continues an earlier run.
        earlier: the config of that run, as it was recorded.
        replaces: whether an earlier run lies aside, which comes back unless this one begins.
        fingerprint: hash of the config, without the ignored keys and the values of secrets.
    """

    def __init__(
        self, path: Path, lock: Any, record: dict[str, Any], earlier: dict[str, Any] | None, replaces: bool
    ) -> None:
        self.path = path
        self.resumed = earlier is not None
        self.earlier = earlier
        self.replaces = replaces
        self._lock = lock
        _held[id(lock)] = lock
        self._record = record

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        command: Sequence[str],
        config: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        ignore_keys: Iterable[str] = (),
    ) -> "RunFolder":
        """Take a folder for one run and record it as running.

        Args:
            path: the folder, created where it is missing. Make it with `run_path` if its name comes from the user.
            command: the command line, word by word.
            config: the resolved config, plain values only.
            resume: continue the run that is there; an empty folder starts a new one.
            overwrite: replace the run that is there; it lies aside until `begin`.
            ignore_keys: dotted keys that a resumed run may change, e.g. "resume" or "trainer.max_steps"; a key covers
                all below it.

        Raises:
            UserError: another process holds the folder, it is occupied, or `config` names a path in the run that
                `overwrite` would replace.
            OtherConfigError: `resume` meets another config; the message shows the first differing keys.
            CorruptFileError: its run.json is not whole.
        """
        if resume and overwrite:
            raise UserError("resume=true and run.overwrite=true exclude each other: continue the run or replace it")
        path = io.create_folder(path)
        lock = _take_lock(path)
        try:
            plain = _plain(masked(dict(config)))
            record = _new_record([masked_override(word) for word in command], plain, tuple(ignore_keys))
            if _put_back(path) and resume:
                raise UserError(
                    f"what was to replace the run in {path} ended before it had begun, and the earlier run is back: "
                    "repeat the command with run.overwrite=true, or with resume=true to go on with the earlier one"
                )
            old = _old_record(path, resume, overwrite)
            if old is not None and resume:
                _check_same_config(path, old, record, tuple(ignore_keys))
                record["created"] = old["created"]
                record["earlier"] = [
                    *old["earlier"],
                    {key: old[key] for key in ("command", "started", "ended", "status")},
                ]
            io.remove_leftovers(path)
            replaces = old is not None and overwrite
            if replaces:
                _check_reads_nothing_of(path, plain)
                _put_aside(path)
            io.atomic_write_json(path / OWNER_FILE, _owner())
            io.atomic_write_json(path / RUN_FILE, record)
            return cls(path, lock, record, old["config"] if old is not None and resume else None, replaces)
        except BaseException:
            with suppress(UserError, OSError):  # else it comes back when the folder is opened again
                _put_back(path)
            lock.release()
            raise

    @property
    def fingerprint(self) -> str:
        return str(self._record["fingerprint"])

    def begin(self) -> None:
        """From now on this run counts: the one that it replaces is removed. A second call does nothing."""
        if self.replaces:
            io.rename(self.path / _ASIDE, self.path / _TO_GO)  # half of it must never come back
            self.replaces = False
            io.remove_path(self.path / _TO_GO)

    def close(self, status: str = "finished") -> None:
        """Record how the run ended ("finished", "failed" or "interrupted") and let go of the folder. A second call does
        nothing. Unless this run has begun or is finished, the one that it replaces is put back.

        Raises:
            ValueError: an unknown status.
        """
        if status not in STATUSES:
            raise ValueError(f"a run is one of {', '.join(STATUSES)}, got {status!r}")
        if not self._lock.is_locked:
            return
        try:
            if status == "finished":
                self.begin()
            if self.replaces:
                _put_back(self.path)
            else:
                self._record = {**self._record, "status": status, "ended": _now()}
                io.atomic_write_json(self.path / RUN_FILE, self._record)
        finally:
            self._lock.release()
            _held.pop(id(self._lock), None)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_stop = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("finished" if kind is None else "interrupted" if is_stop else "failed")


def run_path(root: str | os.PathLike[str], name: str) -> Path:
    """The folder of the run `name` below `root`.

    Raises:
        UserError: the name would lead out of `root`, or is longer than a file system takes.
    """
    if not isinstance(name, str) or not 0 < len(name) <= 200:
        raise UserError(f"run.name must be a text of 1 to 200 characters, got {name!r}")
    try:
        return io.resolve_below(root, name)
    except UserError as error:
        raise UserError(f"run.name: {error}") from None


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of a run folder, as data.

    Raises:
        CorruptFileError: there is none, or it is not whole.
        UserError: written by a newer version.
    """
    file = Path(path) / RUN_FILE
    if not file.is_file():
        raise io.CorruptFileError(f"{path} has no {RUN_FILE}: it is not a run folder of genlight")
    record = io.read_json(file)
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise io.CorruptFileError(f"{file} is not the record of a run")
    if record.get("version") != _VERSION:
        raise UserError(f"{file} has version {record.get('version')!r}; version {_VERSION} is known here")
    if not set(_new_record([], {}, ())) <= set(record):
        raise io.CorruptFileError(f"{file} lacks fields of a run")
    return record


def process_rank(environ: Mapping[str, str] | None = None) -> int:
    """The rank that torchrun, SLURM or Lightning's launcher gave this process; 0 where none did. Only rank 0 opens the
    run folder."""
    environ = os.environ if environ is None else environ
    for name in ("RANK", "SLURM_PROCID"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    local = environ.get("LOCAL_RANK", "")
    return int(local) if local.isdigit() else 0


def config_fingerprint(config: Mapping[str, Any], ignore_keys: Iterable[str] = ()) -> str:
    """SHA-256 of a config, independent of the order of its keys, without the ignored ones."""
    text = json.dumps(_flat(config, tuple(ignore_keys)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore_keys: Iterable[str] = ()) -> list[str]:
    """The keys in which a config is not the one of a record, with both values, in alphabetical order."""
    ignore = tuple(ignore_keys)
    one, other = _flat(before, ignore), _flat(_plain(now), ignore)
    keys = sorted(key for key in one.keys() | other.keys() if one.get(key, _ABSENT) != other.get(key, _ABSENT))
    return [f"{key}: was {one.get(key, _ABSENT)!r}, now {other.get(key, _ABSENT)!r}" for key in keys]


def _flat(value: Any, ignore: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; lists by index, so that the first differing entry can be shown."""
    if any(prefix == key or prefix.startswith(key + ".") for key in ignore):
        return {}
    pairs: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping) and value:
        pairs = value.items()
    elif isinstance(value, list | tuple) and value:
        pairs = enumerate(value)
    elif not prefix:
        return {}
    else:
        return {prefix: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for key, inner in pairs:
        flat |= _flat(inner, ignore, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _plain(value: Any) -> Any:
    """The same value in what JSON can hold; what it has no form for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _take_lock(path: Path) -> Any:
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_FILE, timeout=0.5, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{path} is in use by {_owner_named(path)}: wait for it, stop it, or choose another run.name"
        ) from None
    return lock


def _owner() -> dict[str, Any]:
    return {"kind": "owner", "version": 1, "host": platform.node(), "pid": os.getpid(), "started": _now()}


def _owner_named(path: Path) -> str:
    try:
        owner = io.read_json(path / OWNER_FILE)
        return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
    except (OSError, io.CorruptFileError, KeyError, TypeError):
        return "another process that has just started"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_record(command: list[str], config: dict[str, Any], ignore: tuple[str, ...]) -> dict[str, Any]:
    now = _now()
    return {
        "kind": _KIND,
        "version": _VERSION,
        "fingerprint": config_fingerprint(config, ignore),
        "status": "running",
        "command": command,
        "created": now,
        "started": now,
        "ended": None,
        "earlier": [],
        "config": config,
    }


def _old_record(path: Path, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The run that is in the folder, or None where it is free; refuses what neither flag allows."""
    if not (path / RUN_FILE).exists():
        others = sorted(
            inner.name for inner in path.iterdir() if inner.name not in _NOT_A_RUN and not _is_leftover(inner)
        )
        if others:
            raise UserError(
                f"{path} holds files that are no run of genlight ({', '.join(others[:3])}): choose another run.name"
            )
        return None
    if overwrite:
        return {}
    record = read_run(path)
    if not resume:
        raise UserError(
            f"{path} holds a run already (status {record['status']}, started {record['started']}): "
            "add resume=true to continue it, run.overwrite=true to replace it, or choose another run.name"
        )
    return record


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and ".tmp-" in path.name


def _check_same_config(path: Path, old: dict[str, Any], new: dict[str, Any], ignore: tuple[str, ...]) -> None:
    found = config_differences(old["config"], new["config"], ignore)
    if not found:
        return
    shown = "; ".join(found[:3])
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    raise OtherConfigError(
        f"{path} cannot be resumed with another config: {shown}{more}; give the same values, choose another "
        "run.name, or begin anew with run.overwrite=true in place of resume=true"
    )


def _check_reads_nothing_of(path: Path, config: dict[str, Any]) -> None:
    """UserError where a config names a path in the run that is to be replaced."""
    own = path.resolve()
    for key, value in _flat({key: value for key, value in config.items() if key not in _WRITTEN}, ()).items():
        if isinstance(value, str) and os.path.exists(value) and Path(value).resolve().is_relative_to(own):
            raise UserError(
                f"{key}={value} lies in {path}, which run.overwrite=true would replace: choose another run.name"
            )


def _put_aside(path: Path) -> None:
    """Move a run into a folder of its own within its folder. Killed at any time, `_put_back` undoes it."""
    inner = [entry for entry in sorted(path.iterdir()) if entry.name != LOCK_FILE]
    waiting = io.create_folder(path / _ON_THE_WAY)
    for entry in inner:
        io.rename(entry, waiting / entry.name)
    io.rename(waiting, path / _ASIDE)


def _put_back(path: Path) -> bool:
    """Put the run that lies aside in the place of the one that should have replaced it, whose error alone stays.

    Returns:
        Whether one lay there.
    """
    waiting, aside = path / _ON_THE_WAY, path / _ASIDE
    found = aside.exists() or waiting.exists()
    if aside.exists():
        for entry in sorted(path.iterdir()):
            if entry.name not in (LOCK_FILE, ERROR_FILE, _ASIDE):
                io.remove_path(entry)
        io.rename(aside, waiting)
    if waiting.exists():
        for entry in sorted(waiting.iterdir()):
            if not (path / entry.name).exists():
                io.rename(entry, path / entry.name)
        io.remove_path(waiting)
    return found
