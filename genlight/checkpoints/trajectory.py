"""A trajectory on disk: the weights of one training at many steps, one safetensors file each, and `index.json`.

A member is a checkpoint, or the mean of several consecutive ones. The index says what belongs to the trajectory; it is
replaced in one step after the files it names are whole, so that a killed writer leaves the old list or the new one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genlight import io
from genlight.errors import UserError

INDEX_FILE = "index.json"
VERSION = 1
_KIND = "trajectory"
_FORMAT_NAMES = {"float32": "F32", "bfloat16_difference": "BF16"}

StoredType = Literal["float32", "bfloat16_difference"]
Check = Literal["names", "hash"]


@dataclass(frozen=True)
class Member:
    """One entry of a trajectory.

    Attributes:
        first_step, last_step: optimizer steps of the oldest and the newest checkpoint in it.
        count: 1 for a checkpoint; more for the mean of `count` checkpoints.
        lr: learning rate of the step that led to the newest of them, if known.
        file: name of its file in the folder.
        sha256: the checksum that the file states of itself.
        dtype: "float32" holds the weights; "bfloat16_difference" holds the weights less those of the newest member.
    """

    first_step: int
    last_step: int
    count: int
    lr: float | None
    file: str
    sha256: str
    dtype: StoredType


@dataclass(frozen=True)
class Index:
    """What `index.json` holds.

    Attributes:
        origin: where the weights come from, as plain values.
        shapes: shape of each parameter, by name.
        members: oldest first.
    """

    origin: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    members: tuple[Member, ...]

    def digest(self) -> str:
        """SHA-256 over all of it, in hexadecimal."""
        return _digest(_to_plain(self))


_INDEX = TypeAdapter(Index)


def write_index(folder: Path, index: Index) -> None:
    """Replace the index of a folder, atomically."""
    plain = _to_plain(index)
    io.atomic_write_json(folder / INDEX_FILE, {"kind": _KIND, "version": VERSION, "sha256": _digest(plain), **plain})


def read_index(folder: Path) -> Index:
    """The index of a folder.

    Raises:
        UserError: the folder has none, or it is of a newer version.
        CorruptFileError: it is altered, or not one of a trajectory.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no trajectory: it has no {INDEX_FILE}")
    content = io.read_json(file)
    if not isinstance(content, dict) or content.pop("kind", None) != _KIND:
        raise io.CorruptFileError(f"{file} is not the index of a trajectory")
    if (version := content.pop("version", None)) != VERSION:
        raise UserError(f"{file} has version {version!r}; this genlight reads version {VERSION}")
    if content.pop("sha256", None) != _digest(content):
        raise io.CorruptFileError(f"{file} is altered: its SHA-256 differs from the one it states")
    try:
        index = _INDEX.validate_json(json.dumps(content), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise io.CorruptFileError(f"{file} is no index of version {VERSION}: {key}: {first['msg']}") from None
    _check_members(index.members, file)
    return index


def _check_members(members: tuple[Member, ...], file: Path) -> None:
    before = -1
    for member in members:
        if not before < member.first_step <= member.last_step or member.count < 1:
            raise io.CorruptFileError(f"{file}: {member.file} does not follow step {before}, the one before it")
        before = member.last_step
    if members and members[-1].dtype != "float32":
        raise io.CorruptFileError(f"{file}: the newest member {members[-1].file} is not stored in float32")


def _to_plain(index: Index) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(index), allow_nan=False))
    return plain


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class Trajectory:
    """The members of one training, for reading. Use `open`.

    Attributes:
        folder: where the files are.
        members: oldest first.
        names: parameter names, sorted.
        shapes: shape of each parameter.
        origin: run, module, interval, … as the writer gave them.
        fingerprint: SHA-256 over names, shapes, origin and the checksums of all members.
        damaged: why members were left out, with `skip_damaged`, here or where it was written.
    """

    def __init__(self, folder: Path, index: Index, damaged: Iterable[str] = ()) -> None:
        self.folder = folder
        self.members = index.members
        self.names = tuple(sorted(index.shapes))
        self.shapes = dict(index.shapes)
        self.origin = dict(index.origin)
        self.fingerprint = index.digest()
        self.damaged = (*self.origin.get("damaged", ()), *damaged)
        self._handles: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, check: Check = "hash", skip_damaged: bool = False) -> "Trajectory":
        """Read the index and check every file that it names.

        Args:
            folder: a folder written by `TrajectoryWriter`.
            check: "names" compares names, shapes, types and the stated checksum, from the headers alone; "hash" also
                reads every file once, so that a single changed bit is found.
            skip_damaged: leave out members whose file is damaged instead of raising; `damaged` says why. The newest
                one is never left out where others are stored as differences to it.

        Raises:
            UserError: there is no trajectory, it is empty, or of a newer version.
            CorruptFileError: names the first file that is missing, truncated, altered, or of another training.
            ValueError: an unknown `check`.
        """
        if check not in get_args(Check):
            raise ValueError(f"check must be one of {get_args(Check)}, got {check!r}")
        folder = Path(folder)
        index = read_index(folder)
        if not index.members:
            raise UserError(f"{folder} holds no member yet: the training has not reached its window")
        kept, damaged = [], []
        for member in index.members:
            try:
                check_member(folder, index, member, check)
                kept.append(member)
            except io.CorruptFileError as error:
                is_base = member is index.members[-1] and any(m.dtype != "float32" for m in index.members)
                if not skip_damaged or is_base:
                    raise
                damaged.append(str(error))
        if not kept:
            raise io.CorruptFileError(f"{folder}: every member is damaged; {damaged[0]}")
        return cls(folder, Index(index.origin, index.shapes, tuple(kept)), damaged)

    @property
    def steps(self) -> list[int]:
        """`last_step` of each member."""
        return [member.last_step for member in self.members]

    def read(self, index: int, name: str) -> Tensor:
        """A parameter of member `index` in float32 on the CPU; where it is stored so, the mapped file itself: copy it
        before changing it.

        Raises:
            IndexError, ValueError: no such member or parameter.
            CorruptFileError: the file has gone or changed since `open`.
        """
        member = self.members[index]
        stored = self._stored(member, name)
        if member.dtype == "float32":
            return stored
        return self._stored(self.members[-1], name) + stored.float()

    def read_difference(self, index: int, name: str) -> Tensor:
        """`read(index, name)` less the newest member's, in float32; exactly what is stored where differences are."""
        member = self.members[index]
        stored = self._stored(member, name)
        if member.dtype == "float32":
            return stored - self._stored(self.members[-1], name)
        return stored.float()

    def _stored(self, member: Member, name: str) -> Tensor:
        if name not in self.shapes:
            raise ValueError(f"{name!r} is no parameter of {self.folder}; the first is {self.names[0]!r}")
        if member.file not in self._handles:
            self._handles[member.file] = _open_file(self.folder, member)
        tensor: Tensor = self._handles[member.file].get_tensor(name)
        return tensor


