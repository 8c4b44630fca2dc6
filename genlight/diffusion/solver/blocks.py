"""Sampling many tables on many noises in blocks that fit into memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from genlight.memory import free_memory, say_fewer

Sample = Callable[[slice, slice], Tensor]
Keep = Callable[[slice, slice, Tensor], None]


class Blocks:
    """Blocks of tables and noises, at most `max_rows` rows each; fewer for good once memory has run out.

    Attributes:
        max_rows: tables times noises of one block at most, by now.
    """

    def __init__(self, max_rows: int) -> None:
        """Raises ValueError for a limit below 1."""
        if max_rows < 1:
            raise ValueError(f"max_rows = {max_rows} must be 1 or more")
        self.max_rows = max_rows

    def run(self, tables: int, noises: int, sample: Sample, keep: Keep) -> None:
        """Call keep(tables, noises, sample(tables, noises)) for every block.

        Raises torch.OutOfMemoryError if memory does not suffice for one table on one noise.
        """
        blocks, before = [(slice(0, tables), slice(0, noises))], self.max_rows
        while blocks:
            block = blocks.pop()
            parts = _split(*block, self.max_rows)
            if len(parts) > 1:
                blocks.extend(reversed(parts))
                continue
            here, rows = block
            try:
                x = sample(here, rows)
            except torch.OutOfMemoryError:
                self.max_rows = (here.stop - here.start) * (rows.stop - rows.start) // 2
                if self.max_rows < 1:
                    self.max_rows = 1
                    raise
                blocks.append(block)
            else:
                keep(here, rows, x)
                continue
            free_memory()  # not before: the error holds on to what was made
        if self.max_rows < before:
            say_fewer(self.max_rows, tables * noises, "samples")


def _split(here: slice, rows: slice, limit: int) -> list[tuple[slice, slice]]:
    """The block itself, or two parts of one that is larger than `limit`: first tables are parted, then noises."""
    tables, count = here.stop - here.start, rows.stop - rows.start
    if tables * count <= limit:
        return [(here, rows)]
    if tables > 1:
        middle = here.start + max(1, limit // count)
        return [(slice(here.start, middle), rows), (slice(middle, here.stop), rows)]
    middle = rows.start + limit
    return [(here, slice(rows.start, middle)), (here, slice(middle, rows.stop))]
