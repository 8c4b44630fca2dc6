"""What a method of `validate` hands back: numbers for the report, and what writes the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from genlight.reports.cost import CostEstimate


@dataclass(frozen=True)
class MethodResult:
    """The outcome of one method.

    Attributes:
        metrics: measured on the report draw.
        method: what the model card calls it.
        num_samples: samples behind the metrics; 0: as many as the data module's.
        table: before and after, one row for each variant, with equal keys.
        notes: what the report has to say besides numbers.
        predicted: what the method said that it would cost; None: one validation is all there is.
        spent: seconds that its parts really took, by the names of the phases that were predicted.
        save: writes the artifact into an empty folder, given the module with all of its weights; None: there is none.
        parts: metrics of each folder in the artifact that holds a model of its own and gets a card of its own, by name.
    """

    metrics: Mapping[str, float]
    method: str = "none"
    num_samples: int = 0
    table: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    predicted: CostEstimate | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    save: Callable[[Path, Any], None] | None = field(default=None, repr=False)
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def metrics_of_artifact(own: Mapping[str, float], kept: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What validate logs, of what an artifact holds, and of the model before under names that say so ("…_before").

    The names of validate are those of an artifact that holds one model; of several, each has names of its own.

    Args:
        own: what validate logged of the model before.
        kept: the same metrics of each that the artifact holds, by the end of their names; without "val/".
    """
    short = {logged: logged.removeprefix("val/") for logged in own if not logged.endswith("_std")}
    found = {f"{name}_before": own[logged] for logged, name in short.items()}
    for end, values in kept.items():
        for logged, name in short.items():
            if name in values:
                found[logged if len(kept) == 1 else f"{name}{end}"] = float(values[name])
    return found


class Method(Protocol):
    """What `validate` runs: `method._target_` of the config.

    A method whose work is more than one validation has an attribute `predicts_cost = True`: `run` then says beforehand
    what all of it will cost.
    """

    def run(self, trainer: Any, module: Any, datamodule: Any) -> MethodResult:
        """Do the work on the weights that the module has; called on every process."""
        ...

    def dry_run(self, trainer: Any, module: Any, datamodule: Any) -> CostEstimate:
        """Measure a little of the work and say what all of it will cost, see `genlight.loops.cost`."""
        ...
