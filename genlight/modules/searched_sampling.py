"""Sampling with a solver that a search has set, in place of a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genlight.modules.exported_pipeline import guided_prediction

Denoiser = Callable[..., Tensor]


class SearchedSampling:
    """Mixin for modules with ``net``, ``predict`` style, ``prediction`` and guidance over classes: a settable sampler.

    Attributes:
        sampler: None, or what samples instead of the module's scheduler: called with (model, noise, prediction), see
            `genlight.search.spaces.solver_schedule.TableSampler`. Set it by `set_sampler`.
    """

    sampler: Any = None

    def set_sampler(self, sampler: Any) -> None:
        """Sample with ``sampler`` from now on; None puts the module's own scheduler back."""
        object.__setattr__(self, "sampler", sampler)

    def denoiser(self, guidance_scale: float | None = None) -> Denoiser:
        """model(x, timestep, label=None): the guided network, float32 [B, C, H, W], in evaluation mode.

        Args:
            guidance_scale: instead of the module's.
        """
        module: Any = self
        network = module.net.eval()
        style, null_label = module._style, module.num_classes
        scale = module.guidance_scale if guidance_scale is None else guidance_scale
        module.check_guidance(scale)

        def model(x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
            return guided_prediction(network, style, x, timestep, label, scale, null_label)

        return model

    def sample_with_sampler(self, noise: Tensor, label: Tensor | None, guidance_scale: float | None) -> Tensor:
        """Samples [B, ...] of the set sampler from standard normal noise [B, ...]."""
        model = self.denoiser(guidance_scale)

        def bound(x: Tensor, timestep: Tensor) -> Tensor:
            # several schedules may go through together, each with the whole batch
            rows = None if label is None else label.repeat(len(x) // len(label))
            return model(x, timestep, rows)

        samples: Tensor = self.sampler(bound, noise, self.prediction)  # type: ignore[attr-defined]
        return samples.to(torch.promote_types(noise.dtype, torch.float32))
