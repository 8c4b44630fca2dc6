"""Sampling from a diffusers network, in one file that needs torch and diffusers only.

genlight samples with the functions of this file, and copies the file as ``pipeline.py`` into the folders whose model no
stock diffusers pipeline can sample, so that both always compute the same images. Such a folder loads anywhere with
``DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)``.
"""

# diffusers gives its lazily imported classes no types
# mypy: disable-error-code="attr-defined,no-untyped-call,no-any-return"

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# a network of diffusers: a torch module with a config
Network = Any
Generators = torch.Generator | list[torch.Generator] | None


def network_style(network: Network) -> str:
    """Which forward signature a diffusers network has: "unet2d", "unet2d_condition" or "dit"; TypeError for others."""
    styles = {UNet2DModel: "unet2d", UNet2DConditionModel: "unet2d_condition", DiTTransformer2DModel: "dit"}
    inner = getattr(network, "_orig_mod", network)  # of one that torch.compile has wrapped
    for kind, style in styles.items():
        if isinstance(inner, kind):
            return style
    raise TypeError(
        f"network is a {type(network).__name__}; expected UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel"
    )


def network_shape(network: Network) -> tuple[int, int, int]:
    """Shape (C, H, W) of one input of the network, read from its config; ValueError when sample_size is not set."""
    size = network.config.sample_size
    if size is None:
        raise ValueError(f"{type(network).__name__} has no sample_size: set network.sample_size to the image size")
    height, width = (size, size) if isinstance(size, int) else size
    return int(network.config.in_channels), int(height), int(width)


def predict(network: Network, style: str, x: Tensor, timestep: Tensor, label: Tensor | None) -> Tensor:
    """The network's prediction in float32, without the learned variance.

    Args:
        style: the forward signature, see :func:`network_style`.
        x: network input [B, C, H, W], already scaled; cast here to the precision of the network.
        timestep: [B], as the network was trained: an index, 1000 t or c_noise.
        label: class index [B], or None for a network without classes.

    Returns:
        [B, C, H, W]; the second C of 2 C output channels (learned variance, DiT section 3.1) are dropped.
    """
    h = x.to(next(network.parameters()).dtype)
    if style == "dit":
        if label is None:  # the network cannot be called without a label: all samples are of the null class
            label = torch.full((len(x),), int(network.config.num_embeds_ada_norm), device=x.device)
        output = network(h, timestep=timestep, class_labels=label, return_dict=False)[0]
    elif style == "unet2d":
        output = network(h, timestep, class_labels=label, return_dict=False)[0]
    else:
        context = None  # no text: an empty prompt of zeros where the network has cross-attention
        width = network.config.encoder_hid_dim or network.config.cross_attention_dim
        if isinstance(width, int):
            context = h.new_zeros(len(x), 1, width)
        output = network(h, timestep, encoder_hidden_states=context, class_labels=label, return_dict=False)[0]
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    return output.float()


def guided_prediction(
    network: Network,
    style: str,
    x: Tensor,
    timestep: Tensor,
    label: Tensor | None,
    scale: float,
    null_label: int | None,
) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond), both from one doubled batch (Ho and Salimans, eq. 6).

    ``scale`` is 1 + w of the paper. At scale 1, or without labels, the network runs on the plain batch.
    """
    if label is None or scale == 1.0:
        return predict(network, style, x, timestep, label)
    if null_label is None:
        raise ValueError(f"guidance with scale {scale} needs the index of the null class")
    null = torch.full_like(label, null_label)
    both = predict(network, style, torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([label, null]))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def denoise(
    network: Network,
    style: str,
    scheduler: Any,
    noise: Tensor,
    label: Tensor | None = None,
    *,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
    null_label: int | None = None,
    generator: Generators = None,
) -> Tensor:
    """Integrate from unit noise [B, C, H, W] to samples of the same shape, in float32, by a diffusers scheduler.

    The scheduler is changed (its timesteps are set), so give a fresh one to each call. ``generator`` serves
    schedulers that add noise in their steps; a list holds one generator per sample.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scale_input = getattr(scheduler, "scale_model_input", None)
    x = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scaled = scale_input(x, t) if scale_input else x
        timestep = t.to(noise.device).expand(len(x))
        output = guided_prediction(network, style, scaled, timestep, label, guidance_scale, null_label)
        x = scheduler.step(output, t, x, **extra, return_dict=False)[0].float()
    return x


def latent_statistics(vae: Network) -> tuple[Any, Any]:
    """(shift, scale) with network latents = (VAE latents - shift) * scale, as numbers or [1, C, 1, 1] tensors."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return config.get("shift_factor") or 0.0, scale
    mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, -1, 1, 1)
    return mean, scale / std


def decode_latents(vae: Network | None, latents: Tensor) -> Tensor:
    """Images [B, C, H, W], nominally in [-1, 1] but not clipped, from the samples of the network."""
    if vae is None:
        return latents
    parameter = next(vae.parameters())
    shift, scale = (s.to(latents.device) if isinstance(s, Tensor) else s for s in latent_statistics(vae))
    return vae.decode((latents / scale + shift).to(parameter.dtype), return_dict=False)[0].float()


class GenerationPipeline(DiffusionPipeline):
    """Images from a UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, by class if the network has classes.

    Args:
        scheduler: a diffusers scheduler consistent with the training.
        unet, transformer: the network, under the name its kind has in diffusers.
        vae: decoder for networks that work in a latent space.
        num_classes: number of classes; the null class of the guidance has this index. None without classes.
        guidance_scale, num_inference_steps: what a call takes when it does not say.
        id2label: class names by index (JSON keys are strings).
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012 - as diffusers declares it

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        num_classes: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        self.register_to_config(
            num_classes=num_classes,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            id2label=id2label,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Tensor | list[int] | int | None = None,
        batch_size: int = 1,
        latents: Tensor | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image per class label, or ``batch_size`` images.

        ``latents`` [B, C, H, W] is the unit noise to start from, drawn with ``generator`` if not given. Without
        ``class_labels`` a network with classes draws them uniformly. ``output_type``: "pil", "np" or "pt", in [0, 1].
        """
        network = self.unet if self.unet is not None else self.transformer
        device = self._execution_device
        label = None
        if isinstance(class_labels, int):
            class_labels = [class_labels]
        if self.config.num_classes is not None:
            if class_labels is None:
                size = len(latents) if latents is not None else batch_size
                first = generator[0] if isinstance(generator, list) else generator
                where = first.device if first is not None else "cpu"
                class_labels = torch.randint(self.config.num_classes, (size,), generator=first, device=where)
            label = torch.as_tensor(class_labels, device=device).long().reshape(-1)
            batch_size = len(label)
        if latents is None:
            latents = randn_tensor((batch_size, *network_shape(network)), generator, device, torch.float32)
        samples = denoise(
            network,
            network_style(network),
            type(self.scheduler).from_config(self.scheduler.config),
            latents.to(device),
            label,
            num_inference_steps=num_inference_steps or self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
            null_label=self.config.num_classes,
            generator=generator,
        )
        images: Any = (decode_latents(self.vae, samples) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
