"""Training a tokenizer: what it learns, which codes restart, that a resumed run is the run that never stopped."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from modules.tiny_tokens import CODES, tiny_tokenizer

from genlight.callbacks.exact_resume import ExactResume
from genlight.callbacks.step_seed import StepSeed
from genlight.data.digits import DigitsDataModule
from genlight.errors import UserError
from genlight.modules.token_folder import read_tokenizer
from genlight.modules.tokenizer import TokenizerModule, code_usage
from genlight.trainer.checkpoint_io import AtomicCheckpointIO

ADAM = functools.partial(torch.optim.AdamW, lr=3e-3)


def digits(**options: Any) -> DigitsDataModule:
    arguments: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 10, "batch_size": 64}
    arguments |= {"eval_batch_size": 300, "num_samples": 20, "seed": 0, "evaluation": "classification"}
    return DigitsDataModule(**arguments | options)


def module(kind: str = "llamagen", **options: Any) -> TokenizerModule:
    return TokenizerModule(tiny_tokenizer(kind), 8, optimizer=ADAM, **options)


def trainer(folder: Path, steps: int, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[StepSeed(0), ExactResume()],
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        **options,
    )


def standing_alone(made: TokenizerModule) -> TokenizerModule:
    """Without a trainer: one process has nothing to share."""
    strategy = SimpleNamespace(broadcast=lambda x: x, reduce=lambda x, reduce_op: x)
    made._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    made.log = lambda *args, **options: None  # type: ignore[assignment, method-assign]
    return made


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_it_learns_to_reconstruct_and_its_folder_is_what_was_measured(kind: str, tmp_path: Path) -> None:
    data, made = digits(), module(kind, restart_every=10)
    made.check_data(data)
    run = trainer(tmp_path, 60)
    before = run.validate(made, data, verbose=False)[0]
    run.fit(made, data)
    after = run.validate(made, data, verbose=False)[0]
    assert after["val/reconstruction"] < 0.7 * before["val/reconstruction"]
    made.save_pretrained(tmp_path)
    network = read_tokenizer(tmp_path).network
    batches = list(data.reference_loader("test"))
    errors = sum(float((network.decode(network.encode(b["image"])) - b["image"]).square().sum()) for b in batches)
    numbers = sum(b["image"].numel() for b in batches)
    assert errors / numbers == pytest.approx(after["val/reconstruction"], rel=1e-4)
    tokens = torch.cat([network.encode(b["image"]) for b in batches])
    counts = tokens.flatten().bincount(minlength=CODES)
    assert code_usage(counts)["perplexity"] == pytest.approx(after["val/perplexity"], rel=1e-4)


def test_dead_codes_move_to_vectors_of_the_batch_and_live_ones_stay() -> None:
    made = standing_alone(module())
    images = torch.rand(16, 1, 8, 8) * 2 - 1
    made.usage[:] = torch.arange(CODES) % 3
    dead = made.usage == 0
    weight = made.network.quantizer.embedding.weight
    before = weight.detach().clone()
    vectors = made.network.quantize(images).vectors.flatten(0, 1)
    assert made.restart_dead_codes(images) == dead.sum()
    assert torch.equal(weight[~dead], before[~dead])

    def nearest(codes: torch.Tensor) -> torch.Tensor:
        # not by products, whose rounding is as large as 1e-3
        return torch.cdist(codes, vectors, compute_mode="donot_use_mm_for_euclid_dist").min(1).values

    assert (nearest(weight[dead]) < 1e-6).all() and (nearest(before[dead]) > 1e-3).all()
    # more dead codes than vectors
    made.usage.zero_()
    assert made.restart_dead_codes(images[:2]) == 8


def test_restarts_come_when_they_are_due_and_count_from_there() -> None:
    made = standing_alone(module(restart_every=3))
    batch = {"image": torch.rand(8, 1, 8, 8) * 2 - 1}
    moved = []
    made.restart_dead_codes = lambda images: moved.append(float(made.usage.sum())) or 0  # type: ignore[method-assign]
    for step in range(7):
        made.on_train_batch_start(batch, step)
        made.training_step(batch, step)
    # three batches of 8 images of 4 tokens each time
    assert moved == [96.0, 96.0] and float(made.batches_since_restart) == 1
    never = standing_alone(module(restart_every=0))
    never.batches_since_restart += 1000
    never.restart_dead_codes = made.restart_dead_codes  # type: ignore[method-assign]
    never.on_train_batch_start(batch, 0)
    assert len(moved) == 2


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """Restarts fall on both sides of the interruption and at it."""
    whole = module(restart_every=4)
    trainer(tmp_path, 14, limit_val_batches=0).fit(whole, digits())
    first = module(restart_every=4)
    run = trainer(tmp_path, 6, limit_val_batches=0)
    run.fit(first, digits())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = module(restart_every=4)
    trainer(tmp_path, 14, limit_val_batches=0).fit(
        second, digits(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True
    )
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(first.network.quantizer.codebook, whole.network.quantizer.codebook)


def test_usage_is_a_share_and_perplexity_the_size_of_an_even_codebook() -> None:
    assert code_usage(torch.tensor([5.0, 5, 0, 0])) == pytest.approx({"usage": 0.5, "perplexity": 2.0})
    assert code_usage(torch.tensor([7.0, 7, 7, 7]))["perplexity"] == pytest.approx(4)
    assert code_usage(torch.tensor([9.0, 0, 0]))["perplexity"] == pytest.approx(1)


def test_what_does_not_fit_is_named() -> None:
    network = tiny_tokenizer()
    for options, message in (
        ({"quantizer_weight": -1}, "quantizer_weight = -1"),
        ({"restart_every": -1}, "restart_every = -1"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenizerModule(network, 8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image_size = 10 must be 4"):
        TokenizerModule(network, 10)
    with pytest.raises(ValueError, match=r"last of the scales \[1, 2\]"):
        TokenizerModule(tiny_tokenizer("var"), 16)
    with pytest.raises(UserError, match="evaluation=classification"):
        module().check_data(digits(evaluation="generation"))
    with pytest.raises(UserError, match=r"module\.image_size = 8"):
        module().check_data(digits(image_size=16))
    with pytest.raises(UserError, match="missing"):
        module().load_state_dict({})


def test_other_numbers_than_float32_are_refused() -> None:
    made = module()
    made.trainer = SimpleNamespace(precision="bf16-true")  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"trainer\.precision = bf16-true"):
        made.setup("fit")
