"""Learning-rate schedules that torch lacks as one class."""

from __future__ import annotations

import math
import time

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer,
    total_steps: int,
    warmup_steps: int = 0,
    final_factor: float = 0.0,
    seconds: float | None = None,
) -> LambdaLR:
    """Linear rise over ``warmup_steps``, then half a cosine to ``final_factor`` of the rate at ``total_steps``.

    Args:
        warmup_steps: optimizer steps of the linear rise.
        final_factor: share of the learning rate that is left at the end.
        seconds: of a training that ``trainer.max_time`` may stop first: the cosine goes by this time since the first
            step, or by steps, whichever is further. Such a training cannot be repeated exactly.

    Raises:
        ValueError: ``warmup_steps`` is negative, ``final_factor`` lies outside [0, 1], or ``seconds`` is not above 0.
    """
    if warmup_steps < 0:
        raise ValueError(f"module.lr_scheduler.warmup_steps must not be negative, got {warmup_steps}")
    if not 0.0 <= final_factor <= 1.0:
        raise ValueError(f"module.lr_scheduler.final_factor must be in [0, 1], got {final_factor}")
    if seconds is not None and seconds <= 0:
        raise ValueError(f"module.lr_scheduler.seconds must be above 0, got {seconds}")
    begun: float | None = None

    def factor(step: int) -> float:
        nonlocal begun
        if step > 0 and begun is None:
            begun = time.monotonic()
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
        if seconds is not None and begun is not None:
            progress = max(progress, (time.monotonic() - begun) / seconds)
        progress = min(1.0, progress)
        return final_factor + (1.0 - final_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
