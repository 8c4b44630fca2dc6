"""Validation of generators where memory does not suffice for a batch."""

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from genlight.modules import halving
from genlight.modules.generation import GeneratorValidation


class Metrics:
    """Keeps what it is given."""

    def reset(self) -> None:
        self.images: list[torch.Tensor] = []

    def to(self, device: Any) -> None: ...

    def update(self, images: torch.Tensor, index: torch.Tensor) -> None:
        assert len(images) == len(index)
        self.images.append(images)

    def compute(self) -> dict[str, float]:
        return {"mean": float(torch.cat(self.images).mean())}


class Generator(GeneratorValidation, LightningModule):
    """A sample is its noise plus its label; `room` samples fit into memory."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.calls, self.metrics = room, [], Metrics()

    def sample(self, noise: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        self.calls.append(len(noise))
        if len(noise) > self.room:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return noise if label is None else noise + label[:, None]


def validate(module: Generator, sizes: tuple[int, ...] = (10, 10, 3), labels: bool = True) -> torch.Tensor:
    """All images, of batches of these sizes."""
    noise, index = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(0)), torch.arange(sum(sizes))
    columns = {"noise": noise, "index": index} | ({"label": index} if labels else {})
    batches = [
        dict(zip(columns, each, strict=True)) for each in zip(*(c.split(sizes) for c in columns.values()), strict=True)
    ]
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    return torch.cat(module.metrics.images)


@pytest.mark.parametrize("labels", [True, False])
def test_a_batch_that_does_not_fit_is_sampled_in_halves(labels: bool) -> None:
    expected = validate(Generator(10), labels=labels)
    module = Generator(3)
    with pytest.warns(UserWarning, match="memory ran out: 2 of 10 samples at a time") as caught:
        found = validate(module, labels=labels)
    assert len([w for w in caught if "memory ran out" in str(w.message)]) == 1
    assert torch.equal(found, expected)
    # 10, 5 and then 2 at a time, for good
    assert module.calls == [10, 5, *[2] * 5, *[2] * 5, 2, 1]


def test_what_fits_is_sampled_at_once() -> None:
    module = Generator(10)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "memory ran out")
        validate(module)
    assert module.calls == [10, 10, 3]


def test_one_sample_that_does_not_fit_is_an_error_and_leaves_no_trace() -> None:
    module = Generator(0)
    with pytest.raises(torch.OutOfMemoryError):
        validate(module)
    assert module.calls == [10, 5, 2, 1]
    module.room, module.calls = 10, []
    validate(module)
    assert module.calls == [10, 10, 3]


def test_processes_that_sample_together_do_not_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halving, "is_sharded", lambda trainer: True)
    module = Generator(3)
    with pytest.raises(torch.OutOfMemoryError):
        validate(module)
    assert module.calls == [10]
