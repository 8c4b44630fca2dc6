"""Statistics of layer inputs: what hooks see, how parts merge, what is saved."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from genlight.errors import UserError
from genlight.io import CorruptFileError, save_state
from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.context import SamplingContext, sampling_context
from genlight.quantization.hadamard import random_rotation
from genlight.quantization.observers import InputObserver, layers_by_input
from genlight.quantization.statistics import (
    BatchPart,
    InputStatistics,
    StatisticsSettings,
    load_statistics,
    merge_statistics,
    save_statistics,
)

SETTINGS = StatisticsSettings(branches=2, steps=3, hessian=torch.float64, sample_rows=10, seed=4)
NAMES = ["conv", "query", "key", "out"]


class Attention(nn.Module):
    """Two layers with one input, one after them, and a convolution before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 8, 2, padding=1)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.conv(image).flatten(2).transpose(1, 2)
        return self.out(torch.softmax(self.query(tokens) @ self.key(tokens).transpose(1, 2), -1) @ tokens)


def batch(index: int) -> tuple[Tensor, SamplingContext]:
    values = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(index))
    return values * (index + 1), SamplingContext(index % 3, 3, (0, 1))


def observed(indices: range, **options: object) -> dict[str, InputStatistics]:
    model = Attention()
    observer = InputObserver(model, NAMES, SETTINGS, **options)  # type: ignore[arg-type]
    with observer:
        for index in indices:
            values, context = batch(index)
            observer.begin(str(index))
            with sampling_context(context):
                model(values)
    # hooks are gone
    before = observer.statistics["out"].rows
    model(batch(0)[0])
    assert observer.statistics["out"].rows == before
    return observer.statistics


def test_what_is_kept_is_what_went_through() -> None:
    model, found = Attention(), observed(range(6))
    absmax = torch.zeros(2, 3, 8)
    least, most = torch.full((2, 3), torch.inf), torch.full((2, 3), -torch.inf)
    moments, rows = torch.zeros(8, 8, dtype=torch.float64), 0
    for index in range(6):
        values, context = batch(index)
        tokens = model.conv(values).flatten(2).transpose(1, 2).detach()
        moments += torch.einsum("bnc,bnd->cd", tokens.double(), tokens.double())
        rows += tokens.shape[0] * tokens.shape[1]
        for branch, part in enumerate(tokens.split(2)):
            here = branch, context.step
            absmax[here] = torch.maximum(absmax[here], part.abs().amax(dim=(0, 1)))
            least[here], most[here] = min(least[here], part.min()), max(most[here], part.max())
    for name in ("query", "key"):
        assert torch.equal(found[name].absmax, absmax)
        assert torch.equal(found[name].minimum, least) and torch.equal(found[name].maximum, most)
        assert found[name].rows == rows
        assert found[name].hessian is not None and torch.allclose(found[name].hessian, moments)
    conv = found["conv"]
    assert conv.hessian is not None and conv.hessian.shape == (8, 8) and conv.absmax.shape == (2, 3, 2)
    patches = torch.cat(
        [nn.functional.unfold(batch(i)[0], 2, padding=1).transpose(1, 2).flatten(0, 1) for i in range(6)]
    )
    assert torch.allclose(conv.hessian, patches.double().t() @ patches.double())
    assert conv.sample is not None and conv.sample.shape == (10, 8)
    assert all(bool((patches == row).all(dim=1).any()) for row in conv.sample)


def equal(first: InputStatistics, second: InputStatistics) -> None:
    assert first.rows == second.rows
    for a, b in zip(vars(first).values(), vars(second).values()):
        if isinstance(a, Tensor):
            assert torch.allclose(a, b, rtol=1e-12)


def test_parts_merge_to_the_whole_in_any_order() -> None:
    whole, first, second = observed(range(6)), observed(range(2)), observed(range(2, 6))
    for name in NAMES:
        equal(merge_statistics(first[name], second[name], SETTINGS), whole[name])
        equal(merge_statistics(second[name], first[name], SETTINGS), whole[name])


