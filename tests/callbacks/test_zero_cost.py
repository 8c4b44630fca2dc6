"""The row of low-fidelity scores of a run, written without a trace in the training."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import genlight, untrained_features
from lightning.pytorch import LightningModule, Trainer
from oracles.toy_training import ToyModule, differing, quiet, train
from torch.nn import functional

from genlight import io
from genlight.callbacks.zero_cost import ZeroCostIndicators, probe_of
from genlight.data.digits import DigitsDataModule
from genlight.errors import UserError
from genlight.modules.classifier import ClassifierModule
from genlight.nets.classifier import Classifier
from genlight.predictors.zero_cost import NAMES, indicators, measure

quiet()
REPEATABLE = [name for name in NAMES if name != "latency"]


class Quick(ClassifierModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def classifier(**options: Any) -> ClassifierModule:
    torch.manual_seed(0)
    return Quick(Classifier(8, 1, 10, widths=(8, 16), dropout=0.2), **options)


def digits() -> DigitsDataModule:
    return DigitsDataModule(
        8, 1, 10, batch_size=300, eval_batch_size=100, num_samples=10, seed=0, evaluation="classification"
    )


def fit(
    module: LightningModule, folder: Path, *callbacks: ZeroCostIndicators, epochs: int = 3, **options: Any
) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        max_epochs=epochs,
        callbacks=list(callbacks),
        **options,
    )
    torch.manual_seed(1)
    trainer.fit(module, digits())
    return trainer


def row(folder: Path) -> dict[str, Any]:
    (line,) = io.read_lines(folder / "indicators.jsonl")
    found = io.parse_json(line, "the row")
    assert isinstance(found, dict)
    return found


def test_row_holds_the_indicators_of_the_first_batch(tmp_path: Path) -> None:
    module = classifier(label_smoothing=0.1)
    batch = next(iter(digits().train_dataloader()))
    images, labels = batch["image"], batch["label"]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(output, target, label_smoothing=0.1)

    expected = indicators(module.network, images, labels, loss, REPEATABLE, 5)
    fit(module, tmp_path, ZeroCostIndicators(str(tmp_path), seed=5))
    found = row(tmp_path)
    assert (found["kind"], found["version"], found["seed"]) == ("genlight.indicators", 1, 5)
    assert {name: found[name] for name in REPEATABLE} == pytest.approx(expected, rel=1e-6)
    assert list(found)[-len(REPEATABLE) :] == REPEATABLE and all(map(math.isfinite, expected.values()))


def test_indicators_of_rounded_weights_are_not_rounded(tmp_path: Path) -> None:
    module = classifier(label_smoothing=0.0)
    exact = copy.deepcopy(module.network).bfloat16().float()
    batch = next(iter(digits().train_dataloader()))
    expected = indicators(exact, batch["image"], batch["label"], functional.cross_entropy, REPEATABLE)
    fit(module, tmp_path, ZeroCostIndicators(str(tmp_path)), epochs=1, precision="bf16-true", limit_train_batches=1)
    found = row(tmp_path)
    assert {name: found[name] for name in REPEATABLE} == pytest.approx(expected, rel=1e-6)
    assert next(module.network.parameters()).dtype == torch.bfloat16


def test_training_goes_on_as_if_nothing_had_been_measured(tmp_path: Path) -> None:
    with_row, without = classifier(crop_padding=1), classifier(crop_padding=1)
    fit(with_row, tmp_path, ZeroCostIndicators(str(tmp_path)))
    fit(without, tmp_path)
    assert not differing(with_row.state_dict(), without.state_dict())


def test_early_scores_are_those_after_so_many_epochs(tmp_path: Path) -> None:
    class Noted(Quick):
        scores: list[float]

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.scores.append(float(self.trainer.callback_metrics["val/loss"]))

    torch.manual_seed(0)
    module = Noted(Classifier(8, 1, 10, widths=(8, 16)))
    module.scores = []
    callback = ZeroCostIndicators(str(tmp_path), ["parameters"], monitor="val/loss", epochs=[1, 3, 9])
    fit(module, tmp_path, callback)
    found = row(tmp_path)
    assert [name for name in found if "@" in name] == ["val/loss@1", "val/loss@3"]
    assert (found["val/loss@1"], found["val/loss@3"]) == (module.scores[0], module.scores[2])
    assert len(set(module.scores)) > 1


def test_score_within_epochs_is_that_of_the_first_validation_after_them(tmp_path: Path) -> None:
    # 4 batches an epoch, validations after 3, 6 and 9 batches
    callback = ZeroCostIndicators(str(tmp_path), ["parameters"], monitor="val/loss", epochs=[1, 2])
    seen: list[tuple[int, list[str]]] = []

    class Watch(ZeroCostIndicators):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append((trainer.global_step, [name for name in row(tmp_path) if "@" in name]))

    watch = Watch(str(tmp_path / "other"), ["parameters"])
    batches = len(digits().train_dataloader())
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    fit(classifier(), tmp_path, callback, watch, **options)
    for step, names in seen:
        assert names == [f"val/loss@{epoch}" for epoch in (1, 2) if epoch * batches <= step], (step, batches)


def test_resumed_run_keeps_its_row(tmp_path: Path) -> None:
    class Toy(ToyModule):
        @property
        def network(self) -> torch.nn.Module:
            return self.net

    options: dict[str, Any] = {"val_check_interval": 7}
    arguments: dict[str, Any] = {"names": ["snip", "l2_norm"], "monitor": "val/loss", "epochs": [1, 2]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, callbacks=(ZeroCostIndicators(str(whole), **arguments),), module=Toy(), **options)
    train(cut, callbacks=(ZeroCostIndicators(str(cut), **arguments),), module=Toy(), max_steps=9, **options)
    assert "val/loss@1" in row(cut) and "val/loss@2" not in row(cut)
    resume = next(cut.glob("*step=9.ckpt"))
    train(cut, resume=resume, callbacks=(ZeroCostIndicators(str(cut), **arguments),), module=Toy(), **options)
    assert row(cut) == row(whole) and "val/loss@2" in row(whole)


def test_diffusion_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    words = ["fit", "callbacks=zero_cost", "callbacks.zero_cost.monitor=train/loss", "callbacks.zero_cost.epochs=[1]"]
    assert genlight(tmp_path, *words, "trainer.max_steps=61", "trainer.val_check_interval=58") == 0
    (folder,) = [path.parent for path in tmp_path.rglob("indicators.jsonl")]
    found = row(folder)
    # correlations within classes need a classifier
    assert [name for name in REPEATABLE if found[name] is None] == ["epe_nas"]
    assert found["train/loss@1"] > 0
    assert "zero_cost/snip" in (folder / "metrics.csv").read_text()


def test_probe_of_a_diffusion_module_measures_its_own_loss(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    from genlight.diffusion.noise_schedules import VPSchedule
    from genlight.modules.diffusion import DiffusionModule

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    module = DiffusionModule(network, VPSchedule(), "epsilon")
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    before = torch.get_rng_state()
    probe = probe_of(module, {"image": images}, 3)
    found = measure(probe, ["grad_norm", "synflow", "grasp", "flops"], 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.network is not None and all(p.grad is None for p in module.network.parameters())
    torch.manual_seed(3)
    module.loss(images).backward()
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    norms = [float(m.weight.grad.norm()) for m in module.network.modules() if isinstance(m, layers)]
    assert found["grad_norm"] == pytest.approx(sum(norms), rel=1e-4)
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["snip", "fish"]}, "callbacks.zero_cost.names: fish must be among grad_norm"),
        ({"epochs": [0], "monitor": "val/loss"}, r"callbacks.zero_cost.epochs=\[0\] must be numbers from 1"),
        ({"epochs": [1]}, r"callbacks.zero_cost.epochs=\[1\] need callbacks.zero_cost.monitor"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZeroCostIndicators("unused", **options)


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    callback = ZeroCostIndicators(str(tmp_path), ["parameters"], monitor="val/fid", epochs=[1])
    with pytest.raises(UserError, match=r"monitor=val/fid is not logged; logged are: .*val/accuracy, val/loss"):
        fit(classifier(), tmp_path, callback)
    with pytest.raises(UserError, match="a ToyModule has no single network to measure"):
        probe_of(ToyModule(), torch.zeros(2, 6), 0)

    class Silent(ClassifierModule):
        def training_step(self, batch: Any, batch_index: int = 0) -> Any:
            return None

    with pytest.raises(UserError, match="a Silent calls no network or gives no loss"):
        probe_of(Silent(Classifier(8, 1, 10)), {}, 0)
