"""Batches in parts that fit into memory: half as many rows at a time once it has run out."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Halves:
    """How many rows go through at a time: all there are, and fewer for good once memory has run out, which is said.

    Args:
        what: the rows are, in words.
        key: of the config, that sets how many there are; "" where none does.

    Attributes:
        rows: at a time at most; None as long as memory has sufficed.
    """

    def __init__(self, what: str = "samples", key: str = "data.eval_batch_size") -> None:
        self.what, self.key = what, key
        self.rows: int | None = None

    def attempt(self, work: Callable[[int], Result], count: int) -> Result:
        """work(rows) with `count` rows or as many as are known to fit; half as many, and so on, where memory runs out.

        Work that fails is begun anew: it must leave nothing behind.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one row.
        """
        first = rows = min(count, self.rows or count)
        while (done := _done(work, rows)) is None:
            rows //= 2
        if rows < first:
            self.rows = rows
            say_fewer(rows, count, self.what, self.key)
        return done[0]

    def parts(
        self, count: int, work: Callable[[slice], Result], most: int | None = None
    ) -> Iterator[tuple[slice, Result]]:
        """(rows, work(rows)) of consecutive parts of `count` rows, at most `most` at a time; see `attempt`.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one row.
        """
        start = 0
        while start < count:

            def one(rows: int, start: int = start) -> tuple[slice, Result]:
                part = slice(start, start + rows)
                return part, work(part)

            part, found = self.attempt(one, min(count - start, most or count))
            yield part, found
            start = part.stop


def say_fewer(rows: int, count: int, what: str, key: str = "") -> None:
    """Warn that only so many rows of `count` go through at a time, and name the key of the config that sets that."""
    hint = f" ({key})" if key else ""
    warnings.warn(f"memory ran out: {rows} of {count} {what} at a time from now on{hint}", stacklevel=3)


def free_memory() -> None:
    """Let go of what failed work left behind."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA is not in use


def _done(work: Callable[[int], Result], rows: int) -> tuple[Result] | None:
    """What the work gives; None where memory ran out and there are rows to halve."""
    try:
        return (work(rows),)
    except torch.OutOfMemoryError:
        if rows < 2:
            raise
    free_memory()  # not before: the error holds on to what the work had made
    return None
