"""Variants of Distilled Decoding: where memory does not suffice for a batch, in mixed precision, and stopped early."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modules.tiny_token_teacher import tiny_teacher
from torch import Tensor

from genlight.diffusion.flow_codes import flow_choice
from genlight.loops import dd_work
from genlight.loops.dd_variants import Choices, Variant, _drawn, _teacher, _with_zeros
from genlight.loops.dd_work import CurveWork
from genlight.nets.autoregressive import decode
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
            metrics=Seen(), device=torch.device("cpu"), active_teacher=SimpleNamespace(model=None), settings=None,
            images_of=lambda decoded: decoded.vectors[..., None],
        )  # fmt: skip
        work = CurveWork(None, module, SimpleNamespace(eval_batch_size=4), [], [], {})  # type: ignore[arg-type]
        found.append(work._one(Variant("student", "student", 1, decode), noise, label))
        assert module.metrics.index == list(range(10))
    whole, parts = found
    assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.images, whole.images)
    assert parts.metrics == whole.metrics and parts.nll == pytest.approx(whole.nll)


def test_a_batch_that_does_not_fit_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have one, and so have all sizes of variants that need less."""

    def decode(noise: Tensor, label: Tensor) -> Decoded:
        if len(noise) > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return Decoded(label[:, None], noise)

    monkeypatch.setattr(dd_work, "_TIMED", 0.01)
    work = CurveWork(None, SimpleNamespace(device=torch.device("cpu")), None, [], [1, 3, 2], {})  # type: ignore[arg-type]
    noise, label = torch.randn(2, 3, 2), torch.arange(2)
    with pytest.warns(UserWarning, match="no time of student at batch 3"):
        found = work._times(Variant("student", "student", 1, decode), noise, label)
    assert found["ms_1"] and found["ms_2"] and found["ms_3"] is None


def test_the_teacher_by_the_flow_is_what_made_the_pairs_in_any_precision() -> None:
    """Stopped early it is that up to there, and zeros stand for the rest."""
    teacher = tiny_teacher("llamagen")
    module: Any = SimpleNamespace(teacher=teacher, active_teacher=teacher, settings=teacher.settings)
    noise = torch.randn(8, *teacher.noise_shape, generator=torch.Generator().manual_seed(0))
    label, codebook = torch.arange(8), teacher.model.codebook
    pairs = decode(teacher.model, label, teacher.settings, flow_choice(noise, codebook, teacher.model.group_sizes))
    choices = Choices((), (), (), 32, "2m")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_teacher(module, choices, 16)(noise, label).tokens, pairs)
        stopped = _with_zeros(module, choices, 11)(noise, label)
    assert torch.equal(stopped.tokens, pairs[:, :11]) and torch.equal(stopped.vectors[:, :11], codebook[pairs[:, :11]])
    assert stopped.vectors.shape == noise.shape and not stopped.vectors[:, 11:].any()


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_what_is_drawn_depends_on_sample_and_seed_alone(kind: str) -> None:
    """Not on the batch, nor on what was drawn before; and it is no more like the flow's than another draw is."""
    teacher = tiny_teacher(kind)
    module: Any = SimpleNamespace(teacher=teacher, active_teacher=teacher, settings=teacher.settings)
    noise = torch.randn(200, *teacher.noise_shape, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 10
    first, again = _drawn(module, 1), _drawn(module, 2)
    whole = first(noise, label)
    first(noise[:3], label[:3])
    parts = [first(noise[part], label[part]).tokens for part in (slice(0, 7), slice(7, 200))]
    assert torch.equal(torch.cat(parts), whole.tokens)
    assert torch.equal(whole.vectors, teacher.model.codebook[whole.tokens])
    other, flow = (
        again(noise, label).tokens,
        _teacher(module, Choices((), (), (), 32, "2m"), len(teacher.model.group_sizes)),
    )
    chance = (other == whole.tokens).double().mean()
    assert abs((flow(noise, label).tokens == whole.tokens).double().mean() - chance) < 0.03 and chance < 0.9


def test_the_student_goes_on_from_what_it_learned() -> None:
    """Unless other groups are asked for."""
    choices = Choices(None, (), (), 32, "2m")
    assert choices.involved_in(16, (0, 5)) == [(1, 6), (13, 17)]
    assert choices.involved_in(16, (0,)) == [(13, 17)]
    assert Choices([(2, 4)], (), (), 32, "2m").involved_in(16, (0,)) == [(2, 4)]
