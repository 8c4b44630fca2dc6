"""Which step of the sampling, and which guidance branches, each call of a network is: found once, then counted."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from genlight.quantization.context import SamplingContext, sampling_context

# names that networks of diffusers give their first input
_INPUTS = ("hidden_states", "sample")


def sampling_calls(network: nn.Module, sample: Callable[[], object], batch: int = 1) -> tuple[SamplingContext, ...]:
    """The place of every call that the network gets in one sampling, in order.

    A call with a multiple of the batch holds that many guidance branches. Where every call has the plain batch and all
    come in pairs of equal time, each pair is one step, its two calls are the branches. Every other call is a step.

    Args:
        network: is called by the sampling.
        sample: samples once.
        batch: how many samples that makes.

    Raises:
        ValueError: the network is not called, or with a batch that is no multiple of the samples.
    """
    seen: list[tuple[float, int]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        size = len(first_input(arguments, options))
        if size % batch:
            raise ValueError(f"the network was called with a batch of {size} in a sampling of {batch}")
        seen.append((_time(arguments, options), size // batch))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sample()
    finally:
        handle.remove()
    if not seen:
        raise ValueError("the sampling did not call the network")
    pairs = all(parts == 1 for _, parts in seen) and len(seen) % 2 == 0
    if pairs and all(one == other for (one, _), (other, _) in zip(seen[::2], seen[1::2], strict=True)):
        return tuple(SamplingContext(i // 2, len(seen) // 2, (i % 2,)) for i in range(len(seen)))
    return tuple(SamplingContext(i, len(seen), tuple(range(parts))) for i, (_, parts) in enumerate(seen))


@contextmanager
def numbered_calls(network: nn.Module, contexts: tuple[SamplingContext, ...]) -> Iterator[None]:
    """Each call of the network in the block runs in its context; a sampling begins after so many calls as there are."""
    numbers, opened = count(), ExitStack()

    def before(*_: Any) -> None:
        opened.enter_context(sampling_context(contexts[next(numbers) % len(contexts)]))

    def after(*_: Any) -> None:
        opened.close()

    handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        opened.close()


def first_input(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor:
    """What a network of diffusers is asked to denoise, of the arguments of its call.

    Raises:
        ValueError: there is no such argument.
    """
    found = arguments[0] if arguments else next((options[name] for name in _INPUTS if name in options), None)
    if not isinstance(found, Tensor):
        raise ValueError(f"the network is called without a tensor to denoise: {', '.join(options)}")
    return found


def _time(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> float:
    found = options.get("timestep", arguments[1] if len(arguments) > 1 else 0.0)
    return float(torch.as_tensor(found).flatten()[0])
