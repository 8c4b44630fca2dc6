"""Where in the sampling a forward pass is: which step, and which guidance branches its batch holds.

Static ranges are chosen by it and observers file what they see under it; dynamic quantization needs none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingContext:
    """The place of one forward pass.

    Attributes:
        step: index of the sampling step, from 0 at the noisiest.
        num_steps: steps of the whole sampling.
        branches: guidance branch of each equal, consecutive part of the batch, e.g. (0, 1) for
            `cat([unconditional, conditional])`; (0,) where all of the batch is one branch.

    Raises:
        ValueError: a step outside 0 … num_steps - 1, or no branch.
    """

    step: int = 0
    num_steps: int = 1
    branches: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 0 <= self.step < self.num_steps:
            raise ValueError(f"step = {self.step} must lie in 0 … num_steps - 1 = {self.num_steps - 1}")
        if not self.branches or min(self.branches) < 0:
            raise ValueError(f"branches = {self.branches} must name one or more branches, from 0")


_CURRENT: ContextVar[SamplingContext | None] = ContextVar("sampling_context", default=None)


def current_context() -> SamplingContext:
    """The context that the caller is in; one step and one branch where none was set."""
    return _CURRENT.get() or SamplingContext()


@contextmanager
def sampling_context(context: SamplingContext) -> Iterator[None]:
    """Forward passes in the block are at this place of the sampling."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def branch_parts(batch: int, context: SamplingContext) -> int:
    """Members of each part of a batch.

    Raises:
        ValueError: the batch does not split into equal parts.
    """
    parts = len(context.branches)
    if batch % parts:
        raise ValueError(f"a batch of {batch} does not split into the {parts} equal parts that branches names")
    return batch // parts
