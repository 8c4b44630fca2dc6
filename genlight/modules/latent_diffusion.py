"""Text-to-image diffusion trained from the start: a network in the latents of an autoencoder fitted beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genlight.diffusion.noise_schedules import NoiseSchedule
from genlight.diffusion.schedulers import build_scheduler
from genlight.diffusion.timestep_samplers import UniformTimesteps
from genlight.errors import UserError
from genlight.modules.data_check import check_images
from genlight.modules.exported_pipeline import latent_statistics
from genlight.modules.latent_parts import TextConditions, predict, text_conditions
from genlight.modules.networks import check_state_dict
from genlight.modules.optimization import Optimization
from genlight.modules.pipeline import PipelineModule
from genlight.modules.pipeline_calls import SchedulerChoice
from genlight.nets.letters import letter_tokenizer


class LatentDiffusionModule(Optimization, PipelineModule):
    """A Stable Diffusion of small networks (Rombach et al. 2022), saved and sampled as a diffusers pipeline.

    A step fits the autoencoder to its images, by their squared error and a weak pull of the latents to a unit Gaussian,
    and the network to the noise in these latents, from which no gradient goes back. The text encoder stays as it is. A
    class is told by a prompt: `caption` filled with its name.

    Args:
        unet: a `UNet2DConditionModel` with as many channels as the latents.
        vae: an `AutoencoderKL`.
        text_encoder: a `CLIPTextModel` for `letter_tokenizer`.
        noise_schedule: variance-preserving, as pipelines with such networks have.
        prediction_type: what the network predicts.
        caption: a text with one {} for the name of a class.
        names: of the classes; None: those of the data.
        prompt_dropout: share of training prompts that are left empty, for guidance.
        kl_weight: of the pull of the latents.
        optimizer, lr_scheduler: as in DiffusionModule.
        num_inference_steps, guidance_scale, height, width, batch_size, scheduler: as in PipelineModule.

    Raises:
        ValueError: a value out of range, naming the config key.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        noise_schedule: NoiseSchedule,
        *,
        prediction_type: str = "v_prediction",
        caption: str = "a photo of a {}",
        names: Sequence[str] | None = None,
        prompt_dropout: float = 0.1,
        kl_weight: float = 1e-3,
        optimizer: Callable[..., Any] | None = None,
        lr_scheduler: Callable[..., Any] | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        scheduler: SchedulerChoice | None = None,
    ) -> None:
        super().__init__(
            "",
            "float32",
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            batch_size=batch_size,
            scheduler=scheduler,
        )
        for key, value in {"height": height, "width": width}.items():
            if value is not None and value % 8:
                raise ValueError(f"module.{key} = {value} must be a multiple of 8, as Stable Diffusion's pipeline asks")
        if not 0 <= prompt_dropout < 1:
            raise ValueError(f"module.prompt_dropout = {prompt_dropout} must be in [0, 1)")
        if kl_weight < 0:
            raise ValueError(f"module.kl_weight = {kl_weight} must not be negative")
        if caption.count("{}") != 1:
            raise ValueError(f"module.caption = {caption!r} must hold one {{}}, the place of the name of the class")
        self._parts: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        self.noise_schedule, self.prediction_type = noise_schedule, prediction_type
        self.caption, self.names = caption, None if names is None else tuple(names)
        self.prompt_dropout, self.kl_weight = float(prompt_dropout), float(kl_weight)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def configure_model(self) -> None:
        """Make the pipeline of the configured networks, once; not where one was read before."""
        if self._pipe is not None:
            return
        import diffusers

        made: Any = diffusers.StableDiffusionPipeline
        pipe = made(
            **self._parts,
            tokenizer=letter_tokenizer(self._parts["text_encoder"].config.max_position_embeddings),
            # the options without which the pipeline warns of an old folder
            scheduler=build_scheduler(
                "DDIMScheduler", self.noise_schedule, self.prediction_type, steps_offset=1, clip_sample=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        self.adopt(pipe)

    def adopt(self, pipe: Any) -> None:
        """Take a pipeline that is there already, to train its network and its autoencoder; UserError without them."""
        super().adopt(pipe)
        for name in ("unet", "vae"):
            if name not in self.networks:
                raise UserError(f"module: {type(pipe).__name__} has no {name} to train")
            self.networks[name].requires_grad_(True)
        self._trained = self.prediction

    def check_data(self, datamodule: Any) -> None:
        """The prompts of the data's classes; UserError without classes, or for images of another size."""
        check_images(datamodule, self.image_shape, "the channels of module.vae", "module.height and module.width")
        names = self.names or tuple(getattr(datamodule, "class_names", ()))
        if not names or len(names) != datamodule.num_classes:
            raise UserError(f"module.names: {len(names)} names for {datamodule.num_classes} classes of the data")
        self.prompts = [self.caption.format(name) for name in names]

    def training_step(self, batch: Mapping[str, Any], batch_index: int = 0) -> Tensor:
        images = batch["image"]
        loss = self.loss(images, self.prompts_of(batch["label"]))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def loss(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Both losses of images [B, C, H, W] in [-1, 1] and their prompts; draws from torch's global generators."""
        vae: Any = self.networks["vae"]
        prediction = self._trained
        posterior = vae.encode(images).latent_dist
        code = posterior.sample()
        fit = (vae.decode(code).sample - images).square().mean()
        pull = posterior.kl().mean() / code[0].numel()
        shift, scale = latent_statistics(vae)
        x0 = (code.detach() - shift) * scale
        t = UniformTimesteps().sample(prediction.schedule, len(x0))
        noise = torch.randn_like(x0)
        x_t = prediction.schedule.add_noise(x0, noise, t)
        text = text_conditions(self.pipe, list(prompts), (images.shape[-2], images.shape[-1]), images.device)
        kept = (torch.rand(len(x0), 1, 1) >= self.prompt_dropout).to(x0.device)
        text = TextConditions(torch.where(kept, text.embedding, text.empty), text.empty)
        output = predict(self.networks["unet"], x_t, t, text)
        denoising = (output - prediction.target(x0, noise, t)).square().mean()
        loss: Tensor = denoising + fit + self.kl_weight * pull
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; what does not fit raises a UserError that names the first keys."""
        self.configure_model()
        if strict:
            check_state_dict(state_dict, self.state_dict(), "the checkpoint")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
