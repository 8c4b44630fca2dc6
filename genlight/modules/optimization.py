"""Optimizer and learning-rate schedule from partials, for every module that trains."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class Optimization:
    """Mixin for LightningModules: ``optimizer`` is called with the trainable parameters, ``lr_scheduler`` with it."""

    optimizer: Callable[..., Any] | None
    lr_scheduler: Callable[..., Any] | None

    def configure_optimizers(self) -> Any:
        """The optimizer over parameters that require a gradient, and the learning rate, changed at each step.

        Raises:
            ValueError: no optimizer was configured, or nothing is trainable.
        """
        if self.optimizer is None:
            raise ValueError("module.optimizer is null: training needs one, such as torch.optim.AdamW with _partial_")
        parameters = [p for p in self.parameters() if p.requires_grad]  # type: ignore[attr-defined]
        if not parameters:
            raise ValueError("module.network has no trainable parameters")
        optimizer = self.optimizer(parameters)
        if self.lr_scheduler is None:
            return optimizer
        extra = {}
        if "total_steps" in _missing_arguments(self.lr_scheduler):
            steps = self.trainer.estimated_stepping_batches  # type: ignore[attr-defined]
            if steps == float("inf"):
                raise ValueError("module.lr_scheduler needs the length of the training: set trainer.max_steps")
            extra["total_steps"] = int(steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer, **extra), "interval": "step"},
        }


def _missing_arguments(function: Callable[..., Any]) -> set[str]:
    """Names of arguments that the callable takes and that a partial has not given yet."""
    given: set[str] = set()
    while isinstance(function, functools.partial):
        given |= set(function.keywords)
        function = function.func
    return set(inspect.signature(function).parameters) - given
