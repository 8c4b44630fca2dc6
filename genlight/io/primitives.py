"""The system calls that change the disk, and the atomic writes built on them.

A write goes to a temporary file in the same folder, is synced, renamed over the target, and the folder is synced: after
a crash or a power loss at any point, the path holds the old content or the new one, whole. Temporary names start with
"." and contain ".tmp-", and `remove_leftovers` sweeps those that a killed process left behind.
"""

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from genlight.io.errors import CorruptFileError, DiskFullError

CHUNK_BYTES = 8 * 1024 * 1024
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY_MARK = ".tmp-"
_REPLACED_MARK = ".old-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

Path_ = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview


def before_primitive(name: str, path: Path) -> None:
    """Called before each system call that changes the disk; tests replace it to count, fail or stop there."""


def _write(descriptor: int, data: Buffer, path: Path) -> None:
    view = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while len(view):
        before_primitive("write", path)
        written = os.write(descriptor, view[:CHUNK_BYTES])
        view = view[written:]


def _sync(descriptor: int, path: Path) -> None:
    before_primitive("fsync", path)
    os.fsync(descriptor)


def _rename(source: Path, target: Path) -> None:
    before_primitive("rename", target)
    os.replace(source, target)


def _truncate(descriptor: int, size: int, path: Path) -> None:
    before_primitive("truncate", path)
    os.ftruncate(descriptor, size)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step (Linux renameat2). False where the file system or the C library lacks it."""
    before_primitive("exchange", second)
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable (fsync of the directory itself)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync(descriptor, folder)
    finally:
        os.close(descriptor)


def create_folder(path: Path_) -> Path:
    """Create a folder and its parents, each one durable before the next. An existing folder is left alone.

    Raises:
        NotADirectoryError: something else than a folder is in the way.
        DiskFullError: there is no room for it.
    """
    path = Path(path)
    if path.is_dir():
        return path
    if path.parent != path:
        create_folder(path.parent)
    with no_space_explained(path, 0):
        before_primitive("mkdir", path)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(f"{path} is a file where a folder is needed") from None
        sync_folder(path.parent)
    return path


def remove_path(path: Path_) -> None:
    """Remove a file, a link or a folder with all it holds, and make that durable. A missing path is no error."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    before_primitive("remove", path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    sync_folder(path.parent)


def rename(source: Path_, target: Path_) -> None:
    """Give a file or folder another name in its folder, durably; a file of that name is replaced."""
    _rename(Path(source), Path(target))
    sync_folder(Path(target).parent)


@contextmanager
def no_space_explained(path: Path, needed: int) -> Iterator[None]:
    """Turn "no space left" into one line with the figures; every other error passes unchanged."""
    try:
        yield
    except Exception as error:
        if not _says_no_space(error):
            raise
        free = _free_bytes(path)
        size = f"{needed:,} bytes" if needed else "more space"
        raise DiskFullError(f"disk full while writing {path}: {size} needed, {free:,} free") from error


