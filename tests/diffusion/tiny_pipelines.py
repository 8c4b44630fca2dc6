"""Pipelines of diffusers with tiny random networks: no downloads, no tokenizers, prompts given as embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from genlight.diffusion.noise_schedules import FlowSchedule, NoiseSchedule, VPSchedule
from genlight.diffusion.prediction import Prediction
from genlight.diffusion.schedulers import build_scheduler

VP = VPSchedule("scaled_linear", 0.00085, 0.012)
VP_DIT = VPSchedule("linear", 0.0001, 0.02)
FLOW = FlowSchedule(shift=3.0)


class Probe(diffusers.DDIMScheduler):
    """One step that returns what the pipeline's network says, guidance included."""

    def ask(self, time: Tensor) -> "Probe":
        self.asked = time.reshape(1)
        return self

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, mu: Any = None, sigmas: Any = None
    ) -> None:
        self.timesteps = self.asked
        self.sigmas = torch.zeros(2)

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        return model_output, model_output  # PixArt takes the second when there is one step


@dataclass
class Tiny:
    """A pipeline, what its network was made for, and the arguments of its calls; `shape` is that of its latents."""

    pipe: Any
    prediction: Prediction
    arguments: dict[str, Any]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # DiT drops labels while it trains

    def noise(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(3))

    def __call__(self, scheduler: Any, steps: int, **arguments: Any) -> Tensor:
        """What the pipeline makes of a fixed noise."""
        self.pipe.scheduler = scheduler
        arguments = {"latents": self.noise(), **self.arguments, **arguments}
        return self.pipe(num_inference_steps=steps, return_dict=False, **arguments)[0]

    def model(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The guided network at one point, as genlight calls it: a call of the pipeline with one step."""
        return self(Probe().ask(timestep[0]), 1, latents=x)

    def finish(self, latents: Tensor) -> Tensor:
        """What the pipeline returns for final latents."""
        return latents


class TinyDiT(Tiny):
    """DiTPipeline draws its noise itself, and returns images."""

    def __call__(self, scheduler: Any, steps: int, **arguments: Any) -> Tensor:
        self.pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(3)
        arguments = {"generator": generator, **self.arguments, **arguments}
        return torch.as_tensor(self.pipe(num_inference_steps=steps, return_dict=False, **arguments)[0])

    @torch.no_grad()
    def model(self, x: Tensor, timestep: Tensor) -> Tensor:
        labels = torch.tensor([*self.arguments["class_labels"], 1000, 1000])
        both = self.pipe.transformer(torch.cat([x, x]), timestep=timestep.repeat(2), class_labels=labels).sample
        conditional, unconditional = both[:, : x.shape[1]].chunk(2)
        return unconditional + self.arguments["guidance_scale"] * (conditional - unconditional)

    @torch.no_grad()
    def finish(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def _unet(**options: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        **options,
    )


def _scheduler(prediction: Prediction) -> Any:
    from genlight.diffusion.schedulers import build_scheduler

    flow = prediction.schedule.family == "flow"
    name = "FlowMatchEulerDiscreteScheduler" if flow else "DPMSolverMultistepScheduler"
    options = {} if flow else {"steps_offset": 1}
    return build_scheduler(name, prediction.schedule, prediction.prediction_type, **options)


def _embeddings(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion(schedule: NoiseSchedule = VP, prediction_type: str = "epsilon") -> Tiny:
    prediction = Prediction(prediction_type, schedule)
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    arguments = {
        "prompt_embeds": _embeddings(2, 5, 8),
        "negative_prompt_embeds": _embeddings(2, 5, 8, seed=2),
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (2, 4, 8, 8))


def stable_diffusion_xl() -> Tiny:
    prediction = Prediction("v_prediction", VP)
    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
        use_linear_projection=True,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_scheduler(prediction),
        add_watermarker=False,
    )
    pipe.text_encoder_2 = None
    arguments = {
        "prompt_embeds": _embeddings(2, 5, 8),
        "pooled_prompt_embeds": _embeddings(2, 8),
        "guidance_scale": 1.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (2, 4, 8, 8))


def pixart() -> Tiny:
    prediction = Prediction("epsilon", VP_DIT)
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=_scheduler(prediction)
    )
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": _embeddings(2, 5, 8),
        "prompt_attention_mask": torch.ones(2, 5),
        "negative_prompt_embeds": _embeddings(2, 5, 8, seed=2),
        "negative_prompt_attention_mask": torch.ones(2, 5),
        "use_resolution_binning": False,
        "height": 64,
        "width": 64,
        "guidance_scale": 2.0,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (2, 4, 8, 8))


def dit() -> Tiny:
    prediction = Prediction("epsilon", VP_DIT)
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer, vae, _scheduler(prediction))
    arguments = {"class_labels": [1, 7], "guidance_scale": 2.0, "output_type": "pt"}
    return TinyDiT(pipe, prediction, arguments, (2, 4, 8, 8))


def stable_diffusion_3() -> Tiny:
    prediction = Prediction("flow", FLOW)
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "vae")
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=_scheduler(prediction), **dict.fromkeys(names)
    )
    arguments = {
        "prompt_embeds": _embeddings(2, 5, 32),
        "pooled_prompt_embeds": _embeddings(2, 64),
        "negative_prompt_embeds": _embeddings(2, 5, 32, seed=2),
        "negative_pooled_prompt_embeds": _embeddings(2, 64, seed=2),
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (2, 4, 8, 8))


def flux() -> Tiny:
    prediction = Prediction("flow", FLOW)
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    names = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxPipeline(transformer=transformer, scheduler=_scheduler(prediction), **dict.fromkeys(names))
    arguments = {
        "prompt_embeds": _embeddings(2, 5, 32),
        "pooled_prompt_embeds": _embeddings(2, 32),
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (2, 16, 4))


def latte() -> Tiny:
    prediction = Prediction("epsilon", VP_DIT)
    torch.manual_seed(0)
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        video_length=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = diffusers.LattePipeline(None, None, None, transformer, _scheduler(prediction))
    arguments = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": _embeddings(1, 5, 32),
        "negative_prompt_embeds": _embeddings(1, 5, 32, seed=2),
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "video_length": 2,
        "mask_feature": False,
        "clean_caption": False,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (1, 4, 2, 8, 8))


def wan() -> Tiny:
    prediction = Prediction("flow", FLOW)
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=_scheduler(prediction)
    )
    arguments = {
        "prompt_embeds": _embeddings(1, 5, 16),
        "negative_prompt_embeds": _embeddings(1, 5, 16, seed=2),
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "output_type": "latent",
    }
    return Tiny(pipe, prediction, arguments, (1, 4, 2, 8, 8))


PIPELINES: dict[str, Callable[[], Tiny]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "dit": dit,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "latte": latte,
    "wan": wan,
}


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and bool(expected.isfinite().all())
    return ((found - expected).abs().max() / expected.abs().max()).item()


def stock(prediction: Prediction) -> tuple[Any, str]:
    """The stock scheduler of a family and the preset of the same name."""
    if prediction.schedule.family == "flow":
        return build_scheduler("FlowMatchEulerDiscreteScheduler", prediction.schedule, "flow"), "flow_euler"
    name = "DPMSolverMultistepScheduler"
    return build_scheduler(name, prediction.schedule, prediction.prediction_type, steps_offset=1), "dpmpp_2m"
