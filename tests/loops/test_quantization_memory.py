"""The calibration pass and the samplings of quantization where memory does not suffice for a batch."""

import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genlight.errors import UserError
from genlight.loops import quantization_statistics
from genlight.loops.quantization_statistics import calibrated_statistics, read_statistics
from genlight.loops.quantization_work import QuantizationWork
from genlight.quantization.context import SamplingContext
from genlight.quantization.observers import InputObserver
from genlight.quantization.statistics import InputStatistics, StatisticsSettings

SETTINGS = StatisticsSettings(branches=2, steps=2, hessian=torch.float64, sample_rows=6)
CONTEXTS = (SamplingContext(0, 2, (0, 1)), SamplingContext(1, 2, (0, 1)))


class Network(nn.Module):
    """Two layers; memory runs out between them where there are more than `room` rows."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.room = nn.Linear(4, 4), nn.Linear(4, 4), room

    def forward(self, x: Tensor) -> tuple[Tensor]:
        hidden = self.first(x)
        if len(x) > self.room:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return (self.second(hidden.tanh()),)


class Generator:
    """Two steps with guidance."""

    device = torch.device("cpu")

    def __init__(self, network: Network) -> None:
        self.network = network

    @torch.no_grad()
    def sample_whole(self, noise: Tensor, label: Tensor) -> Tensor:
        for _ in CONTEXTS:
            plain, guided = self.network(torch.cat([noise, noise + label[:, None]]))[0].chunk(2)
            noise = noise - guided + plain / 2
        return noise

    sample_latents = sample_whole


class Data:
    """Noise [N, 4] and labels in batches of four."""

    draw, num_samples, eval_batch_size, trainer = "report", 10, 4, None

    def val_dataloader(self) -> DataLoader[Any]:
        noise = torch.randn(self.num_samples, 4, generator=torch.Generator().manual_seed(1))
        label = torch.arange(self.num_samples)
        batches = zip(noise.split(self.eval_batch_size), label.split(self.eval_batch_size), strict=True)
        return DataLoader([{"noise": x, "label": y} for x, y in batches], batch_size=None)


def validate(step: Any, dataloaders: DataLoader[Any]) -> None:
    for number, batch in enumerate(dataloaders):
        step.validation_step(batch, number)


EVALUATIONS: Any = SimpleNamespace(
    display=SimpleNamespace(show=lambda *_: None, phase=lambda *_: nullcontext()),
    trainer=SimpleNamespace(is_global_zero=True),
    agreed=lambda value: value,
    validate=validate,
    inside=lambda _, work: work(),
)


def calibrated(room: int, path: Path) -> dict[str, InputStatistics]:
    network = Network(room)
    return calibrated_statistics(
        EVALUATIONS, Generator(network), Data(), network, CONTEXTS, ["first", "second"], SETTINGS, 10, path, "here"
    )


def test_a_calibration_in_halves_observes_the_same(tmp_path: Path) -> None:
    """What the first layer saw of the calls that failed counts nowhere, and the same rows are kept."""
    expected = calibrated(8, tmp_path / "whole")
    with pytest.warns(UserWarning, match="memory ran out: 2 of 4 samples at a time"):
        found = calibrated(5, tmp_path / "halves")
    for name, one in expected.items():
        assert found[name].rows == one.rows == 2 * 2 * 10
        for a, b in zip(vars(found[name]).values(), vars(one).values(), strict=True):
            assert not isinstance(a, Tensor) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    with pytest.raises(torch.OutOfMemoryError):
        calibrated(1, tmp_path / "none")


def test_layers_whose_second_moments_do_not_fit_together_are_observed_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the statistics of one pass; what is there of a part is gone on from, and nothing is left beside the file."""
    expected = calibrated(8, tmp_path / "whole.safetensors")
    monkeypatch.setattr(quantization_statistics, "_room", lambda device: 4 * 4 * 8)
    path, passes = tmp_path / "parts.safetensors", list[list[str]]()
    real = quantization_statistics.save_statistics

    def save(file: Path, found: dict[str, InputStatistics], **options: Any) -> None:
        passes.append(list(found))
        real(file, found, **options)
        if len(passes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(quantization_statistics, "save_statistics", save)
    with pytest.raises(KeyboardInterrupt):
        calibrated(8, path)
    assert not path.exists()
    found = calibrated(8, path)
    assert passes[:2] == [["first"], ["second"]] and passes[-1] == ["first", "second"] == list(found)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == ["parts.safetensors", "whole.safetensors"]
    for name, one in expected.items():
        for a, b in zip(vars(found[name]).values(), vars(one).values(), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_calibration_that_saw_nothing_is_refused_and_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(InputObserver, "__enter__", lambda self: self)
        with pytest.raises(UserError, match=r"saw no input of 'first': .* without torch.compile"):
            calibrated(8, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_what_was_observed_is_let_go_before_it_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And second moments, which take more than the network, stay in the memory of the host."""
    made: list[weakref.ref[InputObserver]] = []

    class Watched(InputObserver):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(weakref.ref(self))

    def read(path: Path, network: Network, fingerprint: str, batches: int) -> dict[str, InputStatistics]:
        assert len(made) == 1 and made[0]() is None
        return read_statistics(path, network.to("meta"), fingerprint, batches)

    monkeypatch.setattr(quantization_statistics, "InputObserver", Watched)
    monkeypatch.setattr(quantization_statistics, "read_statistics", read)
    for entry in calibrated(8, tmp_path / "whole").values():
        assert entry.hessian is not None and entry.sample is not None
        assert entry.hessian.device.type == "cpu" and entry.absmax.is_meta and entry.sample.is_meta


def test_a_reference_in_halves_holds_the_same_images_and_no_call_that_failed() -> None:
    found = []
    for room in (8, 5):
        network = Network(room)
        work = QuantizationWork(None, EVALUATIONS, Generator(network), Data())  # type: ignore[arg-type]
        vars(work).update(network=network, _chosen=({}, {}))
        reference = work.reference("search", 10)
        with torch.no_grad():
            network.first.weight.mul_(1.01)
        found.append((reference, work.noise(reference), work.images(reference)))
    (whole, noise, images), (parts, noise_in_parts, images_in_parts) = found
    assert [len(call.output) for call in whole.calls] == [8, 8, 8, 8, 4, 4]
    assert [len(call.output) for call in parts.calls] == [4] * 10
    assert torch.allclose(parts.images, whole.images, atol=1e-6) and torch.allclose(images_in_parts, images, atol=1e-6)
    assert noise_in_parts == pytest.approx(noise, rel=1e-5) and noise > 0
