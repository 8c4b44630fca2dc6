"""What latents a diffusers pipeline takes, found by calls of it without steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from genlight.errors import UserError
from genlight.modules.pretrained import first_line


class NoSteps(DDIMScheduler):
    """A scheduler without steps: a call of a pipeline returns the latents that it is given, or decodes them."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
    ) -> None:
        """No timesteps, whatever is asked for."""
        self.num_inference_steps = 0
        self.timesteps = torch.zeros(0, device=device)
        self.sigmas = torch.zeros(1)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing begins."""


def no_steps() -> Any:
    """A new `NoSteps`."""
    return NoSteps()  # type: ignore[no-untyped-call]


def latent_kind(
    ask: Callable[[dict[str, Any]], Tensor], guidance_scale: float | None, name: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape of one sample and type of the ``latents`` that a pipeline takes: those of what it draws itself.

    Args:
        ask: what the pipeline, with no steps, returns for the arguments of its call.
        guidance_scale: of its call.
        name: of the pipeline.

    Raises:
        UserError: it cannot be called without steps, or does not take what it returns.
    """
    probe: dict[str, Any] = {"prompt": [""], "num_inference_steps": 1, "output_type": "latent"}
    probe |= {"guidance_scale": guidance_scale, "generator": [torch.Generator().manual_seed(0)]}
    try:
        drawn = ask(probe)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each pipeline raises its own
        raise UserError(
            f"{name} cannot be asked for its latents, by a call without steps: {first_line(error)}"
        ) from error
    try:
        again = ask({**probe, "latents": torch.zeros_like(drawn)})
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name} does not take latents of the shape that it returns: {error}") from error
    if again.shape != drawn.shape or drawn.shape[0] != 1:
        raise UserError(
            f"{name} takes latents of shape {tuple(drawn.shape)} and returns {tuple(again.shape)}: noise and samples "
            "must be of one shape here"
        )
    return tuple(drawn.shape[1:]), drawn.dtype
