"""Whole folders: written beside their place, described by a manifest with checksums, renamed into place at once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genlight.errors import UserError
from genlight.io import primitives
from genlight.io.errors import CorruptFileError
from genlight.io.primitives import CHUNK_BYTES, Path_, atomic_file, atomic_write_json
from genlight.io.strict_json import read_json

MANIFEST = "manifest.json"
_MANIFEST_KIND = "manifest"
_MANIFEST_VERSION = 1


def sha256_of(path: Path_) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_below(folder: Path_, name: str) -> Path:
    """The path of `name` in `folder`, for names that come from files or from the user.

    Raises:
        UserError: the name is empty, absolute, climbs out by "..", holds a control character or a backslash, or leads
            out of the folder by a link.
    """
    folder = Path(folder)
    parts = name.split("/")
    is_plain = all(part not in ("", ".", "..") for part in parts) and "\\" not in name
    if not is_plain or any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        raise UserError(
            f"{name!r} is not a name inside {folder}: it must be relative, without '..', '\\' or control characters"
        )
    path = folder / name
    try:
        is_below = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name!r} cannot be a name inside {folder}: {error}") from None
    if not is_below:
        raise UserError(f"{name!r} leads out of {folder} by a link")
    return path


@contextmanager
def atomic_folder(path: Path_, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, it gets a manifest, is synced and becomes `path`.

    Args:
        path: the folder to create.
        replace: swap out a folder that is there (in one step where the kernel can).

    Raises:
        FileExistsError: `path` exists and `replace` is false, or it is not a folder.
        DiskFullError: no room; `path` is untouched.
    """
    path = Path(path)
    _check_free(path, replace)
    primitives.create_folder(path.parent)
    temporary = primitives.temporary_beside(path)
    with primitives.no_space_explained(path, 0):
        primitives.create_folder(temporary)
        try:
            yield temporary
            write_manifest(temporary)
            _check_free(path, replace)
            if path.exists():
                primitives.swap_in(temporary, path)
            else:
                primitives._rename(temporary, path)
                primitives.sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(temporary)
            raise


def _check_free(path: Path, replace: bool) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"{path} exists and is not a folder")
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")


def write_manifest(folder: Path_) -> None:
    """Sync every file of a finished folder and describe it in `manifest.json`, which `verify_folder` checks.

    Raises:
        UserError: a link leads out of the folder.
    """
    folder = Path(folder)
    files: dict[str, dict[str, Any]] = {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        resolve_below(folder, name)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            primitives._sync(descriptor, path)
        finally:
            os.close(descriptor)
        files[name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    for inner in sorted(inner for inner in folder.rglob("*") if inner.is_dir()):
        primitives.sync_folder(inner)
    atomic_write_json(
        folder / MANIFEST,
        {"kind": _MANIFEST_KIND, "version": _MANIFEST_VERSION, "sha256": _digest(files), "files": files},
    )


def verify_folder(path: Path_, *, allow_extra: bool = False) -> None:
    """Check every file of a folder against its manifest.

    Args:
        path: a folder written by `atomic_folder` or described by `write_manifest`.
        allow_extra: accept files that the manifest does not list. They are not checked.

    Raises:
        CorruptFileError: names the first file that is missing, altered, unlisted, or listed under a name that leaves
            the folder.
    """
    folder = Path(path)
    files = _read_manifest(folder)
    for name, entry in files.items():
        try:
            file = resolve_below(folder, name)
        except UserError as error:
            raise CorruptFileError(f"{folder / MANIFEST} is not safe: {error}") from None
        if not file.is_file():
            raise CorruptFileError(f"{file} is missing; {MANIFEST} lists it")
        if file.stat().st_size != entry["bytes"]:
            raise CorruptFileError(f"{file} has {file.stat().st_size:,} bytes, its manifest says {entry['bytes']:,}")
        if sha256_of(file) != entry["sha256"]:
            raise CorruptFileError(f"{file} is altered: its SHA-256 differs from the one in {MANIFEST}")
    if not allow_extra:
        for file in _files_below(folder):
            if file.relative_to(folder).as_posix() not in files:
                raise CorruptFileError(f"{file} is not listed in {MANIFEST}")


def verify_if_described(path: Path_) -> None:
    """`verify_folder` where the folder has a manifest; those that others wrote have none."""
    if (Path(path) / MANIFEST).is_file():
        verify_folder(path)


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / MANIFEST
    if not file.is_file():
        raise CorruptFileError(f"{folder} has no {MANIFEST}: it is not a whole folder of genlight")
    manifest = read_json(file)
    if not isinstance(manifest, dict) or set(manifest) != {"kind", "version", "sha256", "files"}:
        raise CorruptFileError(f"{file} is not a manifest")
    if manifest["kind"] != _MANIFEST_KIND or manifest["version"] != _MANIFEST_VERSION:
        raise CorruptFileError(
            f"{file} is of kind {manifest['kind']!r}, version {manifest['version']!r}; version 1 is known"
        )
    files = manifest["files"]
    if not isinstance(files, dict) or _digest(files) != manifest["sha256"]:
        raise CorruptFileError(f"{file} is altered: its SHA-256 differs from the one it states")
    for name, entry in files.items():
        is_entry = isinstance(entry, dict) and set(entry) == {"sha256", "bytes"}
        if not is_entry or not isinstance(entry["sha256"], str) or type(entry["bytes"]) is not int:
            raise CorruptFileError(f"{file} describes {name!r} in a form that is not known")
    return files


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode("ascii")).hexdigest()


def _files_below(folder: Path) -> list[Path]:
    """All files but the manifest itself and temporary ones, in a fixed order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if (path.is_file() or path.is_symlink())
        and path != folder / MANIFEST
        and not (path.name.startswith(".") and primitives._TEMPORARY_MARK in path.name)
    )


def copy_to_folder(source: Path_, folder: Path_, name: str | None = None) -> Path:
    """Copy a file into a folder atomically and return its new path.

    Raises:
        UserError: `name` leads out of the folder.
        DiskFullError: no room; what stood there is untouched.
    """
    source = Path(source)
    target = resolve_below(folder, name or source.name)
    with source.open("rb") as file, atomic_file(target, source.stat().st_size) as write:
        while block := file.read(CHUNK_BYTES):
            write(block)
    return target
