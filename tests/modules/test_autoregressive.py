"""The autoregressive module: its loss is the likelihood, a sample a function of noise, its folder a teacher."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from modules.tiny_tokens import CLASSES, CODE_DIM, CODES, saved, tiny_tokenizer, tiny_transformer
from torch import Tensor

from genlight.callbacks.step_seed import StepSeed
from genlight.data.digits import DigitsDataModule
from genlight.errors import UserError
from genlight.modules.autoregressive import AutoregressiveModule
from genlight.modules.token_folder import SavedTokenizer, read_token_teacher, save_tokenizer
from genlight.nets.autoregressive import SamplingSettings, parallel_probabilities
from genlight.nets.llamagen import LlamaGenTransformer

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)
KINDS = ["llamagen", "var"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> str:
    save_tokenizer(tmp_path / "tokenizer", saved(kind))
    return str(tmp_path / "tokenizer")


def digits(**options: Any) -> DigitsDataModule:
    arguments: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 10, "batch_size": 64}
    arguments |= {"eval_batch_size": 16, "num_samples": 20, "seed": 0}
    return DigitsDataModule(**arguments | options)


def module(kind: str, folder: str, **options: Any) -> AutoregressiveModule:
    return AutoregressiveModule(tiny_transformer(kind), folder, optimizer=ADAM, **options)


def noise_of(made: AutoregressiveModule, count: int = 6) -> Tensor:
    return torch.randn(count, *made.sample_shape, generator=torch.Generator().manual_seed(4))


def test_the_loss_is_the_likelihood_of_a_chain_of_tokens(kind: str, folder: str) -> None:
    made = module(kind, folder).eval()
    label = torch.arange(5)
    tokens = torch.randint(0, CODES, (5, made.sample_shape[0]))
    chances = parallel_probabilities(made.model, tokens, label, SamplingSettings()).gather(2, tokens[..., None])
    wanted = -chances.log().mean()
    torch.testing.assert_close(made.negative_log_likelihood(tokens, label), wanted)


def test_labels_are_dropped_at_the_rate_asked_for(kind: str, folder: str) -> None:
    made = module(kind, folder, label_dropout=0.3)
    made.log = lambda *args, **options: None  # type: ignore[assignment, method-assign]
    seen: list[Tensor] = []
    made.negative_log_likelihood = lambda tokens, label: seen.append(label) or torch.zeros(())  # type: ignore
    torch.manual_seed(0)
    label = torch.arange(2000) % CLASSES
    made.training_step({"image": torch.zeros(2000, 1, 8, 8), "label": label})
    dropped = seen[0] == CLASSES
    assert torch.equal(seen[0][~dropped], label[~dropped])
    assert abs(float(dropped.float().mean()) - 0.3) < 0.04


def test_a_sample_is_a_function_of_its_noise_and_label(kind: str, folder: str) -> None:
    made = module(kind, folder)
    noise, label = noise_of(made), torch.arange(6)
    made.train()
    images = made.sample(noise, label)
    assert images.shape == (6, 1, 8, 8) and images.abs().max() <= 1 and made.network.training
    one = torch.cat([made.sample(noise[row : row + 1], label[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(images, one, atol=1e-5, rtol=1e-5)
    tokens = made.sample_tokens(noise, label)
    assert not torch.equal(tokens, made.sample_tokens(-noise, label))
    assert not torch.equal(tokens, made.sample_tokens(noise, label.flip(0)))
    # noise of the last token changes no other
    changed = noise.clone()
    changed[:, -1] *= -1
    assert torch.equal(made.sample_tokens(changed, label)[:, :-1], tokens[:, :-1])
    with pytest.raises(ValueError, match="needs labels"):
        made.sample(noise)


def test_a_filter_that_leaves_one_code_leaves_no_chance(kind: str, folder: str) -> None:
    made = module(kind, folder, sampling=SamplingSettings(top_k=1))
    noise, label = noise_of(made), torch.arange(6)
    assert torch.equal(made.sample_tokens(noise, label), made.sample_tokens(-noise, label))


def test_a_fit_learns_measures_and_saves_what_it_measured(kind: str, folder: str, tmp_path: Path) -> None:
    data, made = digits(), module(kind, folder)
    made.check_data(data)
    data.noise_shape = made.sample_shape
    run = lightning.Trainer(
        max_steps=30,
        val_check_interval=30,
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=[StepSeed(0), EMAWeightAveraging(decay=0.8)],
        use_distributed_sampler=False,
    )
    data.draw = "report"
    before = run.validate(made, data, verbose=False)[0]["val/nll"]
    data.draw = "select"  # as in every fit
    run.fit(made, data)
    data.draw = "report"
    last = float(run.callback_metrics["val/nll"])
    after = run.validate(made, data, verbose=False)[0]["val/nll"]
    # of the averaged weights, as the samples of that validation and the folder
    assert last == pytest.approx(after, rel=1e-6)
    assert after < before - 0.3 and after < math.log(CODES)
    assert made.grid_images is not None and made.grid_images.shape == (20, 1, 8, 8)
    made.save_pretrained(tmp_path / "artifact")
    teacher = read_token_teacher(tmp_path / "artifact")
    noise, label = noise_of(made), torch.arange(6)
    tokens = made.sample_tokens(noise, label)
    assert torch.equal(teacher.tokenizer.decode(tokens), made.sample(noise, label))
    torch.testing.assert_close(teacher.model.logits(tokens, label), made.eval().model.logits(tokens, label))
    # the tokenizer is no part of what is trained or kept in checkpoints
    assert all(key.startswith("network.") for key in made.state_dict())


def test_likelihood_is_of_held_out_images(kind: str, folder: str) -> None:
    made, data = module(kind, folder).eval(), digits(eval_batch_size=300)
    batches = list(data.reference_loader("test"))
    images, label = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label"))
    tokens = made.tokenizer.network.encode(images)
    wanted = made.negative_log_likelihood(tokens, label).item()
    assert made.held_out_likelihood(data) == pytest.approx(wanted, rel=1e-4)


def test_a_search_and_a_choice_have_halves_of_the_training_images(kind: str, folder: str) -> None:
    """Of batches of any size, also where a half has no image of the last one."""
    made, data = module(kind, folder).eval(), digits(eval_batch_size=32)
    images, label = (torch.cat([batch[key] for batch in data.reference_loader("train")]) for key in ("image", "label"))
    for half, draw in enumerate(("search", "select")):
        tokens = made.tokenizer.network.encode(images[half::2])
        wanted = made.negative_log_likelihood(tokens, label[half::2]).item()
        for size in (32, 299):
            data.eval_batch_size = size
            assert made.held_out_likelihood(data, draw) == pytest.approx(wanted, rel=1e-4)
    assert made.held_out_likelihood(data, "search") != pytest.approx(made.held_out_likelihood(data), rel=1e-4)


def test_the_likelihood_is_left_out_where_no_data_is_known(kind: str, folder: str, tmp_path: Path) -> None:
    data, made = digits(), module(kind, folder)
    data.noise_shape = made.sample_shape
    run = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, default_root_dir=tmp_path)
    assert run.validate(made, data.val_dataloader(), verbose=False) == [{}]
    made.check_data(data)
    assert run.validate(made, data.val_dataloader(), verbose=False)[0].keys() == {"val/nll"}


def test_another_network_or_tokenizer_has_another_fingerprint(kind: str, folder: str, tmp_path: Path) -> None:
    made = module(kind, folder)
    assert made.fingerprint() == module(kind, folder).fingerprint()
    checkpoint: dict[str, Any] = {}
    made.on_save_checkpoint(checkpoint)
    made.on_load_checkpoint(checkpoint)
    other = saved(kind)
    with torch.no_grad():
        next(other.network.parameters()).add_(1.0)
    save_tokenizer(tmp_path / "other", other)
    changed = module(kind, str(tmp_path / "other"))
    assert changed.fingerprint() != made.fingerprint()
    with pytest.raises(UserError, match="the checkpoint is of another model than the module: tokenizer"):
        changed.on_load_checkpoint(checkpoint)
    with torch.no_grad():
        next(made.network.parameters()).add_(1.0)
    assert made.fingerprint() != module(kind, folder).fingerprint()


def test_a_missing_tokenizer_is_fitted_by_its_recipe(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fit(recipe: str, is_there: Any, what: str, folder: Any, *words: str) -> None:
        asked.append((recipe, is_there(), str(folder), words))

    monkeypatch.setattr("genlight.recipes.fit_where_missing", fit)
    source = str(tmp_path / "dd" / "digits_tokenizer" / "fit" / "artifact")
    made = module(kind, source, tokenizer_recipe="dd/digits_tokenizer")
    with pytest.raises(UserError, match=r"has not written module\.tokenizer"):
        made.prepare(tmp_path, "cache")
    wanted = ("dd/digits_tokenizer", False, str(tmp_path), (f"run.root={tmp_path}", "paths.cache=cache"))
    assert asked == [wanted]
    module(kind, str(tmp_path / "none")).prepare(tmp_path, "cache")
    misspelt = module(kind, source.replace("_tokenizer", "_tokeniser"), tokenizer_recipe="dd/digits_tokenizer")
    with pytest.raises(UserError, match=r"module\.tokenizer = .*_tokeniser.* is not what fit experiment=dd"):
        misspelt.prepare(tmp_path, "cache")
    assert len(asked) == 1


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    network = tiny_transformer()
    with pytest.raises(TypeError, match="is a Linear"):
        AutoregressiveModule(torch.nn.Linear(1, 1), "folder")
    text = LlamaGenTransformer(CODES, 2, 8, 1, 2, text_dim=4)
    for wrong, options, message in (
        (text, {}, "text_dim"),
        (network, {"label_dropout": 1.0}, "label_dropout = 1"),
        (network, {"flow_steps": 0}, "flow_steps = 0"),
        (network, {"sampling": SamplingSettings(top_k=CODES + 1)}, rf"module.sampling.top_k = .* at most {CODES}, mod"),
        (network, {"label_dropout": 0.0, "sampling": SamplingSettings(guidance_scale=2.0)}, "guidance_scale"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoregressiveModule(wrong, "folder", **options)  # type: ignore[arg-type]
    save_tokenizer(tmp_path, SavedTokenizer(tiny_tokenizer(channels=(8, 8)), (1, 8, 8)))
    with pytest.raises(UserError, match="decides 4 tokens, an image has 16"):
        _ = AutoregressiveModule(network, str(tmp_path)).sample_shape
    save_tokenizer(tmp_path, SavedTokenizer(tiny_tokenizer(), (1, 8, 8)))
    made = AutoregressiveModule(network, str(tmp_path))
    assert made.sample_shape == (4, CODE_DIM)
    with pytest.raises(UserError, match="num_classes"):
        made.check_data(digits(num_classes=None))
    with pytest.raises(UserError, match="image size = 8"):
        made.check_data(digits(image_size=16))


def test_other_numbers_than_float32_are_refused() -> None:
    made = module("llamagen", "nowhere")
    made.trainer = SimpleNamespace(precision="bf16-true")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"trainer\.precision = bf16-true"):
        made.setup("fit")
