"""What a student of Distilled Decoding has learned to go on from: kept in its checkpoints, the only that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from genlight.errors import UserError
from genlight.modules.described import DescribedWeights

# of the checkpoint
TIMESTEPS = "student_timesteps"


class LearnedTimesteps(DescribedWeights):
    """Mixin for students.

    Attributes:
        timesteps: how many groups of tokens are decided in what the student learns from.
        num_inference_steps: passes in sampling.
    """

    timesteps: tuple[int, ...]
    num_inference_steps: int

    def sampling_timesteps(self, num_inference_steps: int | None = None) -> tuple[int, ...]:
        """The timesteps of sampling in so many steps; None: as configured. ValueError if not so many were trained."""
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= len(self.timesteps):
            raise ValueError(f"num_inference_steps = {steps} must be from 1 to {len(self.timesteps)}")
        return self.timesteps[:steps]

    def learned(self, timesteps: Sequence[int]) -> tuple[int, ...]:
        """The timesteps; ValueError if not all of them were learned."""
        if not set(timesteps) <= set(self.timesteps):
            raise ValueError(
                f"timesteps = {list(timesteps)}: the student has learned {list(self.timesteps)} and knows no others"
            )
        return tuple(timesteps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[TIMESTEPS] = list(self.timesteps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """UserError if the checkpoint is of another model, or has not learned all of ``timesteps``."""
        super().on_load_checkpoint(checkpoint)
        # those of earlier versions do not say
        found = checkpoint.get(TIMESTEPS, self.timesteps)
        if not set(self.timesteps) <= set(found):
            raise UserError(
                f"module.timesteps = {list(self.timesteps)}, but the checkpoint has learned {list(found)}: a student "
                "goes on from no others"
            )
