"""A model schedule that is ready to sample with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from genlight.diffusion.model_schedule import ModelSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.solver.compile import SolverTable
from genlight.diffusion.solver.decisions import SolverSchedule
from genlight.diffusion.solver.sample import sample


@dataclass(frozen=True, eq=False)
class ModelScheduleSampler:
    """A model schedule ready to sample with; what `SettableSampler.set_sampler` is given.

    Attributes:
        schedule: who answers.
        solver: the decisions that it stands for.
        table: they compiled on the noise schedule.
        timesteps: of each evaluation, as the network sees them.
    """

    schedule: ModelSchedule
    solver: SolverSchedule
    table: SolverTable
    timesteps: tuple[float, ...]

    def __call__(
        self, model: Callable[[Tensor, Tensor], Tensor], noise: Tensor, prediction: Prediction, **options: Any
    ) -> Tensor:
        """Samples [B, ...] from standard normal noise [B, ...]; arguments and errors are those of `solver.sample`.

        `model` chooses the member by its timestep.
        """
        return sample(model, noise, self.table, prediction, **options)
