"""The consistency module: what it samples, what a step learns from, and that its teacher and target stay outside."""

import copy
import functools
import hashlib

import diffusers
import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from genlight.callbacks.exact_resume import ExactResume
from genlight.callbacks.step_seed import StepSeed
from genlight.data.digits import DigitsDataModule
from genlight.diffusion.consistency import (
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    heun_step,
)
from genlight.diffusion.noise_schedules import EDMSchedule, FlowSchedule, VPSchedule
from genlight.errors import UserError
from genlight.modules.consistency import TARGET, ConsistencyModule
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.target_network import TargetNetwork, repeatable
from genlight.modules.teacher import FrozenTeacher, time_embeddings, translate_times
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

RADAM = functools.partial(torch.optim.RAdam, lr=1e-3)


def _images(count=6, shape=(1, 8, 8)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def _noise(count=4, shape=(1, 8, 8)):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher_folder(tiny, tmp_path):
    folder = tmp_path / "teacher"
    tiny.module("edm").save_pretrained(folder)
    return str(folder)


def _student(tiny, objective=None, **options):
    options = {"optimizer": RADAM, **options}
    return ConsistencyModule(options.pop("network", None) or tiny.unet(), EDMSchedule(), objective, **options)


def _digest(network):
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _fit(module, folder, steps=4, resume=None, callbacks=(), **options):
    data = DigitsDataModule(8, 1, None, 4, 4, 4, 0, noise_shape=(1, 8, 8))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        callbacks=[StepSeed(3), ExactResume(), *callbacks],
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def test_one_step_is_the_function_at_the_highest_level(tiny):
    module = _student(tiny)
    noise = _noise()
    x = module.build_scheduler().init_noise_sigma * noise
    expected = module.denoised(x, torch.full((4,), 80.0, dtype=torch.float64)).clamp(-1, 1)
    torch.testing.assert_close(module.sample(noise), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_sample_does_not_depend_on_its_batch(tiny, steps):
    module = _student(tiny)
    noise = _noise()
    whole = module.sample(noise, num_inference_steps=steps)
    single = torch.cat([module.sample(row[None], num_inference_steps=steps) for row in noise])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole, module.sample(noise, num_inference_steps=steps))


def test_two_steps_add_noise_to_the_second_level_of_the_grid(tiny):
    from genlight.modules.networks import noise_seeded_generators

    module = _student(tiny, num_train_timesteps=18)
    noise = _noise()
    scheduler = module.build_scheduler()
    scheduler.set_timesteps(2)
    first, second = scheduler.sigmas[:2].double()
    once = module.denoised(80.0 * noise, first.expand(4)).clamp(-1, 1)
    generators = noise_seeded_generators(noise)
    z = torch.stack([torch.randn(1, 1, 8, 8, generator=g)[0] for g in generators])
    between = once + (second**2 - 0.002**2).sqrt().float() * z
    expected = module.denoised(between, second.expand(4)).clamp(-1, 1)
    difference = module.sample_latents(noise, num_inference_steps=2) - expected
    # the scheduler adds noise of its lowest level after the last step too
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["edm", "epsilon", "vp", "flow"])
def test_any_diffusion_model_teaches_as_a_denoiser_of_gaussian_data(tiny, kind):
    """A network that answers for data N(0, 1/4) exactly, in its own terms, gives D(x) = x / (1 + 4 sigma²)."""
    module = tiny.module(kind)
    schedule, prediction = module.noise_schedule, module.prediction

    def exact(sample, timestep, class_labels=None, return_dict=False):
        t = {"edm": lambda v: torch.exp(4 * v), "flow": lambda v: v / 1000}.get(kind, lambda v: v)(timestep.double())
        t = t.clamp(schedule.t_min, schedule.t_max)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
        x_t = sample.double() / schedule.input_scale(t).view(-1, 1, 1, 1)
        x0 = x_t * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return (prediction.target(x0, (x_t - alpha * x0) / sigma, t).float(),)

    module.network.forward = exact
    sigma = torch.tensor([0.05, 0.5, 3.0, 40.0], dtype=torch.float64)
    x = _noise() * sigma.view(-1, 1, 1, 1).float()
    found = FrozenTeacher(module).denoise(x, sigma)
    torch.testing.assert_close(found, x * (1 / (1 + 4 * sigma**2)).view(-1, 1, 1, 1).float(), rtol=2e-3, atol=2e-4)


