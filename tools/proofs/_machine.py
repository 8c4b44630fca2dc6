"""Time and memory on CUDA, for proofs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

ROUNDS = 5


class Machine:
    """Timing and memory on CUDA; on a CPU, where this is rehearsed, times alone."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")

    def milliseconds(self, run: Callable[[], object]) -> float:
        """Until the device has done what is asked of it."""
        import torch

        if not self.cuda:
            started = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - started)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def peak(self, run: Callable[[], object]) -> float:
        """Most bytes that tensors take while it runs."""
        import torch

        if not self.cuda:
            run()
            return math.nan
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())

    def free(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def sides(
        self,
        sides: Mapping[str, Callable[[], object]],
        before: Mapping[str, Callable[[], object]] | None = None,
        rounds: int = ROUNDS,
    ) -> dict[str, list[float]]:
        """Milliseconds of each round by side; sides take turns, and a first round warms up. `before` is not timed."""
        found: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds + 1):
            for name in list(sides) if turn % 2 else list(sides)[::-1]:
                if before is not None:
                    before[name]()
                found[name].append(self.milliseconds(sides[name]))
        return {name: values[1:] for name, values in found.items()}


def over(times: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """How many times as long the first side takes: the median over rounds of the ratio within a round."""
    return median(a / b for a, b in zip(times[first], times[second], strict=True))
