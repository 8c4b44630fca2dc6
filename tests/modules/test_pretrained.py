import json

import diffusers
import pytest
import torch

from genlight.diffusion.noise_schedules import FlowSchedule, VPSchedule
from genlight.errors import UserError
from genlight.modules.diffusion import DiffusionModule
from genlight.modules.pipeline_calls import pipeline_folder
from genlight.modules.pretrained import load_autoencoder
from genlight.reports.model_card import stated_license

CLASSES = {"class_conditional": True, "num_classes": 3}


def _load(folder, **options):
    module = DiffusionModule(pretrained=str(folder), **{"class_conditional": None, **options})
    module.configure_model()
    return module


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_plain_diffusers_folder_loads_with_its_sampler(tiny, tmp_path):
    network = tiny.unet()
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_end=0.012, variance_type="fixed_large")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    module = _load(tmp_path)
    assert module.noise_schedule.definition() == VPSchedule("scaled_linear", beta_end=0.012).definition()
    assert module.prediction_type == "epsilon"
    assert not module.class_conditional
    built = module.build_scheduler()
    assert isinstance(built, diffusers.DDPMScheduler)
    assert built.config.variance_type == "fixed_large"
    assert torch.equal(built.alphas_cumprod, scheduler.alphas_cumprod)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in module.network.state_dict().items())


def test_old_folders_without_subfolders_load_too(tiny, tmp_path):
    tiny.unet().save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    module = _load(tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, torch.Generator().manual_seed(7), num_inference_steps=3, output_type="pt").images
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    sampled = module.sample(noise, num_inference_steps=3, generator=generator)
    torch.testing.assert_close((sampled + 1) / 2, images, atol=1e-5, rtol=0)


def test_a_dit_folder_keeps_its_classes_and_vae(tiny, tmp_path):
    vae = tiny.vae(scaling_factor=0.4)
    pipeline = diffusers.DiTPipeline(tiny.dit(4, 4), vae, diffusers.DDIMScheduler(), id2label={0: "a", 1: "b", 2: "c"})
    pipeline.save_pretrained(tmp_path)
    _edit(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    module = _load(tmp_path, guidance_scale=2.0)
    assert (module.class_conditional, module.num_classes) == (True, 3)
    assert module.image_shape == (3, 8, 8)
    assert module.vae.network.config.scaling_factor == 0.4
    alone = load_autoencoder(tmp_path).state_dict()
    assert all(torch.equal(alone[name], value) for name, value in vae.state_dict().items())


def test_weights_are_loaded_into_a_configured_network(tiny, tmp_path):
    source = tiny.module("vp", **CLASSES)
    source.save_pretrained(tmp_path)
    fresh = diffusers.UNet2DModel.from_config(tiny.unet().config)
    module = tiny.module("vp", fresh, pretrained=str(tmp_path), **CLASSES)
    before = module.network
    module.configure_model()
    assert module.network is before
    assert module.fingerprint() == source.fingerprint()


def test_what_disagrees_with_the_configuration_is_named(tiny, tmp_path):
    tiny.module("vp", **CLASSES).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"block_out_channels: \[8, 16\] found, \[8, 24\] expected.*network=null"):
        tiny.module("vp", tiny.unet(block_out_channels=(8, 24)), pretrained=str(tmp_path), **CLASSES).configure_model()
    with pytest.raises(UserError, match=r"beta_schedule: 'squaredcos_cap_v2' found, 'linear' expected"):
        _load(tmp_path, noise_schedule=VPSchedule("linear"))
    with pytest.raises(UserError, match=r"module.noise_schedule.family: 'vp' found, 'flow' expected"):
        _load(tmp_path, noise_schedule=FlowSchedule())
    with pytest.raises(UserError, match=r"module.prediction_type: 'v_prediction' found, 'epsilon' expected"):
        _load(tmp_path, prediction_type="epsilon")
    with pytest.raises(UserError, match=r"module\.num_classes = 4, but .* has 3 classes"):
        _load(tmp_path, class_conditional=True, num_classes=4)
    with pytest.raises(UserError, match=r"module.vae is set, but .* has no VAE"):
        _load(tmp_path, vae=tiny.vae())
    with pytest.raises(UserError, match=r"num_class_embeds = 4, but module\.class_conditional is false"):
        _load(tmp_path, class_conditional=False)


