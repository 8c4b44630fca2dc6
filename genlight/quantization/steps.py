"""Ranges of inputs by step: a network tells its layers which of the calibrated timesteps is nearest to its call's."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from genlight.quantization.context import SamplingSteps, one_timestep
from genlight.quantization.convert import quantized_layers
from genlight.quantization.trajectory import NetworkCall

_ARGUMENT = "timestep"


def timestep_of(network: nn.Module, call: NetworkCall) -> float:
    """The timestep of a call that was recorded.

    Raises:
        ValueError: the network takes none, or was given none or different ones for the samples of the call.
    """
    return float(one_timestep(_argument(call.arguments, call.options, _place(network))))


def steps_of(network: nn.Module) -> SamplingSteps | None:
    """What `follow_steps` gave to a network; None where one range serves all steps.

    Raises:
        ValueError: a layer has ranges by step, and nothing says at which timesteps.
    """
    steps = getattr(network, "sampling_steps", None)
    for name, layer in quantized_layers(network).items():
        if layer.has_steps and steps is None:
            raise ValueError(f"{name} has ranges by step, and the network no timesteps of them")
    return steps


def follow_steps(network: nn.Module, steps: SamplingSteps) -> Callable[[], None]:
    """From now on, each call of the network says by its timestep which ranges its layers take.

    Args:
        network: of diffusers, with quantized layers; nothing is done where none of them has ranges by step.
        steps: of the calibration.

    Returns:
        What undoes it.

    Raises:
        ValueError: ranges for guidance branches or another number of steps, or a network that takes no timestep.
    """
    layers = {name: layer for name, layer in quantized_layers(network).items() if layer.has_steps}
    for name, layer in layers.items():
        assert layer.activation_range is not None
        shape, count = tuple(layer.activation_range.shape[:2]), len(steps.timesteps)
        if shape != (1, count):
            raise ValueError(f"{name} has ranges of {shape[0]} branches and {shape[1]} steps, not of 1 and {count}")
    if not layers:
        return lambda: None
    place = _place(network)

    def find(network: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        # of the network that is called, which may be a copy
        network.sampling_steps.find(_argument(arguments, options, place))  # type: ignore[operator, union-attr]

    before = {name: layer.steps for name, layer in layers.items()}
    for layer in layers.values():
        layer.steps = steps
    network.sampling_steps = steps
    handle = network.register_forward_pre_hook(find, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        del network.sampling_steps
        for name, layer in layers.items():
            layer.steps = before[name]

    return undo


@contextmanager
def following_steps(network: nn.Module, steps: SamplingSteps | None) -> Iterator[None]:
    """`follow_steps` in the block; None: nothing is done."""
    undo = None if steps is None else follow_steps(network, steps)
    try:
        yield
    finally:
        if undo is not None:
            undo()


def _place(network: nn.Module) -> int:
    """Of the timestep among the arguments of a call."""
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    if _ARGUMENT not in names:
        raise ValueError(f"{type(network).__name__} takes no argument {_ARGUMENT!r}, by which ranges would be chosen")
    return names.index(_ARGUMENT)


def _argument(arguments: tuple[Any, ...], options: Mapping[str, Any], place: int) -> Any:
    return options[_ARGUMENT] if _ARGUMENT in options else arguments[place] if place < len(arguments) else None
