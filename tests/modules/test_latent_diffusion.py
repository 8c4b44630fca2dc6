"""Text-to-image diffusion from the start: its losses, its training, its folder, and what it refuses."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from genlight.callbacks.step_seed import StepSeed
from genlight.data.digits import DigitsDataModule
from genlight.diffusion.noise_schedules import FlowSchedule, VPSchedule
from genlight.errors import UserError
from genlight.modules.latent_diffusion import LatentDiffusionModule
from genlight.modules.pipeline import PipelineModule
from genlight.nets.letters import letter_text_encoder

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def module_of(tiny: Any, **options: Any) -> LatentDiffusionModule:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=1, block_out_channels=(4,), norm_num_groups=2,
        mid_block_add_attention=False, scaling_factor=0.5,
    )  # fmt: skip
    given: dict[str, Any] = {
        "names": NAMES,
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
        "scheduler": functools.partial(diffusers.DPMSolverMultistepScheduler, timestep_spacing="trailing"),
        "num_inference_steps": 2,
        "height": 8,
        "width": 8,
        **options,
    }
    encoder = letter_text_encoder(hidden_size=8, num_hidden_layers=1)
    return LatentDiffusionModule(tiny.condition_unet(), vae, encoder, VPSchedule("squaredcos_cap_v2"), **given)


def data_of(**options: Any) -> DigitsDataModule:
    given = {"image_size": 8, "channels": 1, "num_classes": 10, "seed": 0, **options}
    return DigitsDataModule(batch_size=8, eval_batch_size=4, num_samples=4, **given)


def ready(tiny: Any, **options: Any) -> LatentDiffusionModule:
    module = module_of(tiny, **options)
    module.configure_model()
    module.check_data(data_of())
    return module


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_loss_is_that_of_the_three_parts(tiny: Any) -> None:
    """Against the definitions, with the draws in the order in which the module makes them."""
    module = ready(tiny, prompt_dropout=0.5, kl_weight=0.1)
    prompts = [module.prompts[i] for i in range(6)]
    torch.manual_seed(3)
    found = module.loss(images(), prompts)

    torch.manual_seed(3)
    vae, unet, pipe = module.networks["vae"], module.networks["unet"], module.pipe
    posterior = vae.encode(images()).latent_dist
    mean, deviation = posterior.mean, posterior.logvar.mul(0.5).exp()
    code = mean + deviation * torch.randn_like(mean)
    fit = (vae.decode(code).sample - images()).square().mean()
    pull = 0.5 * (mean**2 + deviation**2 - 1 - posterior.logvar).mean()
    x0 = code.detach() * 0.5
    t = torch.floor(torch.rand(6, dtype=torch.float64) * 1000)
    noise = torch.randn_like(x0)
    kept = torch.rand(6) >= 0.5
    assert 0 < kept.sum() < 6
    alpha = pipe.scheduler.alphas_cumprod[t.long()].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    ids = pipe.tokenizer(
        [prompt if keep else "" for prompt, keep in zip(prompts, kept, strict=True)],
        padding="max_length", max_length=16, return_tensors="pt",
    ).input_ids  # fmt: skip
    text = pipe.text_encoder(ids).last_hidden_state
    output = unet(alpha * x0 + sigma * noise, t, encoder_hidden_states=text).sample
    denoising = (output - (alpha * noise - sigma * x0)).square().mean()
    assert found.item() == pytest.approx((denoising + fit + 0.1 * pull).item(), rel=1e-4)


def test_training_changes_network_and_autoencoder_alone_and_lowers_the_loss(tiny: Any, tmp_path: Path) -> None:
    module = ready(tiny)
    before = {name: value.clone() for name, value in module.networks.state_dict().items()}

    def loss() -> float:
        torch.manual_seed(5)
        with torch.no_grad():
            return float(module.loss(images(64), [module.prompts[i % 10] for i in range(64)]))

    first = loss()
    trainer = Trainer(
        max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, default_root_dir=str(tmp_path), callbacks=[StepSeed(0)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data_of())
    after = module.networks.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "vae"} and loss() < first


def test_its_folder_is_a_pipeline_that_samples_the_same(tiny: Any, tmp_path: Path) -> None:
    module = ready(tiny)
    noise = torch.randn(3, *module.sample_shape, generator=torch.Generator().manual_seed(2))
    expected = module.sample(noise, torch.tensor([3, 0, 9]))
    assert expected.shape == (3, 1, 8, 8) and module.prompts[3] == "a photo of a three"
    module.save_pretrained(tmp_path / "model")

    plain = PipelineModule(str(tmp_path / "model"), num_inference_steps=2, guidance_scale=1.0, height=8, width=8)
    plain.configure_model()
    plain.prompts = module.prompts
    assert torch.equal(plain.sample(noise, torch.tensor([3, 0, 9])), expected)
    again = module_of(tiny)
    again.load_pretrained(tmp_path / "model")
    again.check_data(data_of())
    assert torch.equal(again.sample(noise, torch.tensor([3, 0, 9])), expected)
    assert sum(p.requires_grad for p in again.networks["unet"].parameters()) > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(["a photo of a three"], latents=noise[:1], num_inference_steps=2, guidance_scale=1.0, height=8, width=8,
                output_type="pt").images  # fmt: skip
    assert torch.allclose(2 * made - 1, expected[:1], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"prompt_dropout": 1.0}, "prompt_dropout = 1.0"),
        ({"kl_weight": -1.0}, "kl_weight = -1.0"),
        ({"height": 28}, "height = 28"),
        ({"caption": "a photo"}, "caption = 'a photo'"),
    ],
)
def test_settings_are_checked(tiny: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        module_of(tiny, **options)


def test_data_that_does_not_fit_is_refused(tiny: Any) -> None:
    with pytest.raises(UserError, match="2 names for 10 classes"):
        ready(tiny, names=["one", "two"])
    with pytest.raises(UserError, match=r"data\.image_size = 16"):
        ready(tiny).check_data(data_of(image_size=16))
    with pytest.raises(ValueError, match="DDIMScheduler"):
        unfit = module_of(tiny)
        unfit.noise_schedule = FlowSchedule()
        unfit.configure_model()
