"""What EEP needs to know of the whole model, measured once for all numbers of experts that are searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device

from genlight.experts.baselines import baseline
from genlight.experts.maps import LayerMaps
from genlight.experts.statistics import RoutingStatistics
from genlight.loops.evaluation import CandidateTrainer, drawing, whole_loader

if TYPE_CHECKING:
    from genlight.loops.expert_search import ExpertSearch

RANDOM = "random"
Maps = dict[str, dict[str, LayerMaps]]


@dataclass
class WholeModel:
    """The model with all of its experts.

    Attributes:
        method: the settings.
        numbers: of experts, that baselines leave; for all of them calibration runs once.
        evaluations, module: of the run.
        task_data: the data with the tasks of the search alone.
        scores: by draw and number of questions, lower is better; as far as they were measured.
    """

    method: ExpertSearch
    numbers: Sequence[int]
    evaluations: CandidateTrainer
    module: Any
    task_data: Any
    scores: dict[tuple[str, int], float] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return self.evaluations.fingerprint(self.module)

    @property
    def baseline_maps(self) -> dict[int, Maps]:
        """Edits of all layers by name of the baseline, for each number of experts; the same on all processes."""
        return self._known[0]

    @property
    def load(self) -> dict[str, torch.Tensor]:
        """Tokens that are routed to each expert in calibration, int64 [E] by layer."""
        return self._known[1]

    @cached_property
    def _known(self) -> tuple[dict[int, Maps], dict[str, torch.Tensor]]:
        """One pass over calibration data."""
        known: tuple[dict[int, Maps], dict[str, torch.Tensor]]
        with self.evaluations.display.phase("calibration"):
            known = self.evaluations.agreed(self.evaluations.inside(self.module, self._calibrated))
        return known

    def _calibrated(self) -> tuple[dict[int, Maps], dict[str, torch.Tensor]]:
        method, editor, seed = self.method, self.module.expert_editor(), self.method.settings.seed
        editor.restore()
        with RoutingStatistics(editor, seed=seed) as collecting:
            self.run_batches("search", method.calibration)
        statistics = collecting.results()
        every = {}
        for left in self.numbers:
            editor.route(num_experts_per_tok=method.experts_per_token(editor, left))
            make: Callable[..., dict[str, LayerMaps]]
            make = partial(baseline, editor=editor, statistics=statistics, num_experts=left)
            names = self.evaluations.display.counted(method.baselines)
            found = {name: make(name, seed=seed, max_subsets=method.max_subsets) for name in names}
            for number in range(method.random_draws):
                found[f"{RANDOM} {number}"] = make(RANDOM, seed=seed + number)
            every[left] = found
            editor.restore()
        return every, {name: one.frequency for name, one in statistics.items()}

    def run_batches(self, draw: str, count: int, batches: int | None = None) -> int:
        """Score the questions of a draw with the module as it is; how many tokens that were. To be called `inside`."""
        tokens = 0
        with drawing(self.task_data, draw, count):
            for number, batch in enumerate(whole_loader(self.task_data)):
                if number == batches:
                    break
                self.module.log_likelihoods(move_data_to_device(batch, self.module.device))
                tokens += int(batch["attention_mask"].sum())
        return tokens
