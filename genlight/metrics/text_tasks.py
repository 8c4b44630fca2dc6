"""Scores of language models on text tasks, each task for itself and all together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

QUANTITIES = (
    "accuracy", "accuracy_normalised", "exact_match", "f1", "log_likelihood", "choice_log_likelihood",
    "choice_probability",
)  # fmt: skip
_OVERALL = ("accuracy", "log_likelihood", "choice_log_likelihood", "choice_probability")


class TaskScores:
    """Means over the questions of each task, and over the tasks, whatever the batches and processes they come from.

    Args:
        tasks: names, in the order of their numbers.
        sync: merge the questions of all processes in ``compute``.

    Raises:
        ValueError: there are no tasks.
    """

    def __init__(self, tasks: Sequence[str], sync: bool = True) -> None:
        if not tasks:
            raise ValueError("tasks: there are none")
        self.tasks = tuple(tasks)
        self._sums = _Sums(len(self.tasks), len(QUANTITIES), sync_on_compute=sync)

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """Of each metric, by the name under which it is reported: more is better."""
        names = [f"{task}/{quantity}" for task in self.tasks for quantity in QUANTITIES]
        return dict.fromkeys([*names, *_OVERALL], True)

    @property
    def sync(self) -> bool:
        """Whether ``compute`` merges the questions of all processes; a search may switch it."""
        return bool(self._sums.sync_on_compute)

    @sync.setter
    def sync(self, value: bool) -> None:
        # what it was built with is copied to the flag that is asked
        self._sums.sync_on_compute = self._sums._to_sync = value

    def to(self, device: torch.device | str) -> None:
        """Move the sums."""
        self._sums.to(device)

    def reset(self) -> None:
        """Forget all questions."""
        self._sums.reset()

    def update(self, task: Tensor, quantity: str, values: Tensor) -> None:
        """Add the values [B] of one of `QUANTITIES` for B questions of the tasks with these numbers [B]."""
        self._sums.update(task, QUANTITIES.index(quantity), values)

    def compute(self) -> dict[str, Tensor]:
        """Means by name, "<task>/<quantity>"; without a task, means over the tasks that have the quantity."""
        sums, counts = self._sums.compute()
        result: dict[str, Tensor] = {}
        for number, task in enumerate(self.tasks):
            for column, quantity in enumerate(QUANTITIES):
                if counts[number, column] > 0:
                    result[f"{task}/{quantity}"] = sums[number, column] / counts[number, column]
        for quantity in _OVERALL:
            found = [value for name, value in result.items() if name.rsplit("/", 1)[-1] == quantity]
            if found:
                result[quantity] = torch.stack(found).mean()
        return result


class _Sums(Metric):
    """Sums and counts by task and quantity, over all processes."""

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, tasks: int, quantities: int, **options: bool) -> None:
        super().__init__(**options)
        for name in ("sums", "counts"):
            self.add_state(name, torch.zeros(tasks, quantities, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, task: Tensor, column: int, values: Tensor) -> None:
        """Add the values [B] of one quantity."""
        values = values.to(self.sums)
        self.sums[:, column].index_add_(0, task, values)
        self.counts[:, column].index_add_(0, task, torch.ones_like(values))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Sums and counts [tasks, quantities]."""
        return self.sums, self.counts


def extracted(text: str, pattern: str | None) -> str | None:
    """The last match of a regular expression, its first group if it has one; all of the text without a pattern.

    Returns:
        None where nothing matches.
    """
    if pattern is None:
        return text
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return found[-1].group(1 if found[-1].re.groups else 0) or ""


def exact_match(answer: str, references: Sequence[str], normalise: bool) -> float:
    """1 if an answer equals one of the references, else 0; white space at the ends never counts.

    Args:
        normalise: as in `answer_f1`; False: to the letter.
    """
    if normalise:
        return _squad(answer, references)[0]
    return float(answer.strip() in [reference.strip() for reference in references])


def answer_f1(answer: str, references: Sequence[str]) -> float:
    """Largest F1 of an answer's words against those of one of the references, in [0, 1].

    Case, punctuation and the articles a, an, the do not count, as in SQuAD (Rajpurkar et al. 2016).
    """
    return _squad(answer, references)[1]


def _squad(answer: str, references: Sequence[str]) -> tuple[float, float]:
    from torchmetrics.functional.text import squad

    target: Any = {"answers": {"answer_start": [0] * len(references), "text": list(references)}, "id": "0"}
    found = squad([{"prediction_text": answer, "id": "0"}], [target])
    return float(found["exact_match"]) / 100.0, float(found["f1"]) / 100.0