def test_distillation_loss_is_heun_between_student_and_target(tiny, teacher_folder):
    objective = ConsistencyDistillation(6)
    module = _student(tiny, objective, teacher=teacher_folder)
    images = _images()
    torch.manual_seed(5)
    sigma, sigma_next = objective.levels(6, 0, 1)
    noise = torch.randn_like(images)
    x = images + sigma.view(-1, 1, 1, 1).float() * noise
    x_next = heun_step(module.teacher.denoise, x, sigma, sigma_next)
    expected = (module.denoised(x, sigma) - module.denoised(x_next, sigma_next)).square().mean()
    torch.manual_seed(5)
    loss = module.loss(images)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in module.teacher.network.parameters())


@pytest.mark.parametrize(
    "objective",
    [ConsistencyTraining(), ImprovedConsistencyTraining(), EasyConsistencyTuning()],
    ids=lambda o: type(o).__name__,
)
def test_objectives_without_teacher_train(tiny, objective, tmp_path):
    module = _student(tiny, objective)
    before = _digest(module.network)
    _fit(module, tmp_path)
    assert _digest(module.network) != before
    assert all(bool(p.isfinite().all()) for p in module.network.parameters())


def test_student_and_target_drop_the_same_units(tiny):
    module = _student(tiny, ConsistencyTraining(18, None, 0.0), network=tiny.unet(dropout=0.5))
    module.train()
    x, sigma = _images(), torch.full((6,), 2.0, dtype=torch.float64)
    with repeatable(x.device, module.net) as replay:
        student = module.denoised(x, sigma)
        with replay():
            target = module.denoised(x, sigma)
        after = torch.get_rng_state()
    assert torch.equal(student, target)
    assert not torch.equal(student, module.denoised(x, sigma))
    assert not torch.equal(after, torch.get_rng_state())


def test_target_follows_by_its_decay_and_lies_outside_of_the_weights(tiny, tmp_path):
    module = _student(tiny, ConsistencyTraining(18, None, 0.75))
    names = set(module.state_dict())
    _fit(module, tmp_path, steps=3)
    assert set(module.state_dict()) == names and all(name.startswith("network.") for name in names)
    parameter = next(module.target.network.parameters()).clone()
    student = next(module.network.parameters())
    module.target.follow(module.network, 0.75)
    expected = 0.75 * parameter + 0.25 * student
    torch.testing.assert_close(next(module.target.network.parameters()), expected)
    assert not any(p.requires_grad for p in module.target.network.parameters())
    assert copy.deepcopy(module).target is module.target


class Accumulating(SingleDeviceStrategy):
    """Is given every batch for an optimizer step, as DeepSpeed is."""

    handles_gradient_accumulation = True


@pytest.mark.parametrize("strategy", ["auto", Accumulating("cpu")], ids=["trainer", "strategy"])
def test_target_moves_once_per_optimizer_step(tiny, tmp_path, strategy):
    module = _student(tiny, ConsistencyTraining(18, None, 0.75))
    calls = []
    module.target.follow = lambda student, decay: calls.append(decay)
    _fit(module, tmp_path, steps=2, accumulate_grad_batches=2, strategy=strategy)
    assert calls == [0.75, 0.75]


