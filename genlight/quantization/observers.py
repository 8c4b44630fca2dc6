"""Hooks that read the inputs of layers while the model runs, and which layers read the same input."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from genlight.quantization.balance import Balance, balance_input
from genlight.quantization.context import current_context
from genlight.quantization.conv import Geometry
from genlight.quantization.statistics import BatchPart, InputStatistics, StatisticsSettings, add_input, empty_statistics


class InputObserver:
    """Statistics of the inputs of layers, gathered in a `with` block in one pass.

    Attributes:
        statistics: by name of the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        settings: StatisticsSettings,
        *,
        balances: Mapping[str, Balance] | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> None:
        """
        Args:
            model: not changed.
            names: of its layers to observe, `nn.Linear` or `nn.Conv2d`.
            settings: what is kept.
            balances: by layer; inputs are balanced before they are measured, as static ranges of them need it.
            statistics: to go on from.

        Raises:
            ValueError: a name that is no linear or 2-D convolution layer of the model.
        """
        self._layers = {name: _observable(model, name) for name in names}
        self._settings = settings
        self._balances = balances or {}
        self._scope = ""
        self._part: BatchPart | None = None
        self._calls: dict[str, int] = {}
        self._stack = ExitStack()
        self.statistics: dict[str, InputStatistics] = {}
        for name, layer in self._layers.items():
            given = None if statistics is None else statistics.get(name)
            self.statistics[name] = given or _empty(layer, settings)

    def begin(self, scope: str, part: BatchPart | None = None) -> None:
        """Name what comes next, e.g. the batch, the same in a repetition and other in every process.

        Which rows are kept is a function of this name, so it must be called before each batch, and before each part of
        one that goes through the model in parts.
        """
        self._scope, self._part = scope, part
        self._calls = {}

    def __enter__(self) -> "InputObserver":
        for name, layer in self._layers.items():
            handle = layer.register_forward_pre_hook(self._hook(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            with torch.no_grad():
                values, rows = _rows(layer, inputs[0].detach(), self._balances.get(name, Balance()))
                key = f"{self._scope}/{name}/{call}"
                try:
                    self.statistics[name] = add_input(
                        self.statistics[name], values, rows, current_context(), self._settings, key, self._part
                    )
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

        return observe


def layers_by_input(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[tuple[str, ...]]:
    """Groups of layers that read the same tensors whenever they run, such as the query, key and value of an attention.

    They can share their scale, their rotation and their statistics, and the work on their input.

    Args:
        model: not changed.
        names: of its layers.
        run: calls the model once; a small batch will do, as all inputs are held until it ends.

    Returns:
        Groups in the order in which they first run; every name stands in one of them.

    Raises:
        ValueError: a name that is no such layer, or a layer that did not run.
    """
    seen: list[tuple[Tensor, int]] = []
    read: dict[str, list[int]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            version = 0 if inputs[0].is_inference() else inputs[0]._version
            index = next((i for i, (held, v) in enumerate(seen) if v == version and _same(held, inputs[0])), len(seen))
            if index == len(seen):
                seen.append((inputs[0], version))
            read.setdefault(name, []).append(index)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(_observable(model, name).register_forward_pre_hook(note(name)).remove)
        run()
    unused = [name for name in names if name not in read]
    if unused:
        raise ValueError(f"{unused[0]!r} did not run: it belongs to another use of the model, leave it out")
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, indices in read.items():
        layer = _observable(model, name)
        # patches of a convolution are the same for layers that look at the same places only
        where = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
        groups.setdefault((where, *indices), []).append(name)
    return [tuple(group) for group in groups.values()]


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, both held, are the same numbers in the same memory."""
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
    )


def _observable(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name!r} is no layer of the model") from None
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"{name!r} must be a linear or a 2-D convolution layer, not {type(layer).__name__}")
    return layer


def _empty(layer: nn.Linear | nn.Conv2d, settings: StatisticsSettings) -> InputStatistics:
    weight = layer.weight
    channels = weight.shape[1] * (layer.groups if isinstance(layer, nn.Conv2d) else 1)
    return empty_statistics(channels, channels * weight[0, 0].numel(), settings, weight.device)


def _rows(layer: nn.Module, values: Tensor, balance: Balance) -> tuple[Tensor, Tensor]:
    """An input with its channels last, and as rows of what the layer's matrix multiplies."""
    if isinstance(layer, nn.Conv2d):
        balanced = balance_input(values, balance, dim=1)
        where = Geometry.of(layer)
        return balanced.movedim(1, -1), where.patches(where.pad(balanced))
    balanced = balance_input(values, balance)
    return balanced, balanced.reshape(-1, balanced.shape[-1])
