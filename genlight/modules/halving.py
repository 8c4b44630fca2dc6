"""What modules do where memory does not suffice for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from genlight.memory import Halves
from genlight.trainer.resident import is_sharded

Result = TypeVar("Result")


class InHalves:
    """Mixin for LightningModules whose answer for a row does not depend on the batch that it is in."""

    _halves: Halves | None = None

    def in_halves(self, count: int, work: Callable[[slice], Result]) -> Iterator[tuple[slice, Result]]:
        """(rows, work(rows)) of all `count` rows, in halves where memory runs out, as `Halves.parts`.

        Raises torch.OutOfMemoryError if memory does not suffice for one row, or the module lies in shards: the
        processes of those work together, and one may not go its own way.
        """
        trainer = self._trainer  # type: ignore[attr-defined]
        if trainer is not None and is_sharded(trainer):
            whole = slice(0, count)
            yield whole, work(whole)
            return
        if self._halves is None:
            self._halves = Halves()
        yield from self._halves.parts(count, work)
