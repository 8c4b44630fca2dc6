"""The data module of pairs: made before a fit, in the order of every data module, evaluated as its images."""

from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from modules.tiny_tokens import tiny_teacher
from torch import Tensor

from genlight.data import pairs as data_pairs
from genlight.data.digits import DigitsDataModule
from genlight.data.pairs import PairsDataModule
from genlight.data.sampling import BatchOrder
from genlight.errors import UserError
from genlight.modules.token_folder import TokenTeacher, save_token_teacher


@pytest.fixture
def folder(tmp_path: Path) -> str:
    save_token_teacher(tmp_path / "teacher", tiny_teacher())
    return str(tmp_path / "teacher")


def images(**options: Any) -> DigitsDataModule:
    arguments: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": 10, "batch_size": 4}
    return DigitsDataModule(**arguments | {"eval_batch_size": 16, "num_samples": 20, "seed": 0} | options)


def pairs(folder: str, **options: Any) -> PairsDataModule:
    arguments: dict[str, Any] = {"images": images(), "num_pairs": 30, "batch_size": 5, "seed": 2, "shard_size": 8}
    return PairsDataModule(teacher=folder, cache=str(Path(folder).parent / "cache"), **arguments | options)


def test_batches_are_pairs_in_the_order_of_every_data_module(folder: str) -> None:
    data = pairs(folder)
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    order = BatchOrder(30, 5, 2)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    for position, batch in enumerate(batches):
        wanted = data.pairs.__getitems__(order.batch(position))
        assert batch.keys() == {"noise", "tokens", "label"}
        assert all(torch.equal(batch[key], wanted[key]) for key in batch)


def test_evaluation_is_that_of_the_images(folder: str) -> None:
    data, own = pairs(folder), images()
    data.noise_shape, data.draw, data.num_samples = (4, 4), "select", 11
    own.noise_shape, own.draw, own.num_samples = (4, 4), "select", 11
    assert (data.noise_shape, data.draw, data.num_samples) == ((4, 4), "select", 11)
    for mine, its in zip(data.val_dataloader(), own.val_dataloader(), strict=True):
        assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert data.fingerprint == own.fingerprint and data.image_shape == own.image_shape
    assert data.num_classes == 10 and len(data.class_names) == 10
    first = next(iter(data.reference_loader("test")))
    assert torch.equal(first["image"], next(iter(own.reference_loader("test")))["image"])


class Listener(lightning.LightningModule):
    """Notes the labels and tokens that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.heard: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.heard.append(batch["tokens"])
        return self.weight * batch["noise"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: str) -> lightning.Trainer:
    return lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        default_root_dir=folder,
        use_distributed_sampler=False,
    )


def test_a_fit_makes_the_pairs_once_and_a_checkpoint_of_others_is_refused(folder: str) -> None:
    listener, run = Listener(), trainer(folder)
    run.fit(listener, pairs(folder))
    files = list(Path(folder).parent.glob("cache/pairs/*/shard-*"))
    stamps = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == 4 and len(listener.heard) == 4
    again = Listener()
    trainer(folder).fit(again, pairs(folder))
    assert all(torch.equal(one, two) for one, two in zip(listener.heard, again.heard, strict=True))
    assert {path: path.stat().st_mtime_ns for path in files} == stamps
    data = pairs(folder)
    data.load_state_dict(data.state_dict())
    for options in ({"seed": 1}, {"num_pairs": 31}):
        with pytest.raises(UserError, match="other pairs"):
            pairs(folder, **options).load_state_dict(data.state_dict())


def test_a_dry_run_makes_a_few_pairs_and_keeps_none(folder: str) -> None:
    """They stand for all, of which there are as many as there will be; with all at hand it is as any run."""
    cache = Path(folder).parent / "cache"
    data, whole = pairs(folder, shard_size=6), pairs(folder, shard_size=6)
    data.dry_run = True
    data.setup("fit")
    assert not cache.exists() and len(data.pairs) == 30 and len(list(data.train_dataloader())) == 6
    (left,) = data.left
    assert left.count == 2 and len(left.seconds) == 2
    whole.setup("fit")
    assert torch.equal(data.pairs.tokens[:18], whole.pairs.tokens[:18])
    again = pairs(folder, shard_size=6)
    again.dry_run = True
    again.setup("fit")
    assert again.left == () and torch.equal(again.pairs.tokens, whole.pairs.tokens)


def test_a_teacher_leaves_the_device_when_its_pairs_are_made(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where memory does not suffice for them, the error says what helps."""
    devices: list[str] = []

    def to(teacher: TokenTeacher, device: Any) -> TokenTeacher:
        devices.append(str(device))
        return teacher

    def make(*given: Any, device: torch.device, **options: Any) -> int:
        given[1].to("cuda")
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(TokenTeacher, "to", to)
    monkeypatch.setattr(data_pairs, "make_pairs", make)
    with pytest.raises(UserError, match=r"8 pairs of a shard: lower data\.shard_size"):
        pairs(folder).setup("fit")
    assert devices == ["cuda", "cpu"]


def test_few_pairs_of_a_class_are_said(folder: str) -> None:
    with pytest.warns(UserWarning, match="num_pairs = 30 are 3 for each of 10 classes"):
        pairs(folder).setup("validate")
    with pytest.raises(UserError, match="num_pairs = 9 must be at least 10"):
        pairs(folder, num_pairs=9)


def test_what_does_not_fit_is_named(folder: str) -> None:
    with pytest.raises(UserError, match="holds no pairs"):
        _ = pairs(folder).pairs
    with pytest.raises(UserError, match="num_classes None"):
        pairs(folder, images=images(num_classes=None)).setup("fit")
    with pytest.raises(UserError, match=r"image_shape \(1, 16, 16\)"):
        pairs(folder, images=images(image_size=16)).setup("fit")
    for key in ("batch_size", "num_pairs", "shard_size"):
        with pytest.raises((ValueError, UserError), match=key):
            pairs(folder, **{key: 0})
    data = pairs(folder, batch_size=31)
    data.setup("fit")
    with pytest.raises(UserError, match="needs at least 31"):
        data.train_dataloader()