def test_options_that_the_folder_cannot_serve_are_refused(tiny, tmp_path):
    tiny.module("vp").save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"guidance_scale = 2\.0 needs module\.class_conditional=true"):
        _load(tmp_path / "plain", guidance_scale=2.0)
    diffusers.DDPMPipeline(tiny.unet(num_class_embeds=3), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "rows")
    assert _load(tmp_path / "rows", label_dropout=0.0).num_classes == 3
    assert _load(tmp_path / "rows", class_conditional=True, num_classes=2).num_classes == 2
    with pytest.raises(UserError, match=r"module\.label_dropout = 0\.1 needs a null class"):
        _load(tmp_path / "rows")
    with pytest.raises(UserError, match=r"EDMEulerScheduler"):
        _load(tmp_path / "plain", scheduler="EDMEulerScheduler")


def test_damaged_and_foreign_folders_are_refused_in_one_line(tiny, tmp_path):
    def error(**options):
        with pytest.raises(UserError) as caught:
            _load(tmp_path, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "it has no model_index.json" in error()
    tiny.module("vp").save_pretrained(tmp_path)
    index, weights = tmp_path / "model_index.json", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[:-100])
    assert "cannot be loaded as UNet2DModel" in error()
    weights.write_bytes(whole)
    _edit(tmp_path / "unet" / "config.json", num_class_embeds=4)
    assert "missing class_embedding.weight" in error()
    _edit(tmp_path / "unet" / "config.json", num_class_embeds=None)
    assert _load(tmp_path).network is not None

    weights.rename(weights.with_suffix(".bin"))
    assert "no weights as safetensors" in error()
    _edit(index, unet=["my_code", "Network"])
    assert "my_code.Network" in error()
    _edit(index, unet=["diffusers", "AutoencoderKL"])
    assert "is of class AutoencoderKL" in error()
    _edit(index, unet=[None, None])
    assert "names neither a unet nor a transformer" in error()


def test_code_of_a_folder_never_runs(tiny, tmp_path):
    tiny.module("vp", **CLASSES, guidance_scale=2.0).save_pretrained(tmp_path)
    sentinel = tmp_path / "ran"
    (tmp_path / "pipeline.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    assert _load(tmp_path).num_classes == 3
    assert not sentinel.exists()


def test_an_unreachable_hub_id_is_one_line_at_once(tmp_path, monkeypatch):
    class Session:
        def head(self, url, timeout):
            raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for read in (_load, load_autoencoder):
        with pytest.raises(UserError, match=r"'nobody/nothing-here' is neither a folder.*no route to host") as caught:
            read("nobody/nothing-here")
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"is not a folder: expected a diffusers folder, or a hub id"):
            read(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no config\.json of an autoencoder"):
        load_autoencoder(tmp_path)


def test_the_card_of_a_pipeline_of_the_hub_is_taken_too(tmp_path, monkeypatch):
    """diffusers leaves README.md out, and with it the licence; where it cannot be had, the pipeline is there anyhow."""
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []
    kept = tmp_path / "models--some--pipeline"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    folder = kept / "snapshots" / commit
    folder.mkdir(parents=True)

    class Session:
        def head(self, url, timeout):
            pass

    def download(source, name, revision):
        asked.append((source, name, revision))
        if len(asked) == 1:
            raise OSError("no route to host")
        (folder / name).write_text("---\nlicense: cc-by-nc-4.0\n---\n")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *sources, **options: str(folder))
    assert pipeline_folder("some/pipeline") == folder and stated_license("some/pipeline") == {}
    assert pipeline_folder("some/pipeline") == folder
    assert stated_license("some/pipeline") == {"license": "cc-by-nc-4.0"}
    assert set(asked) == {("some/pipeline", "README.md", commit)}


def test_reading_waits_for_configure_model_and_can_be_tried_again(tiny, tmp_path):
    module = DiffusionModule(pretrained=str(tmp_path / "later"), class_conditional=None)
    with pytest.raises(UserError):
        module.configure_model()
    tiny.module("vp").save_pretrained(tmp_path / "later")
    assert module.sample_shape == (1, 8, 8)
    tiny.module("vp", vae=None).save_pretrained(tmp_path / "other")
    source = tiny.module("vp", tiny.unet(4, 4), vae=tiny.vae())
    source.save_pretrained(tmp_path / "latent")
    again = tiny.module("vp", tiny.unet(4, 4), vae=str(tmp_path / "latent"))
    assert again.description() == source.description()
