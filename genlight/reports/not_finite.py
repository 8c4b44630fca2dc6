"""What was measured and is no number: left out of a report, which holds finite numbers only, and told."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are neither NaN nor infinite."""
    return {name: value for name, value in metrics.items() if not _is_lost(value)}


def finite_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table with None in place of NaN and infinity."""
    return {key: None if _is_lost(value) else value for key, value in row.items()}


def not_finite(metrics: Mapping[str, float], measured_by: Any) -> dict[str, str]:
    """Metrics that are NaN or infinite: a remark on each, by name.

    Args:
        metrics: values by name.
        measured_by: what computed them; its `num_broken` of `num_samples` say how many samples are to blame.
    """
    broken, every = (getattr(measured_by, name, 0) for name in ("num_broken", "num_samples"))
    reason = f": {broken} of {every} samples hold NaN or infinity" if broken else ""
    return {name: f"{name} is not a number ({value}){reason}" for name, value in metrics.items() if _is_lost(value)}
