"""Coefficients by gradient descent in a run: through the network, one step of its sampler, and the features.

For samplers of one evaluation: dF/dα of a Fréchet distance F costs two forward passes and one backward pass. Candidates
start from the best that the search found on the same noise and real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genlight.checkpoints.gradient import FrechetTarget, descend
from genlight.checkpoints.mixing import WeightMixer
from genlight.errors import UserError
from genlight.loops.evaluation import noise_of
from genlight.metrics.generative import GenerativeMetrics
from genlight.search.spaces.checkpoint_coefficients import Combination

if TYPE_CHECKING:
    from genlight.loops.checkpoint_work import CheckpointWork


@dataclass(frozen=True)
class GradientDescent:
    """Adam on the coefficients, from the newest checkpoint and from the best combination of the search.

    Attributes:
        steps: updates from each start.
        lr: step size.
        samples: of the search draw, all in every update.
        penalty: weight of ½‖α‖² in what is minimised.
        ridge: added to the diagonals of both covariances, see `FrechetTarget`.
        chunk: samples that go through the network together.
    """

    steps: int = 100
    lr: float = 0.02
    samples: int = 2000
    penalty: float = 0.0
    ridge: float = 1e-3
    chunk: int = 500

    def __post_init__(self) -> None:
        if min(self.steps, self.chunk) < 1 or self.samples < 2:
            raise ValueError(f"method.gradient: steps and chunk must be 1 or more and samples 2 or more, got {self}")
        if not self.lr > 0 or not self.penalty >= 0 or not self.ridge >= 0:
            raise ValueError(
                f"method.gradient: lr must be positive, penalty and ridge must not be negative, got {self}"
            )

    def check(self, module: Any, metrics: Any, objective: str) -> None:
        """UserError unless the module samples in one evaluation that can be differentiated, and the metric too."""
        steps = getattr(module, "num_inference_steps", None)
        if not hasattr(module, "denoised") or steps != 1:
            raise UserError(
                f"method.gradient needs a consistency model with module.num_inference_steps=1, not "
                f"{type(module).__name__} with {steps}"
            )
        if module.vae is not None:
            raise UserError("method.gradient does not go through the decoder of a VAE: set it to null")
        if not isinstance(metrics, GenerativeMetrics) or objective.removeprefix("val/") != metrics.name_of("fd"):
            raise UserError(f"method.gradient needs a Fréchet distance as method.objective, not {objective}")
        if metrics.extractor.is_inception:
            raise UserError(
                "method.gradient: Inception features are of images rounded to 256 levels, which have no gradient: set "
                "it to null, or choose the features of a classifier (metrics)"
            )


@torch.inference_mode(False)  # a validation step is in that mode, in which nothing has gradients
def descended(work: CheckpointWork, settings: GradientDescent, start: Combination) -> Combination | None:
    """Where gradient descent ends; None where it diverges at once.

    Raises:
        UserError: adapters, whose products have no plain gradient.
    """
    mixer = work.space.mixer(work.module)
    if not isinstance(mixer, WeightMixer):
        raise UserError("method.gradient does not combine adapters: set it to null")
    loss = _Loss(work, settings)
    project = None if work.space.signed else lambda free: work.space.free(work.space.made(free))
    free = work.space.free(start)
    end = descend(mixer, loss, settings.steps, settings.lr, start=free, penalty=settings.penalty, project=project)
    return work.space.made(end.coefficients) if len(end.losses) > 1 else None


class _Loss:
    """The Fréchet distance of the search draw at the live weights, and its gradient by name of weight."""

    def __init__(self, work: CheckpointWork, settings: GradientDescent) -> None:
        metrics: GenerativeMetrics = work.draws.of("search")
        reference = metrics.reference
        assert reference is not None
        count = reference.num_samples
        mean = reference.sum / count
        covariance = (reference.outer_sum - count * torch.outer(mean, mean)) / (count - 1)
        self.module, self.chunk = work.module, settings.chunk
        self.extractor = metrics.extractor
        device = self.module.device
        self.target = FrechetTarget(mean.to(device), covariance.to(device), settings.ridge)
        noise, conditions = noise_of(work.datamodule, "search", settings.samples)
        self.noise = noise.to(device)
        self.label = conditions["label"].to(device) if work.module.class_conditional else None
        self.live: Mapping[str, Tensor] = work.module.live_weights()

    def __call__(self, step: int) -> tuple[float, Mapping[str, Tensor]]:
        rows = [slice(i, i + self.chunk) for i in range(0, len(self.noise), self.chunk)]
        with torch.no_grad():
            features = torch.cat([self._features(each) for each in rows])
        with torch.enable_grad():
            leaf = features.requires_grad_()
            loss = self.target.distance(leaf)
            (slope,) = torch.autograd.grad(loss, leaf)
            weights = {name: value for name, value in self.live.items() if value.requires_grad}
            total = {name: torch.zeros_like(value) for name, value in weights.items()}
            for each in rows:
                parts = torch.autograd.grad(
                    self._features(each), list(weights.values()), slope[each], allow_unused=True
                )
                for name, part in zip(weights, parts, strict=True):
                    if part is not None:
                        total[name] += part
        return float(loss.detach()), total

    def _features(self, rows: slice) -> Tensor:
        module, noise = self.module, self.noise[rows]
        highest = module.noise_schedule.t_max
        sigma = torch.full((len(noise),), highest, dtype=torch.float64)
        label = None if self.label is None else self.label[rows]
        images = module.denoised(highest * noise, sigma, label)
        features: Tensor = self.extractor(images.clamp(-1.0, 1.0))
        return features
