"""Checkpoints that other programs saved, as members to combine: safetensors files, read where they lie."""

import glob
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from genlight import io
from genlight.errors import UserError


@dataclass(frozen=True)
class FileMember:
    """One checkpoint.

    Attributes:
        first_step, last_step: its optimizer step, by its path.
        files: that hold its parameters, each by name in one of them.
        sha256: of the files.
    """

    first_step: int
    last_step: int
    files: Mapping[str, Path]
    sha256: str
    count: int = 1
    lr: float | None = None


class FileTrajectory:
    """Checkpoints of one training by any program, oldest first; use `open`.

    Attributes:
        members, names, shapes: as in `Trajectory`; names are the module's.
        fingerprint: SHA-256 over steps and files.
        damaged: why checkpoints were left out, with `skip_damaged`.
    """

    def __init__(
        self, members: Sequence[FileMember], shapes: Mapping[str, Sequence[int]], prefix: str, damaged: Sequence[str]
    ) -> None:
        self.members, self.names, self.damaged = tuple(members), tuple(sorted(shapes)), tuple(damaged)
        self.shapes = {name: tuple(shapes[name]) for name in self.names}
        said = repr([(member.last_step, member.sha256) for member in members])
        self.fingerprint = hashlib.sha256(said.encode()).hexdigest()
        self._prefix, self._handles = prefix, dict[Path, Any]()

    @classmethod
    def open(
        cls,
        places: Sequence[str],
        parameters: Mapping[str, Tensor],
        buffers: Collection[str] = (),
        *,
        skip_damaged: bool = False,
    ) -> "FileTrajectory":
        """Read every file once.

        Args:
            places: of each checkpoint a safetensors file, or a folder of them; a ``*`` stands for anything. The numbers
                in their paths say the optimizer step.
            parameters: of the module by name; names in the files are the same, or the same ends of them.
            buffers: names that the module has besides; they are passed over.
            skip_damaged: leave out files that cannot be read instead of raising.

        Raises:
            UserError: nothing there, no steps in the paths, or parameters that are not the module's: the file is named.
            CorruptFileError: a file is truncated or no safetensors file.
        """
        found = steps_of(paths_of(places))
        members, damaged = list[FileMember](), list[str]()
        shapes: dict[str, tuple[int, ...]] = {}
        prefix = ""
        for step in sorted(found):
            try:
                member, held = _read(found[step], step)
            except io.CorruptFileError as error:
                if not skip_damaged:
                    raise
                damaged.append(str(error))
                continue
            if not members:
                prefix = _prefix(held, {*parameters, *buffers}, found[step])
                shapes = {prefix + name: shape for name, shape in held.items() if prefix + name in parameters}
            _check_same(shapes, {prefix + name: shape for name, shape in held.items()}, found[step])
            members.append(member)
        if not members:
            raise UserError(f"method.trajectory={list(places)}: no checkpoint can be read; {damaged[0]}")
        return cls(members, shapes, prefix, damaged)

    def read(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member in float32 on the CPU."""
        stored = name.removeprefix(self._prefix)
        path = self.members[index].files[stored]
        if path not in self._handles:
            self._handles[path] = _open(path)
        tensor: Tensor = self._handles[path].get_tensor(stored)
        return tensor.float()

    def read_difference(self, index: int, name: str, /) -> Tensor:
        """A parameter of a member minus that of the newest member, float32 on the CPU."""
        return self.read(index, name) - self.read(-1, name)


def paths_of(places: Sequence[str]) -> list[Path]:
    """What the places are, with patterns resolved; UserError where there is nothing."""
    found: list[Path] = []
    for place in places:
        paths = [Path(path) for path in glob.glob(place)] if glob.has_magic(place) else [Path(place)]
        if not paths or not all(path.exists() for path in paths):
            raise UserError(f"method.trajectory: there is nothing at {place}")
        found += paths
    return found


def steps_of(paths: Sequence[Path]) -> dict[int, Path]:
    """Paths by optimizer step: the last number in them that is another one in each.

    Raises:
        UserError: there is no such number.
    """
    numbers = [[int(number) for number in re.findall(r"\d+", str(path))] for path in paths]
    columns = zip(*numbers, strict=True) if len({len(each) for each in numbers}) == 1 else ()
    steps = next((each for each in reversed(list(columns)) if len(set(each)) == len(paths)), None)
    if steps is None:
        shown = ", ".join(map(str, paths[:3]))
        raise UserError(
            f"method.trajectory: the paths do not tell the optimizer step: each must hold a number of its own at the "
            f"same place, as out/checkpoint-*/unet; found {shown}"
        )
    return dict(zip(steps, paths, strict=True))


def _read(place: Path, step: int) -> tuple[FileMember, dict[str, tuple[int, ...]]]:
    """A checkpoint, and the shapes of all that it holds."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"method.trajectory: {place} holds no safetensors file")
    where, shapes = dict[str, Path](), dict[str, tuple[int, ...]]()
    for file in files:
        handle = _open(file)
        for name in handle.keys():  # noqa: SIM118 - it is no mapping
            if name in where:
                raise UserError(f"method.trajectory: {place} holds {name!r} in {where[name].name} and {file.name}")
            where[name], shapes[name] = file, tuple(handle.get_slice(name).get_shape())
    digest = hashlib.sha256("".join(map(io.sha256_of, files)).encode()).hexdigest()
    return FileMember(step, step, where, digest), shapes


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise io.CorruptFileError(f"{path} is truncated or no safetensors file: {error}") from None


def _prefix(held: Collection[str], known: Collection[str], place: Path) -> str:
    """What the module's names begin with, before those of the file."""
    first = min(held, default="")
    begins = sorted(name.removesuffix(first) for name in known if name == first or name.endswith(f".{first}"))
    unknown = {begin: [name for name in held if begin + name not in known] for begin in begins or [""]}
    best = min(unknown, key=lambda begin: len(unknown[begin]))
    if unknown[best] or not held:
        name = min(unknown[best], default="")
        raise UserError(
            f"method.trajectory: {place} holds {name!r}, which is no weight of the module. Where a library renames "
            "weights as it saves them, save them under the names of the network in memory: "
            "safetensors.torch.save_file(dict(network.named_parameters()), file)"
        )
    return best


def _check_same(wanted: Mapping[str, Any], found: Mapping[str, Any], place: Path) -> None:
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise UserError(
                f"method.trajectory: {place} is of another network than the oldest checkpoint: {name!r} has shape "
                f"{found.get(name)}, there {shape}"
            )
