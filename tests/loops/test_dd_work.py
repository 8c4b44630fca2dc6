"""Variants of Distilled Decoding where memory does not suffice for a batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from genlight.loops import dd_work
from genlight.loops.dd_variants import Variant
from genlight.loops.dd_work import CurveWork
from genlight.nets.few_step import Decoded


class Seen:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.index: list[int] = []

    def to(self, device: Any) -> None: ...

    def reset(self) -> None: ...

    def update(self, images: Tensor, index: Tensor) -> None:
        self.images.append(images)
        self.index += index.tolist()

    def compute(self) -> dict[str, float]:
        return {"mean": float(torch.cat(self.images).mean())}


def test_a_variant_that_does_not_fit_is_measured_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dd_work, "negative_log_likelihood", lambda _, tokens, label, __: (tokens + label[:, None]) / 7)
    noise, label = torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(0)), torch.arange(10)
    found = []
    for room in (4, 1):

        def decode(noise: Tensor, label: Tensor, room: int = room) -> Decoded:
            if len(noise) > room:
                raise torch.OutOfMemoryError("tried to allocate 1 GiB")
            return Decoded((10 * noise.sum(-1)).long() + label[:, None], noise)

        module = SimpleNamespace(
            metrics=Seen(), device=torch.device("cpu"), teacher=SimpleNamespace(model=None), settings=None,
            images_of=lambda decoded: decoded.vectors[..., None],
        )  # fmt: skip
        work = CurveWork(None, module, SimpleNamespace(eval_batch_size=4), [], [], {})  # type: ignore[arg-type]
        found.append(work._one(Variant("student", "student", 1, decode), noise, label))
        assert module.metrics.index == list(range(10))
    whole, parts = found
    assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.images, whole.images)
    assert parts.metrics == whole.metrics and parts.nll == pytest.approx(whole.nll)
