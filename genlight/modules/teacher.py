"""A frozen diffusion model that teaches: read from a folder, asked for clean images, never trained nor saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.consistency import boundary_scalings
from genlight.diffusion.noise_schedules import expand
from genlight.errors import UserError
from genlight.modules.exported_pipeline import Network


class FrozenTeacher:
    """Any diffusion model of genlight or diffusers as a denoiser D(x, σ) of the variance-exploding view x = x_0 + σ ε.

    A model of another kind sees α(t) x at the time t whose noise level σ(t)/α(t) is σ, and its output is turned into
    x_0 by `genlight.diffusion.prediction`. Levels below the model's own range count as its lowest: there x_0 is x up to
    that little noise.

    It is no submodule: so it stays out of the checkpoint, the optimizer, gradient synchronisation and sharding, and an
    averaged copy of the module shares it.

    Args:
        module: a DiffusionModule with its weights.
        guidance_scale: classifier-free guidance of the teacher; 1 is none.

    Raises:
        ValueError: the network cannot be guided.
    """

    def __init__(self, module: Any, guidance_scale: float = 1.0) -> None:
        module.net.eval().requires_grad_(False)
        self.module, self.guidance_scale = module, guidance_scale
        self.prediction = module.prediction
        self._model = module.denoiser(guidance_scale)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self

    @property
    def network(self) -> Network:
        return self.module.net

    def times(self, sigma: Tensor) -> Tensor:
        """The model's own times of noise levels, float64; ValueError for levels above its range."""
        schedule = self.prediction.schedule
        times: Tensor = schedule.t_of_noise_level(sigma.clamp(min=schedule.noise_level(schedule.t_min)))
        return times

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """D(x, σ) in float32 for x [B, ...], noise levels [B] (float64, on the CPU) and labels [B]."""
        if next(self.network.parameters()).device != x.device:
            self.network.to(x.device)
        schedule, t = self.prediction.schedule, self.times(sigma)
        x_t = expand(schedule.alpha(t), x) * x
        timestep = schedule.model_timestep(t).float().to(x.device)
        output = self._model(expand(schedule.input_scale(t), x_t) * x_t, timestep, label)
        denoised: Tensor = self.prediction.to_x0(output, x_t, t)
        return denoised


def read_teacher(source: str | Path, guidance_scale: float = 1.0) -> FrozenTeacher:
    """The teacher of a diffusers pipeline folder, a run folder of a fit (its artifact), or a hub id.

    Raises:
        UserError: not found, damaged, not a diffusion model, or it cannot be guided.
    """
    from genlight.modules.diffusion import DiffusionModule

    folder = Path(source)
    if (folder / "run.json").is_file():
        folder = folder / "artifact"
        if not folder.is_dir():
            raise UserError(f"module.teacher = {source} is a run without an artifact: its fit has not finished")
    # it is asked for single predictions; the steps of its sampler only have to be some that its folder knows
    module = DiffusionModule(
        pretrained=str(folder), class_conditional=None, label_dropout=0.0, num_inference_steps=None
    )
    module.configure_model()
    try:
        return FrozenTeacher(module, guidance_scale)
    except ValueError as error:
        raise UserError(f"module.teacher_guidance_scale: {error}") from error


def time_embeddings(network: Network) -> list[tuple[nn.Module, nn.Linear]]:
    """(sinusoids of the timestep, the linear layer on them) of each time embedding of a network."""
    pairs = [
        (part.time_proj, part.timestep_embedder.linear_1)
        for part in network.modules()
        if hasattr(part, "timestep_embedder") and hasattr(part, "time_proj")
    ]
    if hasattr(network, "time_embedding") and hasattr(network, "time_proj"):
        pairs.append((network.time_proj, network.time_embedding.linear_1))
    return pairs


@torch.no_grad()
def translate_times(network: Network, teacher: FrozenTeacher, sigma_min: float, sigma_max: float) -> float:
    """Change the time embedding of a copy of the teacher's network to hear 250 ln σ in place of the teacher's timestep.

    Consistency models are given c_noise = 250 ln σ, their teacher ln(σ)/4, an index or 1000 t. The first linear layer
    on the sinusoids is fitted, by least squares over levels even in ln σ, to say at the one what it said at the other.

    Returns:
        The largest error of an activation, relative to the largest activation.
    """
    sigma = torch.linspace(0, 1, 4096, dtype=torch.float64).mul(torch.tensor(sigma_max / sigma_min).log()).exp()
    sigma = (sigma_min * sigma).clamp(max=sigma_max)
    old = teacher.prediction.schedule.model_timestep(teacher.times(sigma))
    new = boundary_scalings(sigma, 1.0, sigma_min)[3]
    worst = 0.0
    for sinusoids, linear in time_embeddings(network):
        device, kind = linear.weight.device, linear.weight.dtype
        inputs, wanted = (sinusoids(t.float().to(device)).double() for t in (new, old))
        wanted = wanted @ linear.weight.double().T
        design = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        gram = design.T @ design
        ridge = 1e-7 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=device)
        fitted = torch.linalg.solve(gram + ridge, design.T @ wanted)
        worst = max(worst, float((design @ fitted - wanted).abs().max() / wanted.abs().max()))
        linear.weight.copy_(fitted[:-1].T.to(kind))
        linear.bias.add_(fitted[-1].to(kind))
    return worst
