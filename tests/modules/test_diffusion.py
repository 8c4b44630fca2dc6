import functools
import inspect
import math

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from genlight.diffusion.noise_schedules import VPSchedule
from genlight.diffusion.weightings import MinSNR
from genlight.errors import UserError
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.lr_schedules import warmup_cosine


def _images(count=6, shape=(1, 8, 8)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _record_calls(module):
    """Replaces the forward of the network; returns the list of (input, timestep, label) it is called with."""
    calls, forward = [], module.network.forward

    def recorded(sample, timestep, class_labels=None, **options):
        calls.append((sample.detach(), timestep.detach(), class_labels))
        return forward(sample, timestep, class_labels=class_labels, **options)

    module.network.forward = recorded
    return calls


def test_v_prediction_loss_is_that_of_diffusers_formulas(tiny):
    from diffusers import DDPMScheduler

    module = tiny.module("vp", loss_weighting=MinSNR(5.0))
    calls, images = _record_calls(module), _images()
    torch.manual_seed(3)
    loss = module.loss(images)

    x_t, timestep, _ = calls[0]
    reference = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    t = timestep.long()
    assert torch.equal(t.float(), timestep)
    signal = reference.alphas_cumprod[t].double().view(-1, 1, 1, 1)
    noise = ((x_t - signal.sqrt() * images) / (1 - signal).sqrt()).float()
    torch.testing.assert_close(reference.add_noise(images, noise, t), x_t, atol=1e-5, rtol=1e-5)
    error = (module.network(x_t, timestep).sample - reference.get_velocity(images, noise, t)).square().mean((1, 2, 3))
    snr = (signal / (1 - signal)).flatten()
    expected = (error * snr.clamp(max=5.0) / (snr + 1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_edm_loss_is_equation_8_of_karras(tiny):
    from genlight.diffusion.weightings import EDMWeighting

    module = tiny.module("edm", loss_weighting=EDMWeighting(0.5))
    calls, images = _record_calls(module), _images()
    torch.manual_seed(3)
    loss = module.loss(images)

    scaled, c_noise, _ = calls[0]
    sigma = torch.exp(4 * c_noise.double()).view(-1, 1, 1, 1)
    variance = sigma**2 + 0.25
    noisy = scaled * variance.sqrt()
    raw = module.network(scaled, c_noise).sample
    denoised = 0.25 / variance * noisy + sigma * 0.5 / variance.sqrt() * raw
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight * (denoised - images) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_loss_of_the_true_answer_is_zero(tiny, kind):
    module = tiny.module(kind)
    images = _images()

    def oracle(sample, timestep, class_labels=None, return_dict=False):
        if kind == "flow":
            t = (timestep.double() / 1000).view(-1, 1, 1, 1)
            noise = (sample - (1 - t) * images) / t
            return ((noise - images).float(),)
        alpha = VPSchedule("linear").alpha(timestep).view(-1, 1, 1, 1)
        return (((sample - alpha * images) / (1 - alpha**2).sqrt()).float(),)

    module.network.forward = oracle
    assert module.loss(images).item() < 1e-6


def test_labels_are_dropped_at_the_configured_rate(tiny):
    module = tiny.module("vp", class_conditional=True, num_classes=3, label_dropout=0.3)
    assert module.network.config.num_class_embeds == 4
    torch.manual_seed(0)
    label = torch.arange(20_000) % 3
    seen = module._training_label(label)
    dropped = seen == 3
    assert torch.equal(seen[~dropped], label[~dropped])
    # five standard deviations of a binomial share
    assert abs(dropped.float().mean().item() - 0.3) < 5 * math.sqrt(0.21 / 20_000)


def test_label_embedding_of_a_dit_drops_nothing_by_itself(tiny):
    module = tiny.module("vp", tiny.dit(), class_conditional=True, num_classes=3, label_dropout=0.0)
    x, t, label = _images(4), torch.full((4,), 10.0), torch.tensor([0, 1, 2, 0])
    module.train()
    with torch.no_grad():
        outputs = [module.predict(x, t, label) for _ in range(8)]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_guidance_is_uncond_plus_scale_times_difference_in_one_call(tiny):
    module = tiny.module("vp", class_conditional=True, num_classes=3, num_inference_steps=1)
    noise, label = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    calls = _record_calls(module)
    guided = module.sample_latents(noise, label, guidance_scale=2.5)
    assert [len(x) for x, _, _ in calls] == [8]
    t = calls[0][1][:4]
    with torch.no_grad():
        conditional = module.predict(noise, t, label)
        unconditional = module.predict(noise, t, torch.full_like(label, 3))
    scheduler = module.build_scheduler()
    scheduler.set_timesteps(1)
    expected = scheduler.step(
        unconditional + 2.5 * (conditional - unconditional), scheduler.timesteps[0], noise
    ).prev_sample
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)


def test_guidance_of_one_runs_the_plain_batch_and_zero_is_unconditional(tiny):
    module = tiny.module("vp", class_conditional=True, num_classes=3, num_inference_steps=2)
    noise, label = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    calls = _record_calls(module)
    module.sample_latents(noise, label)
    assert [len(x) for x, _, _ in calls] == [4, 4]
    zero = module.sample_latents(noise, label, guidance_scale=0.0)
    null = module.sample_latents(noise, torch.full_like(label, 3))
    torch.testing.assert_close(zero, null, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vp", "epsilon", "edm", "flow"])
def test_a_sample_does_not_depend_on_its_batch_nor_on_earlier_calls(tiny, kind):
    module = tiny.module(kind)
    noise = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    whole = module.sample(noise)
    parts = torch.cat([module.sample(part) for part in noise.split([1, 3, 1])])
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    assert torch.equal(whole, module.sample(noise))
    assert whole.abs().max() <= 1.0


def test_sampling_restores_the_training_mode_and_leaves_the_global_generator_alone(tiny):
    module = tiny.module("epsilon", tiny.unet(dropout=0.5)).train()
    noise = torch.randn(2, 1, 8, 8)
    state = torch.get_rng_state()
    first = module.sample(noise)
    assert module.network.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, module.sample(noise))


def test_learned_variance_is_dropped(tiny):
    module = tiny.module("vp", tiny.dit(out_channels=2), class_conditional=True, num_classes=3)
    x, t, label = _images(2), torch.tensor([5.0, 9.0]), torch.tensor([1, 2])
    output = module.predict(x, t, label)
    full = module.network(x, timestep=t, class_labels=label).sample
    assert full.shape[1] == 2
    assert torch.equal(output, full[:, :1])
    assert module.loss(x, label).requires_grad
    assert module.sample(torch.randn(2, 1, 8, 8), label).shape == (2, 1, 8, 8)


def test_latents_are_shifted_and_scaled_and_the_vae_stays_out_of_the_weights(tiny):
    vae = tiny.vae(scaling_factor=0.5, shift_factor=0.25)
    module = tiny.module("vp", tiny.unet(4, 4), vae=vae)
    assert (module.sample_shape, module.image_shape) == ((4, 4, 4), (3, 8, 8))
    images = _images(2, (3, 8, 8))
    torch.manual_seed(0)
    latents = module.vae.encode(images)
    torch.manual_seed(0)
    expected = (vae.encode(images).latent_dist.sample() - 0.25) * 0.5
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(module.vae.decode(latents), vae.decode(latents / 0.5 + 0.25).sample)

    assert not any("vae" in name for name in module.state_dict())
    module.loss(images).backward()
    assert all(p.grad is None for p in vae.parameters())
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in module.network.parameters())


@pytest.mark.parametrize("name", ["VQModel", "AutoencoderTiny"])
def test_other_autoencoders_encode_and_decode(tiny, name):
    import diffusers

    if name == "VQModel":
        vae = diffusers.VQModel(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16)
        size = 8
    else:
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
        size = 4
    module = tiny.module("vp", tiny.unet(size, 4), vae=vae)
    assert module.image_shape == (3, 8, 8)
    assert module.loss(_images(2, (3, 8, 8))).isfinite()
    assert module.sample(torch.randn(2, 4, size, size)).shape == (2, 3, 8, 8)


def test_condition_unet_takes_labels_without_text(tiny):
    module = tiny.module("vp", tiny.condition_unet(), class_conditional=True, num_classes=3)
    label = torch.tensor([0, 1])
    assert module.loss(_images(2), label).isfinite()
    noise = torch.randn(2, 1, 8, 8)
    assert not torch.equal(module.sample(noise, label), module.sample(noise, label.flip(0)))


def test_half_precision_networks_sample_in_float32_latents(tiny):
    module = tiny.module("vp", tiny.unet().to(torch.bfloat16))
    samples = module.sample_latents(torch.randn(2, 1, 8, 8))
    assert samples.dtype == torch.float32
    assert samples.isfinite().all()


def test_compiling_keeps_the_names_of_the_weights(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(1) or call)
    module = tiny.module("vp", compile=True)
    names = list(module.state_dict())
    module.configure_model()
    module.configure_model()
    assert compiled == [1]
    assert list(module.state_dict()) == names == list(tiny.module("vp").state_dict())


class _Metric(torch.nn.Module):
    """Counts images; has weights of its own, as a feature network does."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Linear(2, 2)
        self.count = 0

    def reset(self):
        self.count = 0

    def update(self, images, index=None):
        self.count += len(images)

    def compute(self):
        return {"fd_test": float(self.count)}


def _fit(module, path, max_steps, ckpt_path=None):
    images = DataLoader([{"image": image} for image in _images(8)], batch_size=4)
    noise = DataLoader([{"index": i, "noise": torch.full((1, 8, 8), i / 70)} for i in range(70)], batch_size=35)
    trainer = lightning.Trainer(
        max_steps=max_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=path,
    )  # fmt: skip
    trainer.fit(module, images, noise, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_fit_validate_and_resume_under_lightning(tiny, tmp_path):
    module = tiny.module("vp", lr_scheduler=functools.partial(warmup_cosine, warmup_steps=1), vae=None)
    module.metrics = _Metric()
    trainer = _fit(module, tmp_path, 2)
    assert trainer.callback_metrics["val/fd_test"] == 70
    assert module.grid_images.shape == (64, 1, 8, 8)
    assert not any("features" in name for name in module.state_dict())
    assert sum(p.numel() for g in trainer.optimizers[0].param_groups for p in g["params"]) == sum(
        p.numel() for p in module.network.parameters()
    )
    # the cosine has reached its end at the last step of the training
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    resumed = tiny.module("vp", tiny.unet(), lr_scheduler=functools.partial(warmup_cosine, warmup_steps=1))
    _fit(resumed, tmp_path, 2, path)
    assert resumed.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in module.state_dict().items())
    assert resumed.fingerprint() == module.fingerprint() != tiny.module("vp").fingerprint()
    assert not resumed.hparams

    with pytest.raises(UserError, match=r"another model.*noise_schedule\.beta_schedule: 'squaredcos_cap_v2' found"):
        _fit(tiny.module("epsilon", scheduler="DDIMScheduler"), tmp_path, 3, path)


def test_state_of_another_architecture_names_the_first_keys(tiny):
    wider = tiny.module("vp", tiny.unet(block_out_channels=(8, 24)))
    with pytest.raises(UserError, match=r"network\.\S+ has shape \[.*the network has \["):
        tiny.module("vp").load_state_dict(wider.state_dict())
    with pytest.raises(UserError, match=r"missing network\.class_embedding\.weight"):
        tiny.module("vp", class_conditional=True, num_classes=3).load_state_dict(tiny.module("vp").state_dict())
    with pytest.raises(UserError, match=r"unexpected network\.class_embedding\.weight"):
        tiny.module("vp").load_state_dict(tiny.module("vp", class_conditional=True, num_classes=3).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": None}, r"module\.prediction_type is null"),
        ({"class_conditional": True}, r"module\.num_classes is null"),
        ({"guidance_scale": 2.0}, r"guidance_scale = 2\.0 needs module\.class_conditional=true"),
        ({"label_dropout": 1.0}, r"module\.label_dropout must be in \[0, 1\), got 1\.0"),
        ({"num_inference_steps": 0}, r"module\.num_inference_steps must be at least 1"),
        ({"prediction_type": "edm"}, "needs an EDMSchedule"),
        ({"scheduler": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tiny, options, message):
    arguments = {"network": tiny.unet(), "noise_schedule": VPSchedule(), "prediction_type": "epsilon", **options}
    with pytest.raises(ValueError, match=message):
        DiffusionModule(**arguments)


def test_networks_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ValueError, match=r"num_class_embeds = 7 does not fit module\.num_classes = 3: it should be 4"):
        tiny.module("vp", tiny.unet(num_class_embeds=7), class_conditional=True, num_classes=3)
    with pytest.raises(
        ValueError, match=r"num_embeds_ada_norm = 5 does not fit module\.num_classes = 3: it should be 3"
    ):
        tiny.module("vp", tiny.dit(num_classes=5), class_conditional=True, num_classes=3)
    with pytest.raises(ValueError, match=r"module\.label_dropout = 0\.1 needs a null class"):
        tiny.module("vp", tiny.unet(num_class_embeds=3), class_conditional=True, num_classes=3)
    with pytest.raises(ValueError, match=r"module\.network\.out_channels = 3; it must equal in_channels = 1"):
        tiny.module("vp", tiny.unet(out_channels=3))
    with pytest.raises(TypeError, match="network is a Linear"):
        tiny.module("vp", torch.nn.Linear(2, 2))


def test_warmup_cosine_is_linear_then_half_a_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = warmup_cosine(torch.optim.SGD([parameter], lr=2.0), total_steps=14, warmup_steps=4, final_factor=0.1)
    rates = []
    for _ in range(15):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    steps = np.arange(4, 15)
    np.testing.assert_allclose(rates[4:], 2 * (0.1 + 0.9 * (1 + np.cos(np.pi * (steps - 4) / 10)) / 2))
    assert "total_steps" in inspect.signature(warmup_cosine).parameters
