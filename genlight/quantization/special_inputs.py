"""Layers whose inputs hold numbers of two kinds: features beside a shortcut, or text with a token that never changes.

Both are found by watching one call of the network, so that nothing here knows the names of one family.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.trajectory import NetworkCall, replay

_TEXT = "encoder_hidden_states"
# some times the spacing of bfloat16, in which pipelines run: numbers of one prompt differ in their last digits between
# batches
_TOLERANCE = 2.0**-6


@dataclass(frozen=True, eq=False)
class SpecialInputs:
    """What is known of such layers.

    Attributes:
        splits: channels of the first of two feature maps, by layer.
        text: layers that read text embeddings with tokens that never change.
        positions: of these tokens.
        rows: their embeddings [positions, features].
        ranges: minimum and maximum of the parts of each layer's input, float32 [parts, steps, 2]: both feature maps, or
            all tokens but those at the positions.
    """

    splits: Mapping[str, int] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    ranges: Mapping[str, Tensor] = field(default_factory=dict)


def special_inputs(
    network: nn.Module,
    calls: Sequence[NetworkCall],
    *,
    split: bool,
    ratio: float | None,
    places: Sequence[int] | None = None,
) -> SpecialInputs:
    """Such layers of a network, with the ranges of their inputs over calls in full precision.

    Args:
        network: of diffusers, not changed.
        calls: of different prompts.
        split: look for two feature maps side by side.
        ratio: look for tokens that never change, see `constant_positions`; None: do not.
        places: the step of each call, for ranges by step; None: one range for all.

    Raises:
        ValueError: too few different prompts to tell which tokens never change.
    """
    splits = concatenated_inputs(network, lambda: replay(network, calls[0])) if split else {}
    text: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    rows = torch.empty(0, 0)
    given = [found for call in calls if (found := text_of(call.arguments, call.options)) is not None]
    if ratio is not None and given:
        texts = torch.cat(given)
        positions = constant_positions(texts, ratio=ratio)
        if not positions:
            warnings.warn(
                f"constant_tokens: no text token is the same in all {len(texts)} prompts and more than "
                f"constant_ratio = {ratio:g} times as large as all others, so that none is kept",
                stacklevel=2,
            )
        else:
            text = text_layers(network, lambda: replay(network, calls[0]))
            rows = texts[texts.abs().amax(dim=(1, 2)) > 0][0, list(positions)]
    parts: dict[str, list[Callable[[Tensor], Tensor]]] = {
        name: [_channels(0, channels), _channels(channels, None)] for name, channels in splits.items()
    }
    parts |= {name: [lambda x: without_positions(x, positions)] for name in text}
    ranges = part_ranges(network, parts, _runs(network, calls, places)) if parts else {}
    rows = rows.to(next(network.parameters()).device)
    return SpecialInputs(splits, text, positions, rows, ranges)


def _runs(network: nn.Module, calls: Sequence[NetworkCall], places: Sequence[int] | None) -> list[Callable[[], object]]:
    """What replays the calls of each step; of all of them where None tells steps apart."""

    def replays(chosen: Sequence[NetworkCall]) -> Callable[[], object]:
        return lambda: [replay(network, call) for call in chosen]

    if places is None:
        return [replays(calls)]
    by_step: list[list[NetworkCall]] = [[] for _ in range(max(places) + 1)]
    for call, place in zip(calls, places, strict=True):
        by_step[place].append(call)
    return [replays(chosen) for chosen in by_step]


def _channels(begin: int, end: int | None) -> Callable[[Tensor], Tensor]:
    return lambda values: values[:, begin:end]


class _Concatenations(TorchFunctionMode):
    """Notes every concatenation of two feature maps along their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        output = func(*args, **options)
        if func in (torch.cat, torch.concat, torch.concatenate) and output.ndim == 4:
            parts = args[0] if args else options["tensors"]
            dim = args[1] if len(args) > 1 else options.get("dim", options.get("axis", 0))
            if len(parts) == 2 and dim % 4 == 1:
                self.found.append((output, parts[0].shape[1]))
        return output


def concatenated_inputs(model: nn.Module, run: Callable[[], object]) -> dict[str, int]:
    """Convolutions that read two feature maps side by side as they are, and the channels of the first.

    In the up blocks of a UNet these are the shortcut convolutions, which read decoder features and a skip connection of
    another range; the first convolution of the same block reads them normalized, together (MixDQ, arXiv:2405.17873,
    after Q-Diffusion, arXiv:2302.04304).

    Args:
        model: not changed; may lie on the device "meta".
        run: calls it once.
    """
    mode, splits = _Concatenations(), dict[str, int]()

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            channels = next((channels for output, channels in mode.found if output is inputs[0]), None)
            if channels is not None:
                splits[name] = channels

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == 1:
                stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        stack.enter_context(mode)
        run()
    return splits


