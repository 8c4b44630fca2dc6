"""Hidden states kept between candidates: layers before the first that an edit changes need not run again.

Children of a search share layers with what was measured before. The states that enter a layer are a function of the
batch and of the edits of all layers before it, so those of the longest beginning that is known are put in, and the
layers before are passed over. The layers after see the same numbers, so that scores are the same, bit for bit, wherever
a layer gives equal outputs for equal inputs.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from genlight.experts.editor import ExpertEditor

_LAYER = re.compile(r"(.+?)\.(\d+)\.")


class PrefixCache:
    """States that enter the decoder layers of one model, the least recently used of them given up first.

    Attributes:
        limit: most bytes, on the model's device.
        bytes: held now.
        passed_over: layers that did not run, of all that would have.
        layers_seen: all that would have.
    """

    def __init__(self, editor: ExpertEditor, limit: int) -> None:
        """
        Args:
            editor: of the model.
            limit: most bytes.

        Raises:
            ValueError: a negative limit, or a model whose layers with experts do not lie in one list.
        """
        if limit < 0:
            raise ValueError(f"limit = {limit} must not be negative")
        self.editor, self.limit, self.bytes, self.passed_over, self.layers_seen = editor, limit, 0, 0, 0
        found = [match for name in editor.layers if (match := _LAYER.match(name))]
        if len(found) != len(editor.layers) or len({match[1] for match in found}) != 1:
            raise ValueError(f"the layers {', '.join(editor.layers)} are not parts of one list of layers")
        listed = editor.model.get_submodule(found[0][1])
        self._layers: list[nn.Module] = list(listed.children())
        self._names = {int(match[2]): name for match, name in zip(found, editor.layers, strict=True)}
        self._states: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._beginnings: list[str] = []
        self._batch, self._start = "", 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Forward passes inside use and fill the cache under the edits that are on; none may keep keys and values."""
        self._beginnings = self._keys()
        handle = self.editor.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            for number, layer in enumerate(self._layers):
                # an attribute of the instance hides the method of its class
                vars(layer)["forward"] = self._wrapped(number, layer.forward)
            yield
        finally:
            handle.remove()
            for layer in self._layers:
                vars(layer).pop("forward", None)

    def clear(self) -> None:
        """Give up all states."""
        self._states.clear()
        self.bytes = 0

    def _keys(self) -> list[str]:
        """For each layer a digest of all that is edited before it."""
        maps, keys = self.editor.maps, []
        digest = hashlib.sha256(repr((self.editor.routing, self.editor.router_mapping)).encode())
        for number in range(len(self._layers)):
            keys.append(digest.hexdigest())
            one = maps.get(self._names.get(number, ""))
            tensors = () if one is None else (one.expert_map, one.router_map, one.neuron_orders)
            digest.update(b"/")
            for tensor in tensors:
                digest.update(b"-" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
        return keys

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        digest = hashlib.sha256()
        for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
            if isinstance(value, Tensor):
                digest.update(repr(value.shape).encode() + value.cpu().contiguous().numpy().tobytes())
        self._batch = digest.hexdigest()
        known = [n for n, key in enumerate(self._beginnings) if n and (key, self._batch) in self._states]
        self._start = max(known, default=0)
        self.passed_over += self._start
        self.layers_seen += len(self._layers)

    def _wrapped(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if number < self._start:
                return hidden
            if number == self._start and number:
                place = self._beginnings[number], self._batch
                self._states.move_to_end(place)
                hidden = self._states[place]
            output = forward(hidden, *args, **kwargs)
            if isinstance(output, Tensor) and number + 1 < len(self._layers):
                self._keep((self._beginnings[number + 1], self._batch), output)
            return output

        return call

    def _keep(self, place: tuple[str, str], state: Tensor) -> None:
        if state.nbytes > self.limit or place in self._states:
            return
        self._states[place] = state.detach()
        self.bytes += state.nbytes
        while self.bytes > self.limit:
            self.bytes -= self._states.popitem(last=False)[1].nbytes
