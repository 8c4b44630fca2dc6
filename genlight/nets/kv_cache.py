"""Keys and values of the positions that a transformer has read, kept for those to come."""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys and values of each layer, in memory reserved once: a step copies what is new, not all that is there.

    For decoding only: what it gives is a view of that memory, in which gradients do not pass.

    Args:
        num_layers: of the transformer.
        max_length: positions that a sequence may have.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        for name, value in (("num_layers", num_layers), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        self.max_length = max_length
        self._memory: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._filled = [0] * num_layers

    @property
    def length(self) -> int:
        """Positions that all layers hold."""
        return min(self._filled)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions [B, heads, S, D] to a layer; all of its keys and values, [B, heads, length, D] each.

        Raises:
            ValueError: more than `max_length` positions.
        """
        start = self._filled[layer]
        end = start + keys.shape[2]
        if end > self.max_length:
            raise ValueError(f"max_length = {self.max_length} must be at least {end}, the length of the sequence")
        memory = self._memory[layer]
        if memory is None:
            shape = (*keys.shape[:2], self.max_length, keys.shape[3])
            memory = self._memory[layer] = (keys.new_empty(shape), values.new_empty(shape))
        for held, new in zip(memory, (keys, values), strict=True):
            held[:, :, start:end] = new.detach()
        self._filled[layer] = end
        return memory[0][:, :, :end], memory[1][:, :, :end]