def test_target_of_a_student_in_16_bits_is_averaged_in_float32():
    """A thousandth of the way at each of 2,000 steps: in bfloat16 every one of them would be rounded away."""
    student, target = torch.nn.Linear(3, 2).bfloat16(), TargetNetwork()
    before = {name: value.clone() for name, value in target.of(student).state_dict().items()}
    with torch.no_grad():
        student.weight += 1.0
    for _ in range(1000):
        target.follow(student, 0.999)
    resumed = TargetNetwork(target.state())
    for _ in range(1000):
        resumed.follow(student, 0.999)
    expected = before["weight"].float() + (student.weight.float() - before["weight"].float()) * (1 - 0.999**2000)
    torch.testing.assert_close(resumed.state()["weight"], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(resumed.network.weight, resumed.state()["weight"].bfloat16())


def test_teacher_is_neither_trained_nor_averaged_nor_saved(tiny, teacher_folder, tmp_path):
    module = _student(tiny, ConsistencyDistillation(6, None, 0.9), teacher=teacher_folder)
    before = _digest(module.teacher.network)
    ema = EMAWeightAveraging(decay=0.5)
    trainer = _fit(module, tmp_path, callbacks=[ema])
    assert _digest(module.teacher.network) == before
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not any("teacher" in name for name in module.state_dict())
    assert not any("teacher" in name or "target" in name for name in ema._average_model.state_dict())
    assert ema._average_model.module.teacher is module.teacher
    ours = {id(p) for p in module.parameters()}
    assert not ours & {id(p) for p in module.teacher.network.parameters()}
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(list(module.network.parameters()))


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_resumed_fit_ends_as_one_never_stopped(tiny, teacher_folder, tmp_path, decay):
    def build():
        objective = ConsistencyDistillation(6, 3, decay)
        network = tiny.unet(dropout=0.3)
        return _student(tiny, objective, network=network, teacher=teacher_folder, init_from_teacher=False)

    whole = build()
    _fit(whole, tmp_path, steps=6)

    class SaveAt(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    _fit(build(), tmp_path, steps=6, callbacks=[SaveAt()])
    resumed = build()
    _fit(resumed, tmp_path, steps=6, resume=str(tmp_path / "three.ckpt"))
    assert _digest(resumed.network) == _digest(whole.network)
    if decay:
        assert _digest(resumed.target.network) == _digest(whole.target.network)
        assert _digest(whole.target.network) != _digest(whole.network)


def test_a_fit_starts_as_the_function_of_an_edm_teacher(tiny, tmp_path):
    folder = str(tmp_path / "dit")
    tiny.module("edm", tiny.dit(patch_size=4)).save_pretrained(folder)
    module = ConsistencyModule(None, EDMSchedule(), ConsistencyDistillation(6), teacher=folder, optimizer=RADAM)
    x = 2 * _noise()
    for sigma in (0.1, 1.0, 20.0):
        level = torch.full((4,), sigma, dtype=torch.float64)
        clean = module.teacher.denoise(x, level)
        # f and D share F but not c_skip and c_out, which differ by sigma_min
        torch.testing.assert_close(module.denoised(x, level), clean, rtol=0.05, atol=0.03)
    assert module.network is not module.teacher.network


def test_translated_times_say_the_same(tiny):
    for network in (tiny.dit(), tiny.unet(block_out_channels=(32, 32))):
        teacher = FrozenTeacher(tiny.module("edm", network))
        mine = copy.deepcopy(network)
        assert len(time_embeddings(mine)) == (2 if isinstance(network, diffusers.DiTTransformer2DModel) else 1)
        assert translate_times(mine, teacher, 0.002, 80.0) < 1e-3


def test_weights_of_another_architecture_are_refused(tiny, teacher_folder):
    module = _student(tiny, network=tiny.unet(block_out_channels=(8, 8)), teacher=teacher_folder)
    with pytest.raises(UserError, match="block_out_channels"):
        module.take_from_teacher()


def test_saved_unet_samples_the_same_in_plain_diffusers(tiny, tmp_path):
    module = _student(tiny, network=tiny.unet(channels=3), num_train_timesteps=18)
    module.save_pretrained(tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline, diffusers.ConsistencyModelPipeline)
    assert isinstance(pipeline.scheduler, diffusers.CMStochasticIterativeScheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = _noise(2, (3, 8, 8))
    theirs = pipeline(batch_size=2, latents=noise, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(theirs, module.sample(noise) / 2 + 0.5, rtol=1e-5, atol=1e-5)


def test_saved_classes_and_transformers_load_again(tiny, tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    options = {"class_conditional": True, "num_classes": 3, "num_train_timesteps": 18, "rho": 5.0}
    for name, network in (("unet", tiny.unet(num_class_embeds=3)), ("dit", tiny.dit(num_classes=3))):
        module = _student(tiny, network=network, **options)
        module.save_pretrained(tmp_path / name)
        again = ConsistencyModule(pretrained=str(tmp_path / name), class_conditional=None, noise_schedule=None)
        assert torch.equal(module.sample(_noise(), labels), again.sample(_noise(), labels))
        assert (again.num_classes, again.num_train_timesteps, again.rho) == (3, 18, 5.0)
        assert again.fingerprint() == module.fingerprint()


def test_folders_of_diffusion_models_and_a_missing_teacher_are_refused(tiny, teacher_folder, tmp_path):
    with pytest.raises(UserError, match="EDMEulerScheduler"):
        ConsistencyModule(pretrained=teacher_folder).configure_model()
    with pytest.raises(UserError, match="nowhere"):
        _ = _student(tiny, ConsistencyDistillation(), teacher=str(tmp_path / "nowhere")).teacher
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished"):
        _ = _student(tiny, ConsistencyDistillation(), teacher=str(run)).teacher


def test_a_teacher_of_too_little_noise_is_refused(tiny, tmp_path):
    schedule = VPSchedule("scaled_linear", 0.00085, 0.012)
    module = DiffusionModule(tiny.unet(), schedule, "epsilon")
    module.save_pretrained(tmp_path / "sd")
    with pytest.raises(UserError, match="sigma_max = 80"):
        _ = _student(tiny, ConsistencyDistillation(), teacher=str(tmp_path / "sd")).teacher


def test_classes_are_those_of_the_teacher(tiny, tmp_path):
    folder = str(tmp_path / "classes")
    options = {"class_conditional": True, "num_classes": 3, "label_dropout": 0.0}
    tiny.module("edm", tiny.dit(patch_size=4), **options).save_pretrained(folder)
    taken = ConsistencyModule(teacher=folder, class_conditional=None, num_classes=3)
    taken.configure_model()
    assert taken.class_conditional and taken.num_classes == 3
    with pytest.raises(UserError, match="num_classes = None"):
        ConsistencyModule(teacher=folder, class_conditional=False, num_classes=3).configure_model()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": ConsistencyDistillation()}, "needs module.teacher"),
        ({"distance": "l3"}, "module.distance = 'l3'"),
        ({"num_inference_steps": 41}, "num_inference_steps = 41"),
        ({"noise_schedule": FlowSchedule()}, "EDMSchedule"),
        ({"network": None}, "module.network is null"),
    ],
)
def test_bad_arguments_are_named(tiny, options, text):
    arguments = {"network": tiny.unet(), "noise_schedule": EDMSchedule(), **options}
    with pytest.raises(ValueError, match=text):
        ConsistencyModule(**arguments)


def test_samplers_of_diffusion_models_are_refused(tiny):
    module = _student(tiny)
    with pytest.raises(UserError, match="cannot be searched"):
        module.set_sampler(object())
    with pytest.raises(ValueError, match="DDIMScheduler"):
        module.build_scheduler("DDIMScheduler")


def test_a_teacher_that_is_there_is_not_trained_again(teacher_folder, tmp_path):
    module = ConsistencyModule(teacher=str(teacher_folder), teacher_recipe="no/such/experiment")
    module.prepare(tmp_path / "runs", tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_teacher_is_no_reason_to_train_one(tmp_path, monkeypatch):
    monkeypatch.setattr("genlight.recipes.run_command", None)
    wrong = tmp_path / "no" / "such" / "fit" / "artifact"
    with pytest.raises(UserError, match=rf"module\.teacher = {wrong} is not there, and is not what .* makes"):
        ConsistencyModule(teacher=str(wrong), teacher_recipe="no/experiment").prepare(tmp_path, tmp_path)


def test_a_checkpoint_holds_the_target_beside_the_weights(tiny, tmp_path):
    module = _student(tiny, ConsistencyTraining(18, None, 0.75))
    trainer = _fit(module, tmp_path, steps=2)
    checkpoint = trainer._checkpoint_connector.dump_checkpoint()
    assert set(checkpoint[TARGET]) == set(module.network.state_dict())
    plain = _student(tiny, ConsistencyTraining(18, None, 0.0))
    assert TARGET not in _fit(plain, tmp_path, steps=2)._checkpoint_connector.dump_checkpoint()
