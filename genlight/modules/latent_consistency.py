"""Latent consistency models: a text-to-image UNet taught to sample in a few steps, whole or by low-rank adapters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.consistency import latent_scalings, skipping_steps
from genlight.diffusion.distances import DISTANCES, distance
from genlight.diffusion.noise_schedules import expand
from genlight.diffusion.prediction import Prediction
from genlight.errors import UserError
from genlight.io import save_tensors
from genlight.modules.data_check import check_images
from genlight.modules.latent_parts import (
    HeldPipeline,
    TextConditions,
    copy_with_guidance,
    digest,
    lcm_scheduler,
    predict,
    text_conditions,
)
from genlight.modules.latents import FrozenVAE
from genlight.modules.lora import ATTENTION, LowRankAdapters
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.pipeline import PipelineModule
from genlight.modules.target_network import TargetNetwork, has_stepped, refuse_shards

TARGET = "consistency_target"
LORA_FILE = "pytorch_lora_weights.safetensors"


class LatentConsistencyModule(Optimization, PipelineModule):
    """Latent consistency distillation (Luo et al. 2023) of a diffusers pipeline with a UNet2DConditionModel.

    A step draws a timestep t of `solver_steps`, a guidance w, and compares f(z_t, t, w) with f_target(z_s, s, w), where
    z_s is a DDIM step of the guided teacher from t to s = t - k. The whole UNet is trained, with w as a further
    condition of its time embedding (section 4.1 and 4.2), or low-rank adapters of the UNet, for which w stays in the
    teacher alone (Luo et al. 2023b). It samples through the pipeline with diffusers' LCMScheduler.

    Prompts of a training batch are its "text" (a list of strings), or `caption` filled with the name of its label's
    class. The pipeline is held in float32; of its parts only what is trained belongs to the module's weights.

    Args:
        pretrained: diffusers pipeline folder or hub id (Stable Diffusion 1, 2 or XL); read in ``configure_model``.
        lora_rank: None trains the whole UNet; a number trains adapters of this rank.
        lora_targets: endings of the names of the layers that are adapted.
        guidance_min, guidance_max: range of the guidance scale 1 + w, drawn uniformly.
        solver_steps: timesteps that are trained; the sampler takes its steps among them.
        timestep_scaling: of the boundary condition.
        time_cond_proj_dim: width of the embedding of w.
        distance: "huber", "l2", "l1", "norm" or "pseudo_huber".
        target_decay: how slowly the target follows the student; 0: the student is its own target, as with adapters.
        caption: a text with one {} for the name of a class.
        optimizer, lr_scheduler: as in DiffusionModule.
        num_inference_steps, height, width, batch_size, call: as in PipelineModule.
        guidance_scale: of the samples; None: 8 for a whole UNet, 1 (none) with adapters.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        lora_rank: int | None = None,
        lora_targets: Sequence[str] = ATTENTION,
        guidance_min: float = 6.0,
        guidance_max: float = 16.0,
        solver_steps: int = 50,
        timestep_scaling: float = 10.0,
        time_cond_proj_dim: int = 256,
        distance: str = "huber",
        target_decay: float = 0.95,
        caption: str = "a photo of a {}",
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        num_inference_steps: int = 4,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> None:
        scale = guidance_scale if guidance_scale is not None else (8.0 if lora_rank is None else 1.0)
        self._held = HeldPipeline()  # the base class puts the pipeline into it
        super().__init__(
            pretrained,
            "float32",
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            height=height,
            width=width,
            batch_size=batch_size,
            call=call,
        )
        if not 1 <= guidance_min <= guidance_max:
            raise ValueError(
                f"module: 1 <= guidance_min <= guidance_max is needed, not {guidance_min} and {guidance_max}"
            )
        if not 0 <= target_decay < 1:
            raise ValueError(f"module.target_decay = {target_decay} must be in [0, 1)")
        if not 1 <= num_inference_steps <= solver_steps:
            raise ValueError(
                f"module.num_inference_steps = {num_inference_steps} must be at least 1 and not exceed "
                f"module.solver_steps = {solver_steps}"
            )
        if distance not in DISTANCES or distance == "lpips":
            raise ValueError(f"module.distance = {distance!r} is no distance of latents; use huber, l2 or l1")
        if caption.count("{}") != 1:
            raise ValueError(f"module.caption = {caption!r} must hold one {{}}, the place of the name of the class")
        self.lora_rank, self.lora_targets = lora_rank, tuple(lora_targets)
        self.guidance_range = (float(guidance_min), float(guidance_max))
        self.solver_steps, self.timestep_scaling = solver_steps, float(timestep_scaling)
        self.time_cond_proj_dim, self.distance, self.caption = time_cond_proj_dim, distance, caption
        self.target_decay = 0.0 if lora_rank is not None else float(target_decay)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.target = TargetNetwork()

    @property
    def _pipe(self) -> Any:
        return self._held.pipe

    @_pipe.setter
    def _pipe(self, pipe: Any) -> None:
        self._held.pipe = pipe

    @property
    def prediction(self) -> Prediction:
        """What the network predicts and its noise schedule; see PipelineModule."""
        if self._held.prediction is None:
            self._held.prediction = super().prediction
        return self._held.prediction

    def adopt(self, pipe: Any) -> None:
        """Take a pipeline that is there already, and make the student of its UNet; UserError if that cannot be."""
        self._held.prediction = None
        super().adopt(pipe)
        pipe = self._pipe  # which may be another of the same parts
        unet, prediction = getattr(pipe, "unet", None), self.prediction
        if unet is None or type(unet).__name__ != "UNet2DConditionModel" or prediction.schedule.family != "vp":
            raise UserError(
                f"{self.pretrained}: latent consistency is for pipelines with a UNet2DConditionModel on a "
                f"variance-preserving schedule, not {type(unet).__name__} on {prediction.schedule!r}"
            )
        held = self._held
        held.networks = {**dict(self.networks.items()), "teacher": unet}
        held.vae = FrozenVAE(held.networks["vae"]) if "vae" in held.networks else None
        try:
            pipe.register_modules(scheduler=lcm_scheduler(prediction, self.timestep_scaling, self.solver_steps))
            if self.lora_rank is None:
                student = copy_with_guidance(unet, self.time_cond_proj_dim).requires_grad_(True)
                pipe.register_modules(unet=student)
                del held.networks["unet"]
                self.networks = nn.ModuleDict({"unet": student})
            else:
                adapters = LowRankAdapters(unet, self.lora_rank, self.lora_targets)
                self.networks = nn.ModuleDict({"lora": adapters})
        except ValueError as error:
            raise UserError(f"{self.pretrained}: {error}") from error

    @property
    def _adapters(self) -> LowRankAdapters | None:
        found = dict(self.networks.items()).get("lora")
        return found if isinstance(found, LowRankAdapters) else None

    def check_data(self, datamodule: Any) -> None:
        """The prompts of the data, or of its classes; UserError if it has neither, or images of another size."""
        if hasattr(datamodule, "images"):
            check_images(datamodule, self.image_shape, "the pipeline's channels", "module.height and module.width")
            datamodule.images("train")  # a folder knows its classes when it was read
        names = getattr(datamodule, "class_names", None)
        prompts = getattr(datamodule, "prompts", None) or [self.caption.format(name) for name in names or ()]
        if not prompts:
            raise UserError("the data has neither prompts nor named classes: use data=prompts or one with classes")
        self.prompts = list(prompts)

    def set_sampler(self, sampler: Any) -> None:
        """UserError for any sampler but None: a latent consistency model has its own."""
        if sampler is not None:
            raise UserError("a latent consistency model is sampled by the LCMScheduler, which cannot be searched")

    def on_fit_start(self) -> None:
        """Check that the run can keep a target, before the first step."""
        if self.target_decay > 0:
            refuse_shards(self.trainer, "module.target_decay")

    def training_step(self, batch: Mapping[str, Any], batch_index: int = 0) -> Tensor:
        images = batch["image"]
        loss = self.loss(images, batch["text"] if "text" in batch else self.prompts_of(batch["label"]))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def loss(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Training loss of images [B, 3, H, W] in [-1, 1] and their prompts; draws from torch's global generators."""
        pipe, prediction = self.pipe, self.prediction
        self._held.to(images.device)
        if self._held.vae is None:
            raise UserError(f"{self.pretrained} has no VAE: it cannot be trained on images")
        latents = self._held.vae.encode(images)
        grid, k = skipping_steps(int(prediction.schedule.t_max) + 1, self.solver_steps)
        t = grid[torch.randint(len(grid), (len(images),))].double()
        low, high = self.guidance_range
        scale = low + (high - low) * torch.rand(len(images))
        x = prediction.schedule.add_noise(latents, torch.randn_like(latents), t)
        t_next = (t - k).clamp(min=0)
        text = text_conditions(pipe, list(prompts), (images.shape[-2], images.shape[-1]), images.device)
        x_next = self._teacher_step(x, t, t_next, scale, text)
        student = self._function(pipe.unet, x, t, scale, text)
        target = self.target.of(pipe.unet) if self.target_decay > 0 else pipe.unet
        with torch.no_grad():
            wanted = self._function(target, x_next, t_next, scale, text)
        return distance(self.distance)(student, wanted).mean()

    @torch.no_grad()
    def _teacher_step(self, x: Tensor, t: Tensor, t_next: Tensor, scale: Tensor, text: TextConditions) -> Tensor:
        """A DDIM step of the guided teacher."""
        teacher, prediction = self._held.networks["teacher"], self.prediction
        with self._adapters.off() if self._adapters is not None else nullcontext():
            output = predict(teacher, torch.cat([x, x]), torch.cat([t, t]), text.doubled())
        conditional, unconditional = output.chunk(2)
        guided = unconditional + expand(scale, x) * (conditional - unconditional)
        x0, noise = prediction.to_x0(guided, x, t), prediction.to_epsilon(guided, x, t)
        return prediction.schedule.add_noise(x0, noise, t_next)

    def _function(self, network: Any, x: Tensor, t: Tensor, scale: Tensor, text: TextConditions) -> Tensor:
        """f(x, t, w) = c_skip x + c_out x̂_0 of a network."""
        condition = None
        if self.lora_rank is None:
            condition = self.pipe.get_guidance_scale_embedding(scale - 1, self.time_cond_proj_dim).to(x.device)
        output = predict(network, x, t, text, condition)
        c_skip, c_out = latent_scalings(t, self.timestep_scaling)
        return expand(c_skip, x) * x + expand(c_out, x) * self.prediction.to_x0(output, x, t)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """The optimizer's step, and after it the target's: μ target + (1 - μ) student."""
        super().optimizer_step(*args, **options)
        if self.target_decay > 0 and has_stepped(self.trainer):
            self.target.follow(self.pipe.unet, self.target_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (state := self.target.state()) is not None:
            checkpoint[TARGET] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.target = TargetNetwork(checkpoint.get(TARGET))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        self.configure_model()
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _call(self, scheduler: Any, count: int, arguments: Mapping[str, Any]) -> Tensor:
        """As in PipelineModule, with the parts that are no submodules on the module's device."""
        self._held.to(self.device)
        return super()._call(scheduler, count, arguments)

    def fingerprint(self, state: Mapping[str, Tensor] | None = None) -> str:
        """SHA-256 over the description and the trained weights; of ``state`` where it is given."""
        self.configure_model()
        self._weights_digest = {} if state is None else {self.pipe.dtype: digest(state)}
        return super().fingerprint()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline as a diffusers folder with its LCMScheduler, or the adapters alone.

        Adapters are `pytorch_lora_weights.safetensors`, for `load_lora_weights` of the pipeline they were trained on,
        with an LCMScheduler as in `scheduler/`.
        """
        self.configure_model()
        lora = self._adapters
        if lora is None:
            super().save_pretrained(folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        facts = {"format": "pt", "base_model": str(self.pretrained), "rank": json.dumps(self.lora_rank)}
        save_tensors(Path(folder) / LORA_FILE, lora.tensors(), facts)
        self.pipe.scheduler.save_pretrained(str(Path(folder) / "scheduler"))