def check_member(folder: Path, index: Index, member: Member, check: Check) -> None:
    """Compare a file with what the index says of it; CorruptFileError names the file and what differs."""
    handle = _open_file(folder, member)
    path = folder / member.file
    if (handle.metadata() or {}).get("sha256") != member.sha256:
        raise io.CorruptFileError(
            f"{path} is not the file that {INDEX_FILE} lists: it is altered or of another training"
        )
    found = set(handle.keys())
    if different := sorted(found ^ set(index.shapes)):
        where = "lacks" if different[0] in index.shapes else "holds the unknown"
        raise io.CorruptFileError(f"{path} {where} parameter {different[0]!r}")
    for name, shape in index.shapes.items():
        part = handle.get_slice(name)
        if tuple(part.get_shape()) != shape or part.get_dtype() != _FORMAT_NAMES[member.dtype]:
            raise io.CorruptFileError(
                f"{path}: {name!r} is {part.get_dtype()} {part.get_shape()}, {INDEX_FILE} says "
                f"{_FORMAT_NAMES[member.dtype]} {list(shape)}"
            )
    if check == "hash":
        io.load_tensors(path)


def _open_file(folder: Path, member: Member) -> Any:
    try:
        path = io.resolve_below(folder, member.file)
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise io.CorruptFileError(f"{folder / member.file} is missing; {INDEX_FILE} lists it") from None
    except (SafetensorError, OSError, UserError) as error:
        raise io.CorruptFileError(f"{folder / member.file} is truncated or altered: {error}") from None


@dataclass(frozen=True)
class SavedAverage:
    """An `Average` in a file.

    Attributes:
        rate, step: as there.
        path: of the file.
    """

    rate: float
    step: int
    path: Path

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Float32, by parameter name; read at each call, since several would fill the memory.

        Raises:
            CorruptFileError: the file is altered.
        """
        return io.load_tensors(self.path)[0]


@dataclass(frozen=True)
class Average:
    """A moving average of weights that was tracked while training.

    Attributes:
        rate: share of the old average that is kept at each optimizer step.
        step: optimizer steps done.
        tensors: float32, by parameter name.
    """

    rate: float
    step: int
    tensors: dict[str, Tensor]


def save_average(path: Path, average: Average) -> None:
    """Write one average to a safetensors file, atomically."""
    labels = {"kind": "moving_average", "rate": repr(average.rate), "step": str(average.step)}
    io.save_tensors(path, average.tensors, labels)


def average_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The moving averages of a folder, as files; empty where there is none."""
    return sorted(Path(folder).glob("rate-*.safetensors"))


def check_averages(folder: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]]) -> None:
    """Compare what the headers of a folder's averages say with what each must hold: the files are not read.

    Raises:
        CorruptFileError: names the file whose header is damaged, or that holds other parameters.
    """
    wanted = {name: (tuple(shape), "F32") for name, shape in shapes.items()}
    for path in average_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise io.CorruptFileError(f"{path} is truncated or altered: {error}") from None
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                raise io.CorruptFileError(
                    f"{path} belongs to another trajectory: parameter {name!r}; callbacks.ema_bank.parameters of the "
                    "training must be that of the collector, else move the folder of averages away"
                )


def read_averages(folder: str | os.PathLike[str], shapes: Mapping[str, Sequence[int]]) -> list[SavedAverage]:
    """The averages of a folder by ascending rate; empty where there is none. Their weights are read where asked for.

    Args:
        folder: with files of `save_average`, such as ``<run>/trajectory/ema``.
        shapes: what each must hold: those of the trajectory they belong to.

    Raises:
        CorruptFileError: names the file whose header is damaged, or that holds other parameters.
    """
    check_averages(folder, shapes)
    averages = []
    for path in average_files(folder):
        with safe_open(path, framework="pt") as file:
            labels = file.metadata() or {}
        try:
            averages.append(SavedAverage(float(labels["rate"]), int(labels["step"]), path))
        except (KeyError, ValueError):
            raise io.CorruptFileError(f"{path} is not a moving average of genlight") from None
    return sorted(averages, key=lambda average: average.rate)
