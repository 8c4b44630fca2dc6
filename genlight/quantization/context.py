"""Where in the sampling a forward pass is: which step, and which guidance branches its batch holds.

Static ranges are chosen by it and observers file what they see under it; dynamic quantization needs none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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


class SamplingSteps(nn.Module):
    """The timesteps of a calibration, and which of them is nearest to that of the call of the network that runs.

    That is all that a saved network knows of its place: pipelines hand it a timestep. The index is a buffer that the
    network and its layers share, which compiled code reads and writes like any other.

    Attributes:
        timesteps: as the network is given them, float32 [steps].
        index: of the nearest one, int64 [1].
    """

    timesteps: Tensor
    index: Tensor

    def __init__(self, timesteps: Sequence[float], device: torch.device | None = None) -> None:
        """
        Raises:
            ValueError: no timesteps.
        """
        super().__init__()
        if not timesteps:
            raise ValueError("timesteps must hold at least one")
        with torch.inference_mode(False):  # the index is written to in any mode
            known = torch.tensor(list(timesteps), dtype=torch.float32, device=device)
            self.register_buffer("timesteps", known, persistent=False)
            self.register_buffer("index", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)

    def nearest(self, timestep: Any) -> Tensor:
        """Which of the timesteps is nearest to one, int64 [1]; the first of equals.

        Args:
            timestep: a number, or a tensor with one for each sample, which are the same.

        Raises:
            ValueError: none, or different ones; compiled code, which cannot look, takes the first.
        """
        one = one_timestep(timestep)
        if isinstance(one, Tensor):
            one = one.to(self.timesteps.device)
        distances: Tensor = (self.timesteps - one).abs()
        return distances.argmin(dim=0, keepdim=True)

    def find(self, timestep: Any) -> None:
        """Set the index, as `nearest` says."""
        self.index.copy_(self.nearest(timestep))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.timesteps
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.timesteps.dtype != before.dtype:  # bfloat16 knows one timestep in four
            self.timesteps = before.to(self.timesteps.device)
        return self


def one_timestep(timestep: Any) -> Any:
    """The timestep of all samples of a call; raises as `SamplingSteps.nearest`."""
    if timestep is None:
        raise ValueError("the network is called without a timestep, by which ranges of inputs are chosen")
    if not isinstance(timestep, Tensor):
        return timestep
    times = timestep.flatten()
    # a decision by numbers would stop a compiled or a captured program
    blind = torch.compiler.is_compiling() or (times.is_cuda and torch.cuda.is_current_stream_capturing())
    if len(times) > 1 and not blind and bool((times != times[0]).any()):
        raise ValueError(
            "ranges of inputs are chosen by the timestep, and the samples of one call have different ones: call the "
            "network once for each, or calibrate with method.activation_ranges=shared"
        )
    return times[0]


def branch_parts(batch: int, context: SamplingContext) -> int:
    """Members of each part of a batch.

    Raises:
        ValueError: the batch does not split into equal parts.
    """
    parts = len(context.branches)
    if batch % parts:
        raise ValueError(f"a batch of {batch} does not split into the {parts} equal parts that branches names")
    return batch // parts