def _says_no_space(error: Exception) -> bool:
    """safetensors raises a class of its own, which has the number of the system's error in its text."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    numbers = (f"(os error {number})" for number in _NO_SPACE)
    return type(error).__name__ == "SafetensorError" and any(number in str(error) for number in numbers)


def _free_bytes(path: Path) -> int:
    while not path.exists() and path.parent != path:
        path = path.parent
    return shutil.disk_usage(path).free


def temporary_beside(path: Path, mark: str = _TEMPORARY_MARK) -> Path:
    """A hidden name in the same folder, that no other process uses."""
    return path.parent / f".{path.name}{mark}{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def atomic_file(path: Path_, size: int = 0) -> Iterator[Callable[[Buffer], None]]:
    """Yield a function that appends bytes; `path` changes only when the block ends without an exception.

    Args:
        path: the file to create or replace. Its folder is created. A link is replaced, not followed.
        size: bytes that will be written, for the message on a full disk.

    Raises:
        DiskFullError: no room; `path` is untouched.
        OSError: any other failure, never swallowed; `path` holds the old or the new content.
    """
    path = Path(path)
    create_folder(path.parent)
    temporary = temporary_beside(path)
    with no_space_explained(path, size):
        before_primitive("create", temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                yield lambda data: _write(descriptor, data, path)
                _sync(descriptor, path)
            finally:
                os.close(descriptor)
            _rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def atomic_write_bytes(path: Path_, data: Buffer) -> None:
    """Replace a file by `data`; see `atomic_file` for what is promised and raised."""
    with atomic_file(path, len(data)) as write:
        write(data)


def atomic_write_text(path: Path_, text: str) -> None:
    """Replace a file by `text` in UTF-8; see `atomic_file`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path_, obj: Any) -> None:
    """Replace a file by `obj` as indented JSON; see `atomic_file`.

    Raises:
        ValueError: a number is not finite (JSON has no such numbers).
        TypeError: a value or a key has no form in JSON.
    """
    atomic_write_text(path, json.dumps(_with_text_keys(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _with_text_keys(obj: Any) -> Any:
    """The same object, refusing keys that json would silently turn into text and so could make two keys one."""
    if isinstance(obj, dict):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"JSON keys must be text, got {key!r} ({type(key).__name__})")
        return {key: _with_text_keys(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_with_text_keys(value) for value in obj]
    return obj


def append_line(path: Path_, text: str) -> None:
    """Append one line and sync it. A torn last line, left by a crash, is cut off first.

    Raises:
        ValueError: `text` holds a line break.
        DiskFullError: no room; the file has its old length again.
    """
    path = Path(path)
    if "\n" in text or "\r" in text:
        raise ValueError(f"one line expected for {path}, got a text with a line break: {text[:60]!r}")
    create_folder(path.parent)
    is_new = not path.exists()
    line = text.encode("utf-8") + b"\n"
    with no_space_explained(path, len(line)):
        before_primitive("create" if is_new else "open", path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            whole = _whole_length(descriptor)
            if whole != os.fstat(descriptor).st_size:
                _truncate(descriptor, whole, path)
            os.lseek(descriptor, whole, os.SEEK_SET)
            try:
                _write(descriptor, line, path)
                _sync(descriptor, path)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, whole)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(path.parent)


def _whole_length(descriptor: int) -> int:
    """Length in bytes up to and with the last line break."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - 4096)
        position = os.pread(descriptor, end - start, start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def read_lines(path: Path_) -> list[str]:
    """All whole lines of a file written by `append_line`, without their breaks; a torn last line is left out.

    Raises:
        CorruptFileError: a line is not UTF-8.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    try:
        return [line.decode("utf-8") for line in lines]
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not text in UTF-8: {error}") from None


def remove_leftovers(folder: Path_) -> None:
    """Sweep the temporary files and folders of processes that were killed, in `folder` and below.

    Only the one process that owns the folder may call this. A folder that a killed swap left under its old name only is
    put back.
    """
    for path in sorted(Path(folder).rglob(f".*{_REPLACED_MARK}*")):
        original = path.parent / path.name[1:].rpartition(_REPLACED_MARK)[0]
        if not original.exists():
            _rename(path, original)
            sync_folder(path.parent)
    for mark in (_TEMPORARY_MARK, _REPLACED_MARK):
        for path in sorted(Path(folder).rglob(f".*{mark}*")):
            remove_path(path)


def swap_in(temporary: Path, path: Path) -> None:
    """Put the folder `temporary` at `path`, and remove what `path` held. Needs an existing folder at `path`.

    Where the kernel cannot exchange two names in one step, the old folder is set aside first; `remove_leftovers` puts
    it back if the process dies there.
    """
    if _exchange(temporary, path):
        old = temporary
    else:
        old = temporary_beside(path, _REPLACED_MARK)
        _rename(path, old)
        try:
            _rename(temporary, path)
        except OSError:
            os.replace(old, path)
            raise
    sync_folder(path.parent)
    remove_path(old)