def text_layers(network: nn.Module, run: Callable[[], object]) -> tuple[str, ...]:
    """Linear layers that read the text embeddings as the network is given them, keys and values of cross-attention.

    Args:
        network: of diffusers, not changed.
        run: calls it once.
    """
    text: list[Tensor] = []
    found: dict[str, None] = {}

    def begin(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        text[:] = [given for given in [text_of(arguments, options)] if given is not None]

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if text and inputs and inputs[0] is text[0]:
                found[name] = None

        return hook

    with ExitStack() as stack, torch.no_grad():
        stack.callback(network.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        run()
    return tuple(found)


def text_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """The text embeddings [batch, tokens, features] among the arguments of a network of diffusers, if it has any."""
    found = options.get(_TEXT, arguments[2] if len(arguments) > 2 else None)
    return found if isinstance(found, Tensor) and found.ndim == 3 else None


def same_tokens(given: Tensor, known: Tensor) -> Tensor:
    """Which embeddings [..., features] are known ones but for rounding, bool [..., 1]; shapes are broadcast."""
    allowed = _TOLERANCE * (known.abs() + known.abs().mean(dim=-1, keepdim=True))
    return ((given - known).abs() <= allowed).all(dim=-1, keepdim=True)


def constant_positions(texts: Tensor, *, ratio: float = 4.0, least: int = 8) -> tuple[int, ...]:
    """Positions of tokens that are the same in every text and larger than all others.

    A causal text encoder gives its first token the same embedding whatever follows; in CLIP it is an outlier, and one
    scale for all tokens would be made for it (MixDQ, section on the BOS-aware quantization).

    Args:
        texts: embeddings [texts, tokens, features]; rows of zeros, which pipelines use for no text, are left out.
        ratio: how many times the largest magnitude of the other tokens such a token must have.
        least: different texts that are needed.

    Raises:
        ValueError: fewer different texts.
    """
    rows = texts[texts.abs().amax(dim=(1, 2)) > 0].float()
    count = len(torch.unique(rows.flatten(1), dim=0))
    if count < least:
        raise ValueError(f"constant tokens are found over {least} or more different prompts, and there are {count}")
    same = same_tokens(rows, rows[:1]).all(dim=0).squeeze(-1)
    largest = rows.abs().amax(dim=(0, 2))
    others = largest[~same]
    if not len(others):
        return ()
    return tuple(torch.nonzero(same & (largest > ratio * others.max())).flatten().tolist())


def part_ranges(
    model: nn.Module,
    parts: Mapping[str, Sequence[Callable[[Tensor], Tensor]]],
    runs: Sequence[Callable[[], object]],
) -> dict[str, Tensor]:
    """Least and greatest number of each part of the inputs of layers, over all that a run calls.

    Args:
        model: not changed.
        parts: for each layer, what gives the parts of its input.
        runs: each calls the model once or more.

    Returns:
        By layer, float32 [parts, runs, 2].
    """
    found = [_ranges_of_run(model, parts, run) for run in runs]
    return {name: torch.stack([ranges[name] for ranges in found], dim=1) for name in parts}


def _ranges_of_run(
    model: nn.Module, parts: Mapping[str, Sequence[Callable[[Tensor], Tensor]]], run: Callable[[], object]
) -> dict[str, Tensor]:
    """[parts, 2] by layer."""
    ranges: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            found = torch.stack([torch.stack(part(inputs[0]).float().aminmax()) for part in parts[name]])
            before = ranges.get(name, found)
            ranges[name] = torch.stack(
                [torch.minimum(before[:, 0], found[:, 0]), torch.maximum(before[:, 1], found[:, 1])], dim=1
            )

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in parts:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note(name)).remove)
        run()
    return ranges


def balanced_ranges(
    network: nn.Module,
    balances: Mapping[str, Balance],
    calls: Sequence[NetworkCall],
    *,
    text: Collection[str] = (),
    positions: Sequence[int] = (),
    places: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Least and greatest number of the balanced input of each layer over calls, float32 [1, steps, 2], by layer.

    Args:
        network: of diffusers, not changed.
        balances: by layer.
        calls: in full precision.
        text: layers in whose inputs the tokens at the positions do not count.
        positions: ascending.
        places: the step of each call, for ranges by step; None: one range for all.
    """

    def reading(name: str) -> Callable[[Tensor], Tensor]:
        dim = 1 if isinstance(network.get_submodule(name), nn.Conv2d) else -1
        left_out = positions if name in text else ()
        return lambda values: balance_input(without_positions(values, left_out), balances[name], dim)

    return part_ranges(network, {name: [reading(name)] for name in balances}, _runs(network, calls, places))


def without_positions(values: Tensor, positions: Sequence[int]) -> Tensor:
    """[..., tokens, features] without the tokens at ascending positions; slices, which need no index on the device."""
    begins, ends = [0, *(position + 1 for position in positions)], [*positions, values.shape[-2]]
    parts = [values[..., begin:end, :] for begin, end in zip(begins, ends, strict=True) if end > begin]
    return parts[0] if len(parts) == 1 else torch.cat([values[..., :0, :], *parts], dim=-2)
