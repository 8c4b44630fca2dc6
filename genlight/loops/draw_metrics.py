"""Metrics of each draw: a search and a choice have real images of their own, apart from those of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genlight.loops.evaluation import CandidateTrainer, MetricObjective
from genlight.metrics.generative import GenerativeMetrics
from genlight.metrics.reference import prepare_part
from genlight.search.protocols import SearchSpace

_PARTS = {"search": 0, "select": 1}


@dataclass
class DrawMetrics:
    """The objective on the noise of a draw; for "search" and "select" against halves of the other split's images.

    Attributes:
        evaluations, module, datamodule: of the run.
        metric: such as "val/fd_digits".
        mode: "min" or "max".
        folder: where the statistics of the halves are kept.
    """

    evaluations: CandidateTrainer
    module: Any
    datamodule: Any
    metric: str
    mode: str
    folder: Path
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def objective(self, space: SearchSpace[Any], draw: str) -> MetricObjective:
        """What scores candidates of a space on a draw."""
        return MetricObjective(
            self.evaluations, space, self.module, self.datamodule, self.metric, self.mode, draw, self.of(draw)
        )

    def of(self, draw: str) -> Any:
        """The metrics of a draw, with their real images; the module's own where they know none."""
        if draw not in self._made:
            own, part = getattr(self.module, "metrics", None), _PARTS.get(draw)
            made = own
            if part is not None and isinstance(own, GenerativeMetrics):
                split = "train" if own.reference_split == "test" else "test"
                wanted = self.metric.removeprefix("val/")
                made = own.clone(sync=own.sync)
                # no other metric is worth its time here
                made.metrics = tuple(m for m in own.metrics if own.name_of(m) == wanted) or own.metrics
                device = self.evaluations.trainer.strategy.root_device
                prepare_part(made, self.datamodule, split, part, 2, self.folder, device)
            self._made[draw] = made
        return self._made[draw]

    def describe(self) -> dict[str, str]:
        """What scores depend on beside the candidates: for the fingerprint of a search."""
        metrics = self.of("search")
        features = str(metrics.describe()) if isinstance(metrics, GenerativeMetrics) else type(metrics).__name__
        objective, data = f"{self.mode} {self.metric}", str(self.datamodule.fingerprint)
        return {"objective": objective, "data": data, "features": features}