def test_an_interrupted_calibration_goes_on_to_the_same_statistics(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.safetensors", observed(range(2)), fingerprint="model", batches=2)
    held, batches = load_statistics(tmp_path / "s.safetensors", fingerprint="model")
    whole = observed(range(6))
    for name, entry in observed(range(batches, 6), statistics=held).items():
        assert entry.rows == whole[name].rows
        for a, b in zip(vars(entry).values(), vars(whole[name]).values()):
            assert not isinstance(a, Tensor) or torch.equal(a, b)


def test_a_batch_in_parts_gives_the_statistics_of_the_whole() -> None:
    """Parts hold some samples of each branch; the same rows are kept."""
    whole, model = observed(range(2)), Attention()
    observer = InputObserver(model, NAMES, SETTINGS)
    with observer:
        for index in range(2):
            values, context = batch(index)
            for place in range(2):
                observer.begin(str(index), BatchPart(place, place + 1, 2))
                with sampling_context(context):
                    model(values[place::2])
    for name in NAMES:
        entry = observer.statistics[name]
        assert entry.rows == whole[name].rows and torch.equal(entry.sample_keys, whole[name].sample_keys)
        for a, b in zip(vars(entry).values(), vars(whole[name]).values()):
            assert not isinstance(a, Tensor) or torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_statistics(path, observed(range(1)), fingerprint="model", batches=1)
    with pytest.raises(UserError, match="'model'"):
        load_statistics(path, fingerprint="other")
    save_state(path, {"layers": []}, kind="input statistics")
    with pytest.raises(CorruptFileError, match="statistics of layers"):
        load_statistics(path, fingerprint="other")
    with pytest.raises(ValueError, match="cannot be merged"):
        first = observed(range(1))
        merge_statistics(first["conv"], first["out"], SETTINGS)


def test_balanced_inputs_are_measured_balanced() -> None:
    balance = Balance(torch.linspace(0.5, 2, 8), random_rotation(8, "full", 0))
    found = observed(range(3), balances={"query": balance})
    plain = observed(range(3))["query"]
    tokens = [Attention().conv(batch(i)[0]).flatten(2).transpose(1, 2).detach() for i in range(3)]
    balanced = [balance_input(part, balance) for part in tokens]
    expected = torch.stack([part[:2].max() for part in balanced])
    assert torch.equal(found["query"].maximum[0], expected)
    assert not torch.equal(found["query"].maximum, plain.maximum)
    assert torch.equal(found["key"].maximum, plain.maximum)


def test_nothing_is_known_of_steps_that_were_not_run() -> None:
    found = observed(range(2))["out"]
    assert not bool(found.absmax[:, 2].any())
    assert bool((found.minimum[:, 2] == torch.inf).all()) and bool((found.maximum[:, 2] == -torch.inf).all())


def test_what_cannot_be_observed_is_refused() -> None:
    model = Attention()
    for name in ("absent", ""):
        with pytest.raises(ValueError, match=repr(name)):
            InputObserver(model, [name], SETTINGS)
    with InputObserver(model, ["conv"], SETTINGS), pytest.raises(ValueError, match=r"conv: .*not finite"):
        model(torch.full((2, 2, 5, 5), torch.nan))
    context = SamplingContext(4, 5)
    with (
        sampling_context(context),
        InputObserver(model, ["conv"], SETTINGS),
        pytest.raises(ValueError, match="outside the 3 steps"),
    ):
        model(batch(0)[0])
    with pytest.raises(ValueError, match="16 bits drift"):
        StatisticsSettings(hessian=torch.float16)
    with pytest.raises(ValueError, match="steps = 0"):
        StatisticsSettings(steps=0)


def test_layers_that_read_one_input_are_found() -> None:
    model = Attention()
    groups = layers_by_input(model, NAMES, lambda: model(batch(0)[0]))
    assert groups == [("conv",), ("query", "key"), ("out",)]
    with torch.inference_mode():
        assert layers_by_input(model, NAMES, lambda: model(batch(0)[0])) == groups
    with pytest.raises(ValueError, match="'unused' did not run"):
        layers_by_input(model, ["unused"], lambda: model(batch(0)[0]))


def test_an_input_changed_in_place_is_another_input() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            total = self.first(values) + self.second(values[:])
            return total + self.third(values.add_(1))

    model = Changing()
    groups = layers_by_input(model, ["first", "second", "third"], lambda: model(torch.zeros(2, 4)))
    assert groups == [("first", "second"), ("third",)]
