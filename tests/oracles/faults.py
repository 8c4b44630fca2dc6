"""Fault injection at the one place where genlight changes the disk, in the manner of SQLite's tests: not sampled,
enumerated."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from oracles.ranks import skip_after_cuda

from genlight.io import primitives

EXIT_CODE = 77


@contextmanager
def hooked(hook: Callable[[str, Path], None]) -> Iterator[None]:
    """Call `hook(name, path)` before each primitive of genlight.io."""
    original, primitives.before_primitive = primitives.before_primitive, hook
    try:
        yield
    finally:
        primitives.before_primitive = original


def fail_at(number: int, code: int) -> Callable[[str, Path], None]:
    """A hook that raises an OSError at the `number`-th primitive, counted from 1."""
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            raise OSError(code, os.strerror(code), str(path))

    return hook


def die_at(number: int) -> Callable[[str, Path], None]:
    """A hook that ends the process at the `number`-th primitive, as SIGKILL would."""
    seen = 0

    def hook(name: str, path: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(EXIT_CODE)

    return hook


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child and return its exit status: 0, 1 for an exception, negative for a signal."""
    return exit_code(start_child(action))


def start_child(action: Callable[[], object]) -> int:
    """Begin `action` in a forked child, which has imported what this process has; returns its process id.

    The test is skipped where this process has begun to use CUDA.
    """
    skip_after_cuda()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a child."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
