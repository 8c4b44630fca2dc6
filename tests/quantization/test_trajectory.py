"""Calls of a network in a sampling: where they are, what they were, and how far another network is from them."""

import math

import pytest
import torch
from torch import Tensor, nn

from genlight.quantization.calls import numbered_calls, sampling_calls
from genlight.quantization.context import SamplingContext, current_context
from genlight.quantization.trajectory import decibels, noise_to_signal, recorded_calls, replay


class Network(nn.Module):
    """x + t of twice as many channels, and what it knows of its place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.places: list[SamplingContext] = []

    def forward(self, hidden_states: Tensor, timestep: Tensor, extra: dict | None = None) -> tuple[Tensor]:
        self.places.append(current_context())
        out = hidden_states * self.weight + timestep.reshape(-1, 1, 1, 1)
        return (torch.cat([out, 100 * out], dim=1),)


def sample(network: Network, kind: str, batch: int = 1) -> None:
    x = torch.ones(batch, 1, 2, 2)
    for t in (3.0, 2.0, 1.0):
        times = torch.full((batch,), t)
        if kind == "together":
            network(torch.cat([x, x]), torch.cat([times, times]))
        else:
            network(hidden_states=x, timestep=times)
            if kind == "apart" or (kind == "heun" and t < 3):
                network(hidden_states=x, timestep=times)


@pytest.mark.parametrize(
    ("kind", "steps", "branches"),
    [("together", 3, [(0, 1)] * 3), ("apart", 3, [(0,), (1,)] * 3), ("plain", 3, [(0,)] * 3), ("heun", 5, [(0,)] * 5)],
)
def test_steps_and_branches_are_told_apart(kind: str, steps: int, branches: list[tuple[int, ...]]) -> None:
    network = Network()
    found = sampling_calls(network, lambda: sample(network, kind))
    assert [context.branches for context in found] == branches
    assert {context.num_steps for context in found} == {steps}
    assert [context.step for context in found] == sorted(context.step for context in found)
    network.places.clear()
    with numbered_calls(network, found):
        sample(network, kind, 4)
        sample(network, kind, 4)
    assert network.places == [*found, *found]
    sample(network, kind)
    assert network.places[-1] == SamplingContext()


def test_a_network_that_is_never_called_is_refused() -> None:
    with pytest.raises(ValueError, match="did not call"):
        sampling_calls(Network(), lambda: None)
    network = Network()
    with pytest.raises(ValueError, match="a batch of 1 in a sampling of 2"):
        sampling_calls(network, lambda: sample(network, "plain"), batch=2)


def test_the_place_is_left_after_an_error() -> None:
    network = Network()
    with numbered_calls(network, (SamplingContext(1, 2),)), pytest.raises(TypeError):
        network(1, 2, 3, 4)
    assert current_context() == SamplingContext()


def test_a_replay_asks_the_same_and_noise_is_that_of_the_prediction() -> None:
    """The same network has none; one of weight 1 + e has e² Σx² / Σ(x + t)²; a learned variance counts nothing."""
    network, text = Network(), torch.randn(2, 3)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.5, -0.25])
    with recorded_calls(network) as calls:
        network(x, times, extra={"text": text})
        network(2 * x, times, extra={"text": text})
    assert len(calls) == 2 and calls[0].output.shape == (2, 1, 2, 2)
    assert calls[0].options["extra"]["text"] is calls[1].options["extra"]["text"]
    x.zero_()  # what was recorded does not change with the caller's tensors
    assert torch.equal(replay(network, calls[1]), calls[1].output)
    assert noise_to_signal(network, calls) == 0 and decibels(0.0) == 200
    with torch.no_grad():
        network.weight += 1e-2
    inputs = [call.arguments[0].double() for call in calls]
    expected = sum(float((1e-2 * x).square().sum()) for x in inputs)
    expected /= sum(float(call.output.double().square().sum()) for call in calls)
    assert noise_to_signal(network, calls) == pytest.approx(expected, rel=1e-4)
    assert decibels(expected) == pytest.approx(-10 * math.log10(expected))
    assert decibels(math.nan) == decibels(math.inf) == -200
    with pytest.raises(ValueError, match="no calls"):
        noise_to_signal(network, [])


def test_where_memory_runs_out_rows_of_both_halves_of_guidance_are_asked_together() -> None:
    """Every second row: the network sees as many rows without guidance as with it, and the sum is the same."""
    network = Network()
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    marks, seen = torch.tensor([0.0] * 4 + [1.0] * 4), list[list[float]]()
    with recorded_calls(network) as calls:
        network(torch.cat([x, x]), marks)
        network(hidden_states=torch.cat([x, x]), timestep=torch.tensor(3.0))
    with torch.no_grad():
        network.weight += 1e-2
    expected = noise_to_signal(network, calls)

    def memory(_: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        if arguments:
            seen.append(arguments[1].tolist())
        if len(arguments[0] if arguments else options["hidden_states"]) > 2:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    network.register_forward_pre_hook(memory, with_kwargs=True)
    with pytest.warns(UserWarning, match="2 of 8 rows of a call at a time"):
        assert noise_to_signal(network, calls) == pytest.approx(expected, rel=1e-12)
    assert seen[-4:] == [[0.0, 1.0]] * 4 and list(map(len, seen)) == [8, 4, 2, 2, 2, 2]
